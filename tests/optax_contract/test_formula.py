"""P17, P18: the dense formula in float64, raveled parameters, other parametrisations."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

from . import cases
from . import oracle

EPS = np.finfo(np.float64).eps
NOT_SAMPLED = [name for name in cases.METRICS if name != "sampled_fisher"]


def direction(tx, params, grads, batch, **extra):
    return tx.update(grads, tx.init(params), params, batch=batch, **extra)[0]


def expected_direction(metric, structure, damping, params, grads, batch):
    fisher = oracle.structured(oracle.matrix(metric, params, batch), structure, params)
    return fisher, oracle.solve(fisher, damping, oracle.ravel(grads))


@pytest.mark.parametrize("damping", [cases.DAMPING, 10.0])
@pytest.mark.parametrize("solver", cases.SOLVERS)
def test_every_solver_gives_the_dense_formula(solver, damping, x64):
    arrays = cases.arrays()
    row = cases.SOLVERS[solver]
    tx = cases.transformation(f"scale_by_natural_gradient-{solver}")
    fisher, expected = expected_direction("exact_fisher", row.structure, damping, *arrays)
    got = direction(tx, *arrays, damping=damping)
    oracle.close(got, expected, EPS, oracle.amplification(fisher, damping, row.tolerance, EPS))


@pytest.mark.parametrize("metric", NOT_SAMPLED)
def test_every_metric_gives_the_dense_formula(metric, x64):
    arrays = cases.arrays()
    name = "automatic" if metric == "exact_fisher" else metric
    tx = cases.transformation(f"scale_by_natural_gradient-{name}")
    fisher, expected = expected_direction(metric, "dense", cases.DAMPING, *arrays)
    oracle.close(
        direction(tx, *arrays), expected, EPS, oracle.amplification(fisher, cases.DAMPING, 0, EPS)
    )


def test_a_sampling_metric_solves_with_the_matrix_of_the_key_in_its_state(x64):
    params, grads, batch = arrays = cases.arrays()
    tx = cases.transformation("scale_by_natural_gradient-sampled_fisher")
    _, key = jax.random.split(jax.random.wrap_key_data(tx.init(params).key))
    metric = cases.METRICS["sampled_fisher"]
    fisher = np.asarray(ng.fisher_matrix(metric, params, batch, key=key))
    expected = oracle.solve(fisher, cases.DAMPING, oracle.ravel(grads))
    amplification = oracle.amplification(fisher, cases.DAMPING, 0, EPS)
    oracle.close(direction(tx, *arrays), expected, EPS, amplification)


def test_the_formula_tells_metrics_structures_and_dampings_apart(x64):
    """The control: each wrong ingredient is visible."""
    arrays = cases.arrays()
    _, right = expected_direction("exact_fisher", "dense", cases.DAMPING, *arrays)
    wrong = [
        expected_direction(metric, "dense", cases.DAMPING, *arrays)[1]
        for metric in NOT_SAMPLED
        if metric != "exact_fisher"
    ]
    wrong += [
        expected_direction("exact_fisher", s, cases.DAMPING, *arrays)[1]
        for s in ("diagonal", "blocks")
    ]
    wrong += [expected_direction("exact_fisher", "dense", 1.1 * cases.DAMPING, *arrays)[1]]
    for other in wrong:
        assert np.linalg.norm(other - right) > 1e-2 * np.linalg.norm(right)


def raveled_problem():
    params, grads, batch = cases.arrays()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return flat, jax.flatten_util.ravel_pytree(grads)[0], batch, unravel


@pytest.mark.parametrize("solver", ["woodbury", "cg_diagonal", "block_diagonal"])
def test_raveled_parameters_give_the_raveled_step(solver, x64):
    arrays = cases.arrays()
    row = cases.SOLVERS[solver]
    flat, g, batch, unravel = raveled_problem()
    metric = ng.exact_fisher(lambda v, batch: cases.logits(unravel(v), batch), ng.Categorical())
    tx = ng.scale_by_natural_gradient(metric, solver=row.solver, damping=cases.DAMPING)
    got = direction(tx, flat, g, batch)
    if solver == "block_diagonal":
        # One leaf is one block: raveling makes this approximation exact.
        expected = expected_direction("exact_fisher", "dense", cases.DAMPING, *arrays)[1]
    else:
        expected = direction(cases.transformation(f"scale_by_natural_gradient-{solver}"), *arrays)
    fisher = oracle.matrix("exact_fisher", arrays[0], arrays[2])
    oracle.close(
        got, expected, EPS, oracle.amplification(fisher, cases.DAMPING, row.tolerance, EPS)
    )


@pytest.mark.parametrize("solver", ["automatic", "spectral", "cg", "diagonal"])
def test_the_identity_metric_scales_the_gradient(solver, x64):
    params, grads, _ = cases.arrays()
    tx = ng.scale_by_natural_gradient(
        ng.euclidean(), solver=cases.SOLVERS[solver].solver, damping=0.25
    )
    oracle.close(direction(tx, params, grads, None), oracle.ravel(grads) / 1.25, EPS)


def test_rows_that_make_up_the_identity_scale_the_gradient(x64):
    """Woodbury needs rows, and `euclidean` has none."""
    p, g = jnp.arange(4.0), jnp.array([1.0, -2.0, 0.5, 3.0])
    metric = ng.gauss_newton(lambda p, batch: 2 * p)
    tx = ng.scale_by_natural_gradient(metric, solver=ng.woodbury(), damping=0.25)
    oracle.close(direction(tx, p, g, None), np.asarray(g) / 1.25, EPS)


T = np.linalg.qr(np.random.default_rng(7).normal(size=(8, 8)))[0] @ np.diag(np.linspace(0.5, 2, 8))
# cond(F + damping I) < 100, cond(T)^2 = 16.
REPARAMETRISED = 1600


def through(solver, transform, damping=0.1, *, moved=True):
    """The direction in phi of theta = T phi, mapped back to theta.

    The damping lambda I of theta is lambda T^T T for phi. Where it is `moved` along, one more group
    of residuals carries it, with the rows of the identity for its examples.
    """
    flat, g, batch, unravel = raveled_problem()
    change = jnp.asarray(transform)

    def fit(phi, batch):
        return cases.residual(unravel(change @ phi), batch)

    def damped_fit(phi, batch):
        carried = (damping * phi.size) ** 0.5 * (batch["unit"] @ (change @ phi))
        return {"fit": fit(phi, batch), "damping": carried}

    if moved:
        batch = {**batch, "unit": jnp.eye(flat.size)}
    metric = ng.gauss_newton(damped_fit if moved else fit)
    tx = ng.scale_by_natural_gradient(metric, solver=solver, damping=0.0 if moved else damping)
    return transform @ direction(tx, jnp.linalg.solve(change, flat), change.T @ g, batch)


def without(structure):
    return expected_direction("gauss_newton", structure, 0.1, *cases.arrays())[1]


@pytest.mark.parametrize("solver", ["cholesky", "qr", "woodbury", "spectral", "cg"])
def test_exact_solvers_do_not_see_the_parametrisation(solver, x64):
    row = cases.SOLVERS[solver]
    tolerance = REPARAMETRISED * max(1, row.tolerance / EPS)
    oracle.close(through(row.solver, T), without("dense"), EPS, tolerance)


def test_the_diagonal_sees_rotations_but_not_scales(x64):
    """The control for the test above, and what an approximation still promises."""
    expected = without("diagonal")
    assert np.linalg.norm(through(ng.diagonal(), T) - expected) > 1e-2 * np.linalg.norm(expected)
    scales = np.diag(np.linspace(0.5, 2, 8))
    oracle.close(through(ng.diagonal(), scales), expected, EPS, REPARAMETRISED)


def test_damping_that_stays_behind_shows_the_parametrisation(x64):
    """The control: lambda I in both parametrisations is not the same damping."""
    expected = without("dense")
    stayed = through(ng.cholesky(), T, moved=False)
    assert np.linalg.norm(stayed - expected) > 1e-2 * np.linalg.norm(expected)

"""Conjugate gradients: when they stop, from where they start, and what they report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import natgrad_jax as ng

RNG = np.random.default_rng(10)
METRIC = ng.gauss_newton(lambda params, x: x @ params)
QUADRATIC = ng.hessian(lambda p, matrix: 0.5 * p @ (matrix @ p))
GRADIENT = RNG.normal(size=8)
# One solver for each setting, as the compiled code is kept by solver.
cg = functools.cache(ng.cg)
diagonal = functools.cache(ng.diagonal)


def symmetric(eigenvalues):
    vectors = scipy.linalg.qr(RNG.normal(size=(8, 8)))[0]
    return (vectors * eigenvalues) @ vectors.T


def solve(solver, matrix, g=GRADIENT, damping=0.1, metric=QUADRATIC):
    d, info = ng.natural_gradient_direction(
        metric, np.zeros_like(g), matrix, g, solver=solver, damping=damping
    )
    return np.asarray(d), info


def residual(matrix, d, damping=0.1, g=GRADIENT) -> float:
    return np.linalg.norm(matrix @ d + damping * d - g) / np.linalg.norm(g)


SPREAD = symmetric(np.logspace(0, -4, 8))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_iterations_are_the_number_of_distinct_eigenvalues(distinct):
    matrix = symmetric(np.repeat(np.arange(1.0, distinct + 1), 8 // distinct))
    d, info = solve(cg(tol=1e-12), matrix)
    assert int(info.iterations) == distinct
    np.testing.assert_allclose(d, np.linalg.solve(matrix + 0.1 * np.eye(8), GRADIENT), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tol", [1e-1, 1e-4, 1e-8])
def test_the_tolerance_is_relative_to_the_gradient(tol):
    solver = cg(tol=tol)
    iterations = set()
    for scale in (1e-6, 1.0, 1e6):
        d, info = solve(solver, SPREAD, scale * GRADIENT, 1e-5)
        assert residual(SPREAD, d, 1e-5, scale * GRADIENT) <= 1.01 * tol
        iterations.add(int(info.iterations))
    assert len(iterations) == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("limit", [1, 3])
def test_iterations_are_bounded_and_the_residual_is_reported(limit):
    d, info = solve(cg(limit), SPREAD, damping=1e-5)
    assert int(info.iterations) == limit
    assert float(info.relative_residual) > 1e-6
    assert float(info.relative_residual) == pytest.approx(residual(SPREAD, d, 1e-5), rel=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("limit", [1, 3])
def test_iterations_are_bounded_without_damping_too(limit):
    _, info = solve(cg(limit), SPREAD, damping=0.0)
    assert int(info.iterations) <= limit


def steps(solver, *gradients, matrix=SPREAD, damping=1e-3):
    """Updates of one transformation in turn, each with its info."""
    tx = ng.scale_by_natural_gradient(QUADRATIC, solver=solver, damping=damping)
    params = np.zeros(8)
    state, found = tx.init(params), []
    for g in gradients:
        d, state = tx.update(g, state, params, batch=matrix)
        found.append((np.asarray(d), state.info))
    return found, state


@pytest.mark.smoke
@pytest.mark.usefixtures("x64")
def test_a_warm_start_saves_iterations():
    near = GRADIENT * (1 + 1e-4 * RNG.normal(size=8))
    cold, _ = solve(cg(), SPREAD, near, 1e-3)
    (_, (warm, info)), _ = steps(cg(), GRADIENT, near)
    (_, (_, cold_info)), state = steps(cg(warm_start=False), GRADIENT, near)
    assert int(info.iterations) < int(cold_info.iterations)
    np.testing.assert_allclose(warm, cold, rtol=1e-3)
    assert state.solver.previous is None


@pytest.mark.usefixtures("x64")
def test_the_solution_of_the_same_system_is_a_perfect_start():
    for factor in (1.0, -3.0, 1e6):
        (_, (d, info)), _ = steps(cg(), GRADIENT, factor * GRADIENT)
        assert int(info.iterations) == 0
        assert residual(SPREAD, d, 1e-3, factor * GRADIENT) < 1e-5


@pytest.mark.usefixtures("x64")
def test_a_start_orthogonal_to_the_gradient_or_zero_is_dropped():
    (_, (d, info)), _ = steps(cg(), np.zeros(8), GRADIENT)
    np.testing.assert_array_equal(d, solve(cg(), SPREAD, damping=1e-3)[0])
    assert int(info.iterations) > 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make", [diagonal, ng.block_diagonal, ng.spectral], ids=lambda f: f.__name__
)
def test_a_preconditioner_saves_iterations(make):
    scaled = np.diag(np.logspace(0, -6, 8)) + 1e-9
    plain, preconditioned = (
        solve(s, scaled, damping=1e-6) for s in (cg(), cg(preconditioner=make()))
    )
    assert int(preconditioned[1].iterations) < int(plain[1].iterations)
    assert residual(scaled, preconditioned[0], 1e-6) < 1e-5


@pytest.mark.usefixtures("x64")
def test_the_state_holds_that_of_the_preconditioner():
    _, state = steps(cg(preconditioner=diagonal()), GRADIENT)
    assert state.solver.preconditioner == ()
    assert state.solver.previous.shape == (8,)


@pytest.mark.usefixtures("x64")
def test_negative_curvature_at_once_gives_the_gradient():
    d, info = solve(cg(), -np.eye(8))
    assert info.negative_curvature
    np.testing.assert_allclose(d, GRADIENT)


@pytest.mark.usefixtures("x64")
def test_negative_curvature_later_keeps_the_solution_so_far():
    matrix = np.diag([4.0, 3, 2, 2, 2, 1, 1, -0.5])
    d, info = solve(cg(), matrix)
    assert info.negative_curvature
    assert 1 < int(info.iterations) <= 8
    # The model of the loss went down on the way, and the direction is one of descent.
    model = lambda d: d @ matrix @ d / 2 + 0.05 * d @ d - GRADIENT @ d
    assert model(d) < 0
    assert float(info.grad_dot_direction) > 0
    assert not solve(cg(), matrix, damping=0.6)[1].negative_curvature


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_without_damping_a_singular_matrix_gets_its_shortest_solution(rank):
    rows = RNG.normal(size=(rank, 8))
    for solver in (cg(tol=1e-12), cg(tol=1e-12, preconditioner=diagonal())):
        d, info = solve(solver, rows * rank**0.5, damping=0.0, metric=METRIC)
        expected = np.linalg.pinv(rows) @ (np.linalg.pinv(rows).T @ GRADIENT)
        np.testing.assert_allclose(d, expected, atol=1e-8 * np.linalg.norm(expected))
        assert not info.negative_curvature


@pytest.mark.parametrize("tol", [1e-6, 0.0])
def test_without_damping_rounding_in_float32_does_not_blow_up(tol):
    solver, errors = cg(tol=tol), []
    for _ in range(200):
        rows = RNG.normal(size=(9, 4)) @ RNG.normal(size=(4, 8))
        narrow, g = rows.astype(np.float32), GRADIENT.astype(np.float32)
        d, _ = solve(solver, 3 * narrow, g, 0.0, METRIC)
        expected = np.linalg.pinv(rows.T @ rows, rcond=1e-10, hermitian=True) @ GRADIENT
        errors.append(np.linalg.norm(d - expected) / np.linalg.norm(expected))
    assert max(errors) < 0.1


def test_a_tolerance_out_of_reach_in_float32_ends_at_the_limit_without_harm():
    matrix, g = SPREAD.astype(np.float32), GRADIENT.astype(np.float32)
    d, info = solve(cg(tol=0.0), matrix, g, 1e-3)
    assert residual(matrix, d, 1e-3, g) < 1e-4
    assert int(info.iterations) <= 100


@pytest.mark.usefixtures("x64")
def test_a_zero_gradient_takes_no_iteration():
    for damping in (0.1, 0.0):
        d, info = solve(cg(), SPREAD, np.zeros(8), damping)
        np.testing.assert_array_equal(d, 0)
        assert int(info.iterations) == 0
        assert float(info.relative_residual) == 0


@pytest.mark.usefixtures("x64")
def test_the_model_is_linearised_once():
    calls = []

    def counted(params, x):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.tanh(x @ params)

    metric, x = ng.gauss_newton(counted), RNG.normal(size=(5, 8))
    _, info = solve(cg(), x, damping=1e-4, metric=metric)
    jax.effects_barrier()
    assert int(info.iterations) > 3
    # Not one evaluation an iteration.
    assert len(calls) <= 2


@pytest.mark.usefixtures("x64")
def test_the_state_starts_from_shapes_alone():
    shapes = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    state = cg().init(ng.euclidean(), shapes)
    assert state.previous["w"].shape == (2, 3)
    assert state.previous["w"].dtype == jnp.float32
    params = {"w": jnp.zeros((2, 3)), "hidden": optax.MaskedNode()}
    assert cg().init(ng.euclidean(), params).previous["hidden"] == optax.MaskedNode()


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6])
def test_without_damping_units_do_not_matter(scale):
    x, p = jax.random.normal(jax.random.key(2), (8, 4)), jnp.zeros((4, 3))
    metric = ng.exact_fisher(lambda p, x: scale * (x @ p), ng.Categorical())
    g = ng.fisher_vector_product(metric, p, x, jax.random.normal(jax.random.key(5), (4, 3)))
    _, info = ng.natural_gradient_direction(metric, p, x, g, solver=cg(), damping=0.0)
    assert float(info.relative_residual) < 1e-5


@pytest.mark.parametrize("metric", [METRIC, "hessian"], ids=["gauss_newton", "hessian"])
def test_float16_parameters_do_not_limit_the_range_of_products(metric):
    """F of 1e-6, below what float16 resolves: the direction is that of float32."""
    x = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float16) * np.float16(1e-3)
    g = np.random.default_rng(1).normal(size=7).astype(np.float16) * np.float16(1e-2)
    if metric == "hessian":
        metric = ng.hessian(lambda p, x: 0.5 * jnp.mean((x @ p) ** 2))
        x, g = 8 * x, g / 8

    def direction(dtype):
        return solve(cg(), x.astype(dtype), g.astype(dtype), 1e-6, metric)[0].astype(float)

    expected = direction(np.float32)
    assert np.abs(expected).max() < 6e4  # the limit of float16
    assert np.linalg.norm(direction(np.float16) - expected) < 3e-3 * np.linalg.norm(expected)

"""Identities E1-E9: what solves of (F + damping I) d = g satisfy, in float64."""

# ruff: noqa: N802 - tests carry the tag of the identity they show

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

EPS = np.finfo(np.float64).eps
TOL = 1e4 * EPS
VISIBLE = 0.1
RNG = np.random.default_rng(1)

# With residuals linear in the parameters the rows are the data: R = X / sqrt(M).
METRIC = ng.gauss_newton(lambda params, x: x @ params)
EXACT = {
    "cholesky": ng.cholesky(),
    "woodbury": ng.woodbury(),
    "qr": ng.qr(),
    "spectral": ng.spectral(),
    "cg": ng.cg(tol=1e-13),
    "None": None,
}
every_exact_solver = pytest.mark.parametrize("name", EXACT)

ROWS = RNG.normal(size=(4, 7))
GRADIENT = RNG.normal(size=7)


def error(value, expected: np.ndarray) -> float:
    return np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected)


def solve(solver, rows, g, damping):
    x, zeros = rows * np.asarray(len(rows), rows.dtype) ** 0.5, np.zeros_like(g)
    d, info = ng.natural_gradient_direction(METRIC, zeros, x, g, solver=solver, damping=damping)
    return np.asarray(d), info


def damped(matrix, damping):
    return matrix + damping * np.eye(len(matrix))


def rows_with_singular_values(values, columns=7):
    left = scipy.linalg.qr(RNG.normal(size=(len(values), len(values))))[0]
    right = scipy.linalg.qr(RNG.normal(size=(columns, columns)))[0][:, : len(values)]
    return left @ np.diag(values) @ right.T


@pytest.mark.smoke
@every_exact_solver
def test_E1_every_exact_solver_inverts_the_damped_matrix_for_any_gradient(name):
    d, _ = solve(EXACT[name], ROWS, GRADIENT, 0.1)
    assert error(d, np.linalg.solve(damped(ROWS.T @ ROWS, 0.1), GRADIENT)) < TOL
    nearest = np.linalg.lstsq(ROWS.T, GRADIENT)[0]
    push_through = ROWS.T @ np.linalg.solve(damped(ROWS @ ROWS.T, 0.1), nearest)
    assert error(d, push_through) > VISIBLE


def test_E2_rows_are_the_transposed_factor_times_the_jacobian():
    weight, x = 2 * RNG.normal(size=(2, 3)), RNG.normal(size=(2, 2))
    labels = np.array([0, 2])
    p = scipy.special.softmax(x @ weight, axis=-1)
    factor = [np.diag(np.sqrt(q)) - np.outer(q, np.sqrt(q)) for q in p]
    jacobian = [np.kron(row, np.eye(3)) for row in x]
    stack = lambda blocks: np.concatenate(blocks) / np.sqrt(len(x))
    right = stack([b.T @ j for b, j in zip(factor, jacobian, strict=True)])
    wrong = stack([b @ j for b, j in zip(factor, jacobian, strict=True)])
    gradients = (p - np.eye(3)[labels]) / np.sqrt(len(x))
    r = np.concatenate([np.linalg.lstsq(b, q)[0] for b, q in zip(factor, gradients, strict=True)])
    g = x.T @ (p - np.eye(3)[labels]) / len(x)

    metric = ng.exact_fisher(lambda w, x: x @ w, ng.Categorical())
    d, _ = ng.natural_gradient_direction(metric, weight, x, g, solver=ng.woodbury(), damping=0.01)
    push_through = lambda rows: rows.T @ np.linalg.solve(damped(rows @ rows.T, 0.01), r)
    assert error(np.ravel(d), push_through(right)) < TOL
    assert error(np.ravel(d), push_through(wrong)) > VISIBLE
    assert error(ng.gram_matrix(metric, weight, x), right @ right.T) < TOL
    assert error(ng.gram_matrix(metric, weight, x), wrong @ wrong.T) > VISIBLE


def test_E3_directions_map_by_the_reparametrisation_with_damping_mapped_too():
    x, theta, transform = RNG.normal(size=(6, 3)), RNG.normal(size=3), RNG.normal(size=(3, 3))
    labels = np.array([0, 2, 1, 0, 3, 1])
    rate = lambda params, batch: batch[0] @ params
    mapped_rate = lambda params, batch: batch[0] @ (batch[1] @ params)
    phi = np.linalg.solve(transform, theta)
    gradient = x.T @ (np.exp(x @ theta) - labels) / len(x)
    mapped_gradient = transform.T @ gradient

    def direction(model, params, g, damping):
        metric = ng.exact_fisher(model, ng.Poisson(), batch_axes=(0, None))
        batch = (x, transform)
        return np.asarray(
            ng.natural_gradient_direction(metric, params, batch, g, damping=damping)[0]
        )

    undamped = direction(rate, theta, gradient, 0.0)
    assert error(transform @ direction(mapped_rate, phi, mapped_gradient, 0.0), undamped) < TOL
    assert error(transform @ mapped_gradient, gradient) > VISIBLE

    mapped = direction(mapped_rate, phi, mapped_gradient, 0.0)
    fisher = transform.T @ (x.T * np.exp(x @ theta) / len(x)) @ x @ transform
    with_metric = np.linalg.solve(fisher + 0.3 * transform.T @ transform, mapped_gradient)
    assert error(mapped, np.linalg.solve(fisher, mapped_gradient)) < TOL
    assert error(transform @ with_metric, direction(rate, theta, gradient, 0.3)) < TOL
    plain = direction(mapped_rate, phi, mapped_gradient, 0.3)
    assert error(transform @ plain, direction(rate, theta, gradient, 0.3)) > 0.01


def test_E4_one_undamped_step_of_linear_regression_lands_on_the_optimum():
    x, y, start = RNG.normal(size=(6, 3)), RNG.normal(size=6), RNG.normal(size=3)
    g = x.T @ (x @ start - y) / len(x)
    metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal())
    step = lambda damping: (
        start - np.asarray(ng.natural_gradient_direction(metric, start, x, g, damping=damping)[0])
    )
    optimum = np.linalg.lstsq(x, y)[0]
    assert error(step(0.0), optimum) < TOL
    assert error(step(0.1), optimum) > 0.01
    assert error(start - g, optimum) > VISIBLE


@pytest.mark.parametrize("name", ["bernoulli", "poisson"])
def test_E4_unit_learning_rate_is_iteratively_reweighted_least_squares(name):
    likelihood, mean, variance, y = {
        "bernoulli": (
            ng.Bernoulli(),
            scipy.special.expit,
            lambda m: m * (1 - m),
            np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0]),
        ),
        "poisson": (ng.Poisson(), np.exp, lambda m: m, np.array([0.0, 2.0, 1.0, 5.0, 1.0, 0.0])),
    }[name]
    x = np.stack([np.ones(6), np.array([-1.0, 0.5, 2.0, 1.0, -0.3, 0.1])], axis=-1)
    tx = ng.natural_gradient(1.0, ng.exact_fisher(lambda p, x: x @ p, likelihood), damping=0.0)
    params = expected = np.array([0.1, -0.2])
    state = tx.init(params)
    for _ in range(3):
        g = x.T @ (mean(x @ params) - y) / len(x)
        updates, state = tx.update(g, state, params, batch=x)
        params = params + np.asarray(updates)
        m = mean(x @ expected)
        w = np.sqrt(variance(m))
        working = x @ expected + (y - m) / variance(m)
        unweighted = np.linalg.lstsq(x, working)[0]
        expected = np.linalg.lstsq(w[:, None] * x, w * working)[0]
        assert error(params, expected) < TOL
        assert error(params, unweighted) > 1e-3


@every_exact_solver
@pytest.mark.parametrize("damping", [0.1, 0.0])
def test_E5_solves_are_homogeneous_in_the_gradient(name, damping):
    d, _ = solve(EXACT[name], ROWS, GRADIENT, damping)
    for factor in (1e-8, 1e8):
        assert error(solve(EXACT[name], ROWS, factor * GRADIENT, damping)[0], factor * d) < TOL


def test_E5_warm_started_conjugate_gradients_are_homogeneous():
    # Two iterations do not converge: what the warm start contributes stays visible.
    tx = ng.scale_by_natural_gradient(METRIC, solver=ng.cg(2), damping=0.01)
    params, x, second = np.zeros(7), ROWS * 2, GRADIENT + 0.3 * RNG.normal(size=7)
    first, state = tx.update(GRADIENT, tx.init(params), params, batch=x)
    step = lambda g: np.asarray(tx.update(g, state, params, batch=x)[0])
    cold = np.asarray(tx.update(second, tx.init(params), params, batch=x)[0])
    assert error(step(second), cold) > 1e-3

    textbook = lambda g: np.asarray(
        jax.scipy.sparse.linalg.cg(
            lambda v: ROWS.T @ (ROWS @ v) + 0.01 * v, jnp.asarray(g), x0=first, maxiter=2, tol=0.0
        )[0]
    )
    for factor in (1e-8, 1e8):
        assert error(step(factor * second), factor * step(second)) < TOL
        assert error(textbook(factor * second), factor * textbook(second)) > VISIBLE


@pytest.mark.parametrize("exact", ["cholesky", "qr", "woodbury"])
def test_E6_an_exact_preconditioner_needs_one_iteration(exact):
    iterations = lambda solver: int(solve(solver, ROWS, GRADIENT, 0.1)[1].iterations)
    assert iterations(ng.cg(preconditioner=EXACT[exact])) == 1
    assert iterations(ng.cg()) > 3


@pytest.mark.parametrize("damping", [0.1, 0.0])
@pytest.mark.parametrize("name", ["cholesky", "qr", "woodbury", "cg"])
def test_E7_momentum_in_sample_space_equals_momentum_in_parameter_space(name, damping):
    mu, params = 0.8, np.zeros(7)
    tx = ng.scale_by_natural_gradient(METRIC, solver=EXACT[name], damping=damping, momentum=mu)
    state, phi, heavy_ball = tx.init(params), np.zeros(7), np.zeros(7)
    for _ in range(3):
        rows, r = RNG.normal(size=(4, 7)), RNG.normal(size=4)
        g = rows.T @ r
        phi_new, state = tx.update(g, state, params, batch=2 * rows)
        inverse = np.linalg.pinv(damped(rows @ rows.T, damping))
        phi = mu * phi + rows.T @ inverse @ (r - mu * rows @ phi)
        heavy_ball = mu * heavy_ball + rows.T @ inverse @ r
        assert error(phi_new, phi) < TOL / max(damping, 1e-2)
    assert error(phi_new, heavy_ball) > VISIBLE


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("name", ["cholesky", "qr", "woodbury", "spectral"])
def test_E8_rounding_error_is_eps_times_largest_eigenvalue_over_damping(name, damping):
    rows = rows_with_singular_values(np.logspace(0, -5, 4))
    d, _ = solve(EXACT[name], rows, GRADIENT, damping)
    expected = scipy.linalg.svd(rows, full_matrices=True)
    s = np.append(expected[1], np.zeros(3))
    expected = expected[2].T @ ((expected[2] @ GRADIENT) / (s**2 + damping))
    assert error(d, expected) < 20 * EPS / damping


@pytest.mark.parametrize("name", ["cholesky", "qr", "woodbury"])
def test_E8_a_refinement_step_buys_digits_in_float32(name):
    eps, damping = np.finfo(np.float32).eps, 1e-5
    refined, plain = [], []
    for _ in range(20):
        rows = rows_with_singular_values(np.logspace(0, -3, 4)).astype(np.float32)
        g, exact = GRADIENT.astype(np.float32), rows.astype(np.float64)
        expected = np.linalg.solve(damped(exact.T @ exact, damping), g.astype(np.float64))
        d, _ = solve(EXACT[name], rows, g, damping)
        assert d.dtype == np.float32
        factor = np.linalg.cholesky((rows.T @ rows + damping * np.eye(7)).astype(np.float32))
        unrefined = scipy.linalg.cho_solve((factor, True), g)
        refined.append(error(d, expected))
        plain.append(error(unrefined, expected))
    assert np.median(refined) < eps / damping
    assert np.median(refined) < 0.3 * np.median(plain)


def test_E9_gain_of_the_damped_inverse_is_the_damped_solve():
    inverse = ng.spectral(lambda h, damping: 1 / (h + damping))
    d, _ = solve(inverse, ROWS, GRADIENT, 0.1)
    assert error(d, np.linalg.solve(damped(ROWS.T @ ROWS, 0.1), GRADIENT)) < TOL
    root = ng.spectral(lambda h, damping: (h + damping) ** -0.5)
    assert error(solve(root, ROWS, GRADIENT, 0.1)[0], d) > VISIBLE


# Four rows of seven columns are decomposed in sample space, nine in parameter space.
@pytest.mark.parametrize("number", [4, 9])
def test_E9_inverse_root_applied_twice_is_the_pseudo_inverse(number):
    rows = RNG.normal(size=(number, 5)) @ RNG.normal(size=(5, 7))
    root = ng.spectral(lambda h, damping: h**-0.5)
    once, _ = solve(root, rows, GRADIENT, 0.0)
    twice, _ = solve(root, rows, once, 0.0)
    expected = np.linalg.pinv(rows.T @ rows, rcond=1e-12) @ GRADIENT
    assert error(twice, expected) < 100 * TOL
    assert error(once, expected) > VISIBLE


@pytest.mark.parametrize("number", [4, 7])
def test_E9_a_cut_removes_exactly_the_modes_below_it(number):
    rows = rows_with_singular_values(np.linspace(1, 0.1, number))
    cut = ng.spectral(lambda h, damping: jnp.where(h > damping, 1 / h, 0))
    _, s, modes = scipy.linalg.svd(rows)
    for kept in (1, 2, 3):
        threshold = np.mean(s[kept - 1 : kept + 1] ** 2)
        d, _ = solve(cut, rows, GRADIENT, threshold)
        expected = modes[:kept].T @ ((modes[:kept] @ GRADIENT) / s[:kept] ** 2)
        fewer = modes[: kept + 1].T @ ((modes[: kept + 1] @ GRADIENT) / s[: kept + 1] ** 2)
        assert error(d, expected) < TOL
        assert error(d, fewer) > 0.01

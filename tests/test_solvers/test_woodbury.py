"""The sample-space solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

RNG = np.random.default_rng(8)
WOODBURY = ng.woodbury()
METRIC = ng.gauss_newton(lambda params, x: x @ params)


def solve(rows, g, damping):
    x, zeros = rows * np.asarray(len(rows) ** 0.5, rows.dtype), np.zeros_like(g)
    d, info = ng.natural_gradient_direction(METRIC, zeros, x, g, solver=WOODBURY, damping=damping)
    return np.asarray(d), info


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("number", [1, 9])
@pytest.mark.parametrize("damping", [0.1, 0.0])
def test_any_number_of_rows(number, damping):
    rows, g = RNG.normal(size=(number, 5)), RNG.normal(size=5)
    damped = rows.T @ rows + damping * np.eye(5)
    expected = np.linalg.pinv(damped, rcond=1e-12, hermitian=True) @ g
    np.testing.assert_allclose(solve(rows, g, damping)[0], expected, rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("damping", [1e-4, 1e-8, 1e-12, 0.0])
def test_a_gradient_in_the_row_space_is_solved_at_any_damping(damping):
    rows = RNG.normal(size=(3, 6))
    r = RNG.normal(size=3)
    expected = rows.T @ np.linalg.solve(rows @ rows.T + damping * np.eye(3), r)
    # The two terms cancel to eps * largest eigenvalue / damping; without damping they do not meet.
    tolerance = 1e-9 if damping == 0 else 1e-14 / damping
    np.testing.assert_allclose(solve(rows, rows.T @ r, damping)[0], expected, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_damping_zero_differs_from_tiny_damping_outside_the_row_space():
    rows, g = np.array([[1.0, 0.0]]), np.array([1.0, 1.0])
    np.testing.assert_allclose(solve(rows, g, 0.0)[0], [1, 0], atol=1e-12)
    np.testing.assert_allclose(solve(rows, g, 1e-6)[0], [1, 1e6], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_a_null_mode_of_the_gram_matrix_is_damped_like_any_other():
    # Centered scores sum to zero.
    x, w, g = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3))
    log_prob = lambda w, b: ng.Categorical().log_prob(b[0] @ w, b[1])
    metric, batch = ng.empirical_fisher(log_prob, centered=True), (x, np.array([0, 2, 1]))
    d, info = ng.natural_gradient_direction(metric, w, batch, g, solver=WOODBURY, damping=0.01)
    fisher = np.asarray(ng.fisher_matrix(metric, w, batch))
    expected = np.linalg.solve(fisher + 0.01 * np.eye(12), g.ravel())
    np.testing.assert_allclose(np.ravel(d), expected, rtol=1e-9)
    assert not info.eigen_taken


@pytest.mark.smoke
def test_float32_with_damping_far_below_the_spectrum():
    errors = []
    for _ in range(10):
        rows, g = RNG.normal(size=(4, 7)), RNG.normal(size=7)
        narrow = rows.astype(np.float32)
        damping = 1e-6 * np.linalg.norm(rows @ rows.T, 2)
        exact = narrow.astype(float)
        expected = np.linalg.solve(
            exact.T @ exact + damping * np.eye(7), np.float32(g).astype(float)
        )
        d, _ = solve(narrow, g.astype(np.float32), damping)
        errors.append(np.linalg.norm(d - expected) / np.linalg.norm(expected))
    # Without refinement with products of the rows it would be eps / 1e-6, a tenth.
    assert np.median(errors) < 1e-2


def test_no_p_by_p_matrix_is_needed():
    number = 100_000
    x = jnp.asarray(RNG.normal(size=(2, number)), jnp.float32)
    d, _ = ng.natural_gradient_direction(
        METRIC, jnp.zeros(number), x, x[0], solver=WOODBURY, damping=0.1
    )
    assert bool(jnp.all(jnp.isfinite(d)))


def _singular(case):
    """Rows that repeat one another: a softmax, examples twice, more rows than parameters."""
    key = jax.random.key
    if case == "softmax":
        model, likelihood, shape = (lambda p, x: x @ p), ng.Categorical(), (200, 3)
        x = 30 * jax.random.normal(key(0), (8, 200))
        target = jax.nn.one_hot(jnp.arange(8) % 3, 3) - 1 / 3
    elif case == "twice":
        model, likelihood, shape = (lambda p, x: 100 * (x @ p)), ng.Normal(), (40,)
        x = jnp.concatenate(2 * [jax.random.normal(key(2), (4, 40))])
        target = jnp.arange(8.0)
    else:
        model, likelihood, shape = (lambda p, x: 1000 * (x @ p)), ng.Normal(), (4, 3)
        x, target = jax.random.normal(key(2), (8, 4)), jax.random.normal(key(3), (8, 3))
    return ng.exact_fisher(model, likelihood), jnp.zeros(shape), x, x.T @ target / 8


@pytest.mark.parametrize("case", ["softmax", "twice", "tall"])
@pytest.mark.parametrize("solver", [ng.woodbury(), ng.spectral()], ids=["woodbury", "spectral"])
def test_repeated_rows_do_not_cost_the_direction_in_float32(case, solver):
    metric, params, x, g = _singular(case)
    d, info = ng.natural_gradient_direction(metric, params, x, g, solver=solver, damping=1e-3)
    product = np.asarray(ng.fisher_vector_product(metric, params, x, d), np.float64)
    left = np.asarray(g, np.float64) - product - 1e-3 * np.asarray(d, np.float64)
    assert np.linalg.norm(left) < 1e-3 * np.linalg.norm(g)
    assert float(info.relative_residual) < 1e-3


def test_the_formula_as_it_stands_fails_there():
    """The control: the subtraction in float32, whose result is then divided by the damping."""
    metric, params, x, g = _singular("softmax")
    fisher = np.asarray(ng.fisher_matrix(metric, params, x), np.float32)
    rows = np.linalg.cholesky(fisher + 1e-6 * np.eye(600, dtype=np.float32) * fisher.max()).T
    gram = rows @ rows.T + np.float32(1e-3) * np.eye(600, dtype=np.float32)
    flat = np.asarray(g).ravel()
    d = (flat - rows.T @ np.linalg.solve(gram, rows @ flat)) / np.float32(1e-3)
    left = flat - rows.T @ (rows @ d) - 1e-3 * d
    assert np.linalg.norm(left) > 1e-2 * np.linalg.norm(flat)

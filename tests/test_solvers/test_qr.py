"""Orthogonal factors of the rows: digits that a product of rows with themselves has lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

METRIC = ng.gauss_newton(lambda p, b: b[0] @ p - b[1])
SQUARING = {"cholesky": ng.cholesky(), "woodbury": ng.woodbury(), "spectral": ng.spectral()}
TRUTH = np.array([2020.0, 2020.0], np.float32)


def loss(p, batch):
    return jnp.mean((batch[0] @ p - batch[1]) ** 2) / 2


def straight_line(rows):
    """Its columns are 5800 apart in size: F has condition number 1e8, float32 7 digits."""
    x = np.stack([np.ones(rows), np.arange(rows)], 1).astype(np.float32)
    return x, x @ TRUTH


def descend(tx, batch, steps, **extra):
    @jax.jit
    def step(p, state):
        grads = jax.grad(loss)(p, batch)
        updates, state = tx.update(grads, state, p, batch=batch, **extra)
        return optax.apply_updates(p, updates), state

    p = jnp.zeros(2)
    state = tx.init(p)
    for _ in range(steps):
        p, state = step(p, state)
    return np.abs(np.asarray(p) / TRUTH - 1).max()


@pytest.mark.parametrize("solver", [ng.qr(), None], ids=["qr", "None"])
def test_undamped_steps_solve_the_straight_line_in_float32(solver):
    """As far as the model can tell: outputs near 2e7 are rounded to even numbers."""
    tx = ng.natural_gradient(1.0, METRIC, solver=solver, damping=0.0)
    assert descend(tx, straight_line(10_000), 20) < 4e-5


@pytest.mark.parametrize("name", ["cholesky", "spectral"])
def test_rows_that_are_squared_first_lose_it(name):
    """The control: F in float32, cut at eps times its largest eigenvalue."""
    tx = ng.natural_gradient(1.0, METRIC, solver=SQUARING[name], damping=0.0)
    assert descend(tx, straight_line(10_000), 4) > 0.5


def test_levenberg_marquardt_solves_the_straight_line_in_float32():
    tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, METRIC, solver=ng.qr()), METRIC)
    assert descend(tx, straight_line(10_000), 30, value_fn=loss) < 1e-5


def solve(solver, x, g, damping):
    batch = x, np.zeros(len(x), x.dtype)
    return ng.natural_gradient_direction(
        METRIC, np.zeros_like(g), batch, g, solver=solver, damping=damping
    )


def orthogonal(seed, shape):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=shape))[0]


def with_singular_values(values, shape):
    m, p = shape
    return orthogonal(0, (m, len(values))) * values @ orthogonal(1, (p, len(values))).T


def exact(x, g, damping):
    """In float64 from singular values; damping 0 leaves out what the rows do not span."""
    _, s, right = np.linalg.svd(x.astype(float) / len(x) ** 0.5, full_matrices=True)
    s = np.append(s, np.zeros(len(right) - len(s)))
    kept = (s > 1e-13 * s[0]) | (damping > 0)
    gains = kept / np.where(kept, s**2 + damping, 1)
    return right.T @ (gains * (right @ g.astype(float)))


def error(d, expected):
    return np.linalg.norm(np.asarray(d, float) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (9, 9)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-9, 1e-11])
def test_the_error_is_that_of_the_root_of_the_condition_number(shape, damping):
    """For g along the weak modes eps s_1 / sqrt(damping). The control: F squares it."""
    x = with_singular_values(np.logspace(0, -5, 9), shape).astype(np.float32) * shape[0] ** 0.5
    g = np.linalg.svd(x.astype(float))[2][8].astype(np.float32)
    expected = exact(x, g, damping)
    assert error(solve(ng.qr(), x, g, damping)[0], expected) < 1e-5 / damping**0.5
    rows = x / np.float32(shape[0] ** 0.5)
    squared = rows.T @ rows + np.float32(damping) * np.eye(shape[1], dtype=np.float32)
    if damping == 1e-11:
        assert error(np.linalg.solve(squared, g), expected) > 0.1


@pytest.mark.parametrize("shape", [(12, 5), (4, 9)], ids=["tall", "wide"])
def test_damping_zero_is_the_pseudo_inverse_down_to_its_cut(shape, x64):
    """Singular values 1e-9 apart: F cannot tell the last one from its rounding, rows can."""
    few = [1.0, 0.3, 1e-9]
    x = with_singular_values(few, shape) * shape[0] ** 0.5
    g = x.T @ np.random.default_rng(3).normal(size=shape[0])
    d, info = solve(ng.qr(), x, g, 0.0)
    assert error(d, exact(x, g, 0.0)) < 1e-2
    assert info.eigen_taken
    assert error(solve(ng.cholesky(), x, g, 0.0)[0], exact(x, g, 0.0)) > 0.9
    null = with_singular_values([1.0, 0.3, 1e-17], shape) * shape[0] ** 0.5
    assert error(solve(ng.qr(), null, g, 0.0)[0], exact(null, g, 0.0)) < 1e-9


def test_units_of_parameters_do_not_decide_what_is_null():
    """Columns 1e5 apart in float32: nothing is lost where only units differ."""
    x = np.random.default_rng(5).normal(size=(30, 4)).astype(np.float32)
    units = np.array([1.0, 1e-3, 1e-4, 10.0], np.float32)
    g = np.array([1.0, -2.0, 0.5, 1.0], np.float32)
    d, _ = solve(ng.qr(), x * units, g * units, 0.0)
    expected = np.linalg.solve(x.astype(float).T @ x.astype(float) / 30, g) / units
    np.testing.assert_allclose(d, expected, rtol=1e-4)
    squared, _ = solve(ng.cholesky(), x * units, g * units, 0.0)
    assert error(squared, expected) > 0.01


def test_a_column_of_rounding_is_null():
    x = np.array([[1.0, 1e-9], [2.0, -1e-9], [0.5, 1e-9]], np.float32)
    d, _ = solve(ng.qr(), x, np.array([1.0, 1e-9], np.float32), 0.0)
    assert abs(d[1]) < 1e-6

"""Functions of the Fisher matrix, in sample space and in parameter space."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(9)
METRIC = ng.gauss_newton(lambda params, x: x @ params)
GRADIENT = RNG.normal(size=5)
# Decomposed in sample space (three rows) and in parameter space (eight); rank three both.
ROWS = {
    "sample space": RNG.normal(size=(3, 5)),
    "parameter space": RNG.normal(size=(8, 3)) @ RNG.normal(size=(3, 5)),
}
both_spaces = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


def solve(gain, rows, damping):
    x = rows * len(rows) ** 0.5
    solver = ng.spectral(gain)
    return ng.natural_gradient_direction(
        METRIC, np.zeros(5), x, GRADIENT, solver=solver, damping=damping
    )


def function_of_fisher(rows, gain):
    values, vectors = scipy.linalg.eigh(rows.T @ rows)
    values[values < 1e-12 * values[-1]] = 0
    with np.errstate(divide="ignore"):
        gains = np.asarray(gain(values))
    gains = np.where(np.isfinite(gains) | (values > 0), gains, 0)
    return vectors @ (gains * (vectors.T @ GRADIENT))


@both_spaces
@pytest.mark.parametrize(
    "gain",
    [
        lambda h, damping: 1 / (h + damping),
        lambda h, damping: (h + damping) ** -0.5,
        lambda h, damping: jnp.where(h > damping, 1 / h, 1.0),
        lambda h, damping: 2.0,
    ],
    ids=["inverse", "root", "gradient in weak modes", "constant"],
)
def test_a_gain_acts_on_all_modes_null_ones_included(rows, gain):
    d, _ = solve(gain, rows, 0.3)
    expected = function_of_fisher(rows, lambda h: gain(h, 0.3))
    np.testing.assert_allclose(d, expected, atol=1e-9)


@both_spaces
def test_a_gain_that_is_not_finite_at_zero_counts_as_zero_there(rows):
    d, _ = solve(lambda h, damping: h**-1.5, rows, 0.0)
    np.testing.assert_allclose(d, function_of_fisher(rows, lambda h: h**-1.5), rtol=1e-7)


@both_spaces
def test_null_eigenvalues_reach_the_gain_as_exact_zeros(rows):
    d, _ = solve(lambda h, damping: jnp.where(h == 0, 1.0, 0.0), rows, 0.0)
    null = scipy.linalg.null_space(rows, rcond=1e-10)
    np.testing.assert_allclose(d, null @ (null.T @ GRADIENT), atol=1e-9)


@both_spaces
def test_residual_and_share_of_another_gain_are_those_of_its_direction(rows):
    d, info = solve(lambda h, damping: 1 / jnp.maximum(h, damping), rows, 0.3)
    d = np.asarray(d)
    residual = rows.T @ (rows @ d) + 0.3 * d - GRADIENT
    actual = np.linalg.norm(residual) / np.linalg.norm(GRADIENT)
    assert float(info.relative_residual) == pytest.approx(actual, rel=1e-5)
    null = scipy.linalg.null_space(rows, rcond=1e-10)
    share = np.linalg.norm(null.T @ d) / np.linalg.norm(d)
    assert float(info.outside_row_space) == pytest.approx(share, rel=1e-5)
    assert info.eigen_taken


def test_eigenvalues_of_a_hessian_keep_their_sign():
    metric = ng.hessian(lambda p, matrix: 0.5 * p @ (matrix @ p))
    rotation = scipy.linalg.qr(RNG.normal(size=(3, 3)))[0]
    matrix, g = rotation @ np.diag([2.0, -0.5, 1.0]) @ rotation.T, RNG.normal(size=3)
    direction = lambda gain: ng.natural_gradient_direction(
        metric, np.zeros(3), matrix, g, solver=ng.spectral(gain), damping=0.0
    )[0]
    np.testing.assert_allclose(direction(None), np.linalg.solve(matrix, g), rtol=1e-10)
    saddle_free = rotation @ np.diag([0.5, 2.0, 1.0]) @ rotation.T @ g
    np.testing.assert_allclose(direction(lambda h, _: 1 / jnp.abs(h)), saddle_free, rtol=1e-10)

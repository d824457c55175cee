"""Standard errors: digits in any units, noise by name, and no variance that means nothing."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

X = np.random.default_rng(0).normal(size=(30, 3))
LINE = ng.exact_fisher(lambda p, x: x @ p, ng.Normal(0.5))
RESIDUAL = ng.gauss_newton(lambda p, b: b[0] @ p - b[1])
Y = X @ np.array([1.0, -2.0, 0.5]) + np.random.default_rng(1).normal(size=30)


def least_squares(x, y):
    estimate = np.linalg.lstsq(x, y, rcond=None)[0]
    return estimate, np.sum((x @ estimate - y) ** 2) / (len(y) - x.shape[1])


@pytest.mark.parametrize("units", [(1.0, 1.0, 1.0), (1.0, 1e-9, 1e12)])
def test_units_of_parameters_cost_no_digits(units):
    x = X * np.array(units)
    covariance = ng.asymptotic_covariance(LINE, np.zeros(3), x, 30)
    expected = 0.25 * np.linalg.inv(X.T @ X) / np.outer(units, units)
    np.testing.assert_allclose(covariance, expected, rtol=1e-12)


def test_an_inverse_cut_in_the_parameters_own_units_has_no_digits():
    """The control."""
    x = X * np.array([1.0, 1e-9, 1e12])
    plain = np.linalg.pinv(x.T @ x, rcond=3e-16 * 3, hermitian=True)
    scales = np.array([1.0, 1e-9, 1e12])
    assert np.abs(np.diag(plain) * scales**2 / np.diag(np.linalg.inv(X.T @ X)) - 1).max() > 0.9


@pytest.mark.parametrize(("dtype", "gap"), [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_rows_are_not_squared(dtype, gap):
    """Two columns that differ by less than the root of eps, by Gram and Schmidt."""
    x = np.stack([X[:, 0], X[:, 0] + gap * X[:, 1]], 1).astype(dtype)
    covariance = ng.asymptotic_covariance(LINE, np.zeros(2, dtype), x, 30)
    first, second = x.astype(np.longdouble).T
    rest = second - first * (first @ second) / (first @ first)
    rest -= first * (first @ rest) / (first @ first)
    np.testing.assert_allclose(covariance[1, 1], 0.25 / (rest @ rest), rtol=1e-2)


def test_noise_is_given_or_estimated_by_name():
    estimate, s2 = least_squares(X, Y)
    inverse = np.linalg.inv(X.T @ X)
    for choice, expected in [("estimated", s2), (1.0, 1.0), (0.01, 0.01)]:
        covariance, info = ng.asymptotic_covariance(
            RESIDUAL, estimate, (X, Y), 30, noise_variance=choice, return_info=True
        )
        np.testing.assert_allclose(covariance, expected * inverse, rtol=1e-10)
        np.testing.assert_allclose(info.noise_variance, expected, rtol=1e-12)


def test_several_residuals_a_row_and_weights_count_as_they_should():
    both = ng.gauss_newton(lambda p, b: jnp.stack([b[0][:, 0] @ p, b[0][:, 1] @ p], 1) - b[1])
    pairs = (X.reshape(15, 2, 3), Y.reshape(15, 2))
    estimate, s2 = least_squares(X, Y)
    covariance = ng.asymptotic_covariance(both, estimate, pairs, 15, noise_variance="estimated")
    np.testing.assert_allclose(covariance, s2 * np.linalg.inv(X.T @ X), rtol=1e-10)
    # Weights that are inverse variances up to a factor, as statsmodels' WLS takes them.
    weights = np.linspace(1.0, 3.0, 30)
    metric = ng.gauss_newton(lambda p, b: b[0] @ p - b[1], weights=lambda b: jnp.asarray(weights))
    root = np.sqrt(weights)
    estimate, s2 = least_squares(root[:, None] * X, root * Y)
    covariance = ng.asymptotic_covariance(metric, estimate, (X, Y), 30, noise_variance="estimated")
    expected = s2 * np.linalg.inv(X.T @ (weights[:, None] * X))
    np.testing.assert_allclose(covariance, expected, rtol=1e-10)


def test_what_is_not_determined_is_named_and_counted():
    singular = np.concatenate([X, np.zeros((30, 1))], axis=1)
    with pytest.warns(UserWarning, match=r"do not determine params\[3\]: .* rank 3 of 4"):
        covariance = np.asarray(ng.asymptotic_covariance(LINE, np.zeros(4), singular, 30))
    np.testing.assert_allclose(covariance[:3, :3], 0.25 * np.linalg.inv(X.T @ X), rtol=1e-10)
    np.testing.assert_allclose(covariance[3], 0, atol=1e-12)

    model = ng.exact_fisher(lambda p, x: (p["a"] + p["b"]) * x[:, 0] + p["c"], ng.Normal())
    params = {name: jnp.zeros(()) for name in "abc"}
    with pytest.warns(UserWarning, match=r"params\['a'\], params\['b'\]: "):
        covariance = ng.asymptotic_covariance(model, params, X, 30)
    rows = np.stack([X[:, 0], X[:, 0], np.ones(30)], 1)
    np.testing.assert_allclose(covariance, np.linalg.pinv(rows.T @ rows), rtol=1e-8)


def test_inside_jit_the_record_tells():
    singular = np.concatenate([X, X[:, :1]], axis=1)
    ask = jax.jit(
        lambda x: ng.asymptotic_covariance(LINE, jnp.zeros(4), x, 30, return_info=True)[1]
    )
    info = ask(singular)
    assert info.rank == 3
    np.testing.assert_array_equal(info.determined, [False, True, True, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = ng.asymptotic_covariance(LINE, jnp.zeros(3), X, 30, return_info=True)[1]
    assert full.rank == 3 and np.all(full.determined)


def test_a_hessian_in_different_units_keeps_its_digits_and_its_sign():
    scales = np.array([1.0, 1e-8, 1e8])
    hessian = (X.T @ X) * np.outer(scales, scales)
    metric = ng.hessian(lambda p, batch: 0.5 * p @ jnp.asarray(hessian) @ p)
    covariance = ng.asymptotic_covariance(metric, jnp.zeros(3), None, 1)
    expected = np.linalg.inv(X.T @ X) / np.outer(scales, scales)
    np.testing.assert_allclose(covariance, expected, rtol=1e-10)
    saddle = ng.hessian(lambda p, batch: p[0] ** 2 - 2 * p[1] ** 2)
    covariance = ng.asymptotic_covariance(saddle, jnp.ones(2), None, 1)
    np.testing.assert_allclose(covariance, np.diag([0.5, -0.25]))


GROUPS = ng.gauss_newton(lambda p, b: {"in": p[0] * b["x"], "on": p[0] * b["y"]})


@pytest.mark.parametrize(
    ("metric", "batch", "keywords", "words"),
    [
        (RESIDUAL, (X, Y), {}, "residuals do not tell the variance of their noise"),
        (RESIDUAL, (X, Y), {"noise_variance": "known"}, "a number or \"estimated\", got 'known'"),
        (LINE, X, {"noise_variance": 1.0}, "exact_fisher holds the noise in its likelihood"),
        (RESIDUAL, (X[:3], Y[:3]), {"noise_variance": "estimated"}, "leave no degree of freedom"),
        (
            GROUPS,
            {"x": np.ones(4), "y": np.ones(3)},
            {"noise_variance": 1.0},
            r"groups of several sizes, \[3, 4\]",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(metric, batch, keywords, words):
    count = len(jax.tree.leaves(batch)[0])
    with pytest.raises(ValueError, match=f"asymptotic_covariance: .*{words}"):
        ng.asymptotic_covariance(metric, np.zeros(3), batch, count, **keywords)

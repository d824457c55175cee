"""Robust losses are those of scipy.optimize.least_squares, and so are their fits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

LOSSES = ("linear", "soft_l1", "huber", "cauchy")
RNG = np.random.default_rng(0)
T = np.linspace(0, 3, 40)
TRUTH = np.array([2.0, 1.3, 0.5])
Y = TRUTH[0] * np.exp(-TRUTH[1] * T) + TRUTH[2] + 0.05 * RNG.normal(size=40)
Y[::7] += np.array([3.0, 2.0, -4.0, 5.0, 2.5, 4.0])
BATCH = (T, Y)
START = np.array([1.0, 1.0, 0.0])


def curve(p, batch):
    return p[0] * jnp.exp(-p[1] * batch[0]) + p[2] - batch[1]


def scipy_fit(loss, scale):
    residual = lambda p: p[0] * np.exp(-p[1] * T) + p[2] - Y
    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-14}
    return scipy.optimize.least_squares(residual, START, loss=loss, f_scale=scale, **tight)


@pytest.mark.parametrize("name", LOSSES)
def test_value_gradient_and_metric_are_those_of_scipy(name):
    """The metric is the Gauss-Newton matrix without the second-order term of the loss."""
    scale, p = 0.3, jnp.asarray(START)
    loss = lambda p: ng.robust_loss(curve(p, BATCH), name, scale=scale)
    at_start = scipy.optimize.least_squares(
        lambda q: np.asarray(curve(q, BATCH)),
        START,
        jac=lambda q: np.asarray(jax.jacobian(curve)(q, BATCH)),
        loss=name,
        f_scale=scale,
        max_nfev=1,
    )
    np.testing.assert_allclose(loss(p), at_start.cost / 40, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(loss)(p), at_start.grad / 40, rtol=1e-8)
    z = (np.asarray(curve(p, BATCH)) / scale) ** 2
    weights = {
        "linear": np.ones(40),
        "soft_l1": (1 + z) ** -0.5,
        "huber": np.where(z > 1, z**-0.5, 1.0),
        "cauchy": 1 / (1 + z),
    }[name]
    jacobian = np.asarray(jax.jacobian(curve)(p, BATCH))
    metric = ng.gauss_newton(curve, loss=name, scale=scale)
    fisher = ng.fisher_matrix(metric, p, BATCH)
    np.testing.assert_allclose(fisher, jacobian.T @ (weights[:, None] * jacobian) / 40, rtol=1e-10)
    product = ng.fisher_vector_product(metric, p, BATCH, p)
    np.testing.assert_allclose(product, fisher @ p, rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_fits_with_outliers_are_those_of_scipy(name):
    metric = ng.gauss_newton(curve, loss=name, scale=0.1)
    loss = lambda p, batch: ng.robust_loss(curve(p, batch), name, scale=0.1)
    tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric)

    def step(carry):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p, BATCH), state, p, batch=BATCH, value_fn=loss)
        return optax.apply_updates(p, updates), state

    going = lambda carry: ~carry[1].info.converged & (carry[1].count < 300)
    start = jnp.asarray(START)
    fit, state = jax.jit(lambda p: jax.lax.while_loop(going, step, (p, tx.init(p))))(start)
    expected = scipy_fit(name, 0.1)
    assert state.info.converged
    np.testing.assert_allclose(fit, expected.x, rtol=1e-6)
    assert loss(fit, BATCH) <= expected.cost / 40 * (1 + 1e-12)
    # Squares, the control, are led astray.
    assert (np.abs(np.asarray(fit) / TRUTH - 1).max() < 0.25) == (name != "linear")


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_residuals_have_finite_losses_and_gradients(name):
    residual = jnp.array([0.0, 1e-12, 1.0, 1e100])
    value, slope = jax.value_and_grad(lambda r: ng.robust_loss(r, name))(residual)
    assert np.isfinite(value) and np.all(np.isfinite(slope))
    np.testing.assert_allclose(slope[:2] * 4, residual[:2], rtol=1e-12)


def test_weights_and_several_leaves_are_means_each():
    residual = {"a": jnp.array([[1.0, 2.0], [3.0, 0.5]]), "b": jnp.array([0.2, 4.0, 1.0])}
    weights = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([1.0, 0.0, 1.0])}
    huber = lambda r: np.where(r > 1, r - 0.5, r**2 / 2)
    expected = (1.0 * huber(1.0) + huber(2.0) + 3 * (huber(3.0) + huber(0.5))) / 4
    expected += (huber(0.2) + huber(1.0)) / 2
    np.testing.assert_allclose(ng.robust_loss(residual, "huber", weights=weights), expected)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [({"loss": "l2"}, "loss must be one of"), ({"scale": 0.0}, "scale must be positive, got 0.0")],
)
def test_what_is_no_loss_is_refused(keywords, words):
    with pytest.raises(ValueError, match=f"gauss_newton: {words}"):
        ng.gauss_newton(curve, **keywords)
    with pytest.raises(ValueError, match=f"robust_loss: {words}"):
        ng.robust_loss(jnp.ones(2), **{"loss": "huber", **keywords})


def test_standard_errors_of_a_robust_fit_are_refused():
    metric = ng.gauss_newton(curve, loss="huber")
    with pytest.raises(ValueError, match="robust loss is no multiple of the inverse"):
        ng.asymptotic_covariance(metric, START, BATCH, 40, noise_variance="estimated")

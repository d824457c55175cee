"""Impossible outcomes and extreme values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Bernoulli
from natgrad_jax.likelihoods import Categorical
from natgrad_jax.likelihoods import DiagonalNormal
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.likelihoods import Normal
from natgrad_jax.likelihoods import Poisson
from tests.test_likelihoods.facts import arrays
from tests.test_likelihoods.facts import dense
from tests.test_likelihoods.oracles import categorical_information

INF = float("inf")


@functools.partial(jax.jit, static_argnums=0)
def everything(likelihood, z, v, y):
    """All that a likelihood computes from outputs z, with derivatives along v."""
    total = lambda z: jnp.sum(likelihood.log_prob(z, y))
    divergence = lambda p, q: jnp.sum(likelihood.kl(p, q))
    gradients = jax.grad(divergence, argnums=(0, 1))
    return {
        "log_prob": likelihood.log_prob(z, y),
        "score": jax.grad(total)(z),
        "curvature": jax.jvp(jax.grad(total), (z,), (v,))[1],
        "fisher": likelihood.fisher_product(z, v),
        "factor": likelihood.fisher_factor_product(z, v),
        "default_fisher": Likelihood.fisher_product(likelihood, z, v),
        "default_factor": Likelihood.fisher_factor_product(likelihood, z, v),
        "kl": likelihood.kl(z, z),
        "kl_jvp": jax.jvp(divergence, (z, z), (v, v))[1],
        "kl_gradients": gradients(z, z),
        "kl_hessian": jax.jvp(gradients, (z, z), (v, v))[1],
        "sample": likelihood.sample(jax.random.key(0), z).astype(jnp.float32),
    }


def assert_finite(results):
    for name, result in results.items():
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result)), name


def test_forbidden_classes():
    """A logit of -inf is no class; a row of nothing else (padding) has no mass."""
    z = np.array(
        [
            [0.5, -INF, 1.0],
            [-INF, 2.0, -INF],
            [0.0, 1e4, -1e4],
            [3e38, -3e38, -INF],
            [-INF, -INF, -INF],
        ]
    )
    y, v = jnp.array([0, 1, 1, 0, 0]), np.random.default_rng(0).normal(size=z.shape)
    results = everything(Categorical(), *arrays((z, v), jnp.float32), y)
    log_prob = np.asarray(results.pop("log_prob"))
    assert_finite(results)
    np.testing.assert_allclose(log_prob, [-np.logaddexp(0, 0.5), 0, 0, 0, -INF], rtol=1e-6)
    fisher, p = categorical_information(z[:4]), scipy.special.softmax(z[:4], axis=-1)
    expected = {
        "score": np.eye(3)[y[:4]] - p,
        "curvature": -np.einsum("nkl,nl->nk", fisher, v[:4]),
        "fisher": np.einsum("nkl,nl->nk", fisher, v[:4]),
        "default_fisher": np.einsum("nkl,nl->nk", fisher, v[:4]),
        "factor": np.sqrt(p) * v[:4] - p * np.sum(np.sqrt(p) * v[:4], axis=-1, keepdims=True),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(results[name][:4], value, atol=1e-6, err_msg=name)
    for name in ("fisher", "factor", "default_fisher", "default_factor", "curvature", "kl"):
        assert not np.any(np.asarray(results[name][4])), name
    draw = jax.jit(Categorical().sample)(jax.random.key(0), jnp.tile(jnp.asarray(z), (500, 1)))
    assert not np.any(np.asarray(draw[0::5]) == 1) and np.all(np.asarray(draw[1::5]) == 1)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "log_prob"),
    [
        (
            Bernoulli(),
            [-INF, INF, 1e4, -1e4, 0.0],
            [0.0, 1.0, 1.0, 0.0, 0.5],
            [0, 0, 0, 0, -0.693147],
        ),
        (Poisson(), [-INF, -1e4, 0.0], [0, 0, 2], [0, 0, -1.693147]),
    ],
    ids=["bernoulli", "poisson"],
)
def test_certain_outcomes(likelihood, outputs, targets, log_prob):
    z = jnp.asarray(outputs)
    results = everything(likelihood, z, jnp.ones_like(z), jnp.asarray(targets))
    assert_finite(results)
    np.testing.assert_allclose(results["log_prob"], log_prob, atol=1e-6)
    np.testing.assert_allclose(results["fisher"], results["default_fisher"], atol=1e-6)


def test_divergence_from_what_q_forbids_is_infinite():
    p, q = jnp.array([[0.0, 0.0, -INF]]), jnp.array([[0.0, -INF, 0.0]])
    divergence = lambda p, q: jnp.sum(Categorical().kl(p, q))
    value, gradient = jax.jit(jax.value_and_grad(divergence, argnums=1))(p, q)
    assert value == INF
    np.testing.assert_allclose(gradient, [[0.0, -0.5, 0.5]], atol=1e-6)
    zero, one = jnp.zeros((1,)), jnp.ones((1,))
    assert jax.jit(Bernoulli().kl)(zero, INF * one)[0] == INF
    assert jax.jit(Poisson().kl)(zero, -INF * one)[0] == INF
    np.testing.assert_allclose(jax.jit(Poisson().kl)(-INF * one, zero), 1.0)


def test_gradient_of_a_far_divergence():
    """Rates e^-80 and e^20, whose ratio is beyond float32."""
    divergence = lambda p, q: jnp.sum(Poisson().kl(p, q))
    p, q = jnp.full((1,), -80.0), jnp.full((1,), 20.0)
    in_p, in_q = jax.jit(jax.grad(divergence, argnums=(0, 1)))(p, q)
    np.testing.assert_allclose(in_p, -100 * np.exp(-80.0), rtol=1e-4)
    np.testing.assert_allclose(in_q, np.exp(20.0), rtol=1e-5)


def test_wrong_labels_give_nan_and_not_another_class():
    log_prob = Categorical().log_prob(jnp.zeros((3, 2)), jnp.array([-1, 2, 1]))
    assert np.isnan(log_prob).tolist() == [True, True, False]


def test_extreme_log_probabilities_are_exact():
    z = np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4 + 1]])
    got = Categorical().log_prob(jnp.asarray(z), jnp.array([2, 0]))
    np.testing.assert_allclose(
        got, scipy.special.log_softmax(z, axis=-1)[[0, 1], [2, 0]], rtol=1e-6
    )
    got = Bernoulli().log_prob(jnp.array([1e4, -1e4]), jnp.array([0, 1]))
    np.testing.assert_allclose(got, [-1e4, -1e4])


def test_confident_predictions_keep_their_information():
    """In float32 to relative precision, where p v - p (p . v) is all rounding."""
    z = np.array([[0.0, 18.0, -4.0]])
    expected = np.asarray(categorical_information(z)[0])
    # diag(p) - p p^T cancels for the likeliest class in float64 too: rows sum to zero.
    expected[1, 1] = expected[0, 0] + expected[2, 2] + 2 * expected[0, 2]
    outputs = jnp.asarray(z, jnp.float32)
    matrix = lambda product: np.asarray(jax.jit(lambda z: dense(product, z))(outputs)[0], float)
    np.testing.assert_allclose(matrix(Categorical().fisher_product), expected, rtol=1e-5)
    factor = matrix(Categorical().fisher_factor_product)
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-5)
    p = np.asarray(jax.nn.softmax(outputs))[0]
    assert abs((p[1] - p[1] * p[1]) / expected[1, 1] - 1) > 0.5
    coin = Bernoulli().fisher_product(jnp.full((1,), 18.0), jnp.ones((1,)))
    np.testing.assert_allclose(coin, np.exp(-18.0), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_extreme_scales(scale):
    z, v = jnp.array([1.0]), jnp.array([1.0])
    pair, zero = (z, jnp.log(jnp.array([scale]))), jnp.zeros((1,))
    np.testing.assert_allclose(Normal(scale).fisher_product(z, v), scale**-2, rtol=1e-5)
    np.testing.assert_allclose(Normal(scale).fisher_factor_product(z, v), 1 / scale, rtol=1e-5)
    np.testing.assert_allclose(
        DiagonalNormal().fisher_product(pair, (v, zero))[0], scale**-2, rtol=1e-4
    )
    expected = scipy.stats.norm.logpdf(scale, 0, scale)
    got = Normal(scale).log_prob(jnp.zeros((1,)), jnp.array([scale]))
    np.testing.assert_allclose(got, expected, rtol=1e-5)

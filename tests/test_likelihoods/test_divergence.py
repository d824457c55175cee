"""KL divergences: A3 in output space, against enumeration and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_likelihoods.facts import CASES
from tests.test_likelihoods.facts import arrays
from tests.test_likelihoods.facts import every_divergence
from tests.test_likelihoods.facts import facts
from tests.test_likelihoods.facts import flat
from tests.test_likelihoods.facts import other

INF = float("inf")


@every_divergence
def test_kl_is_the_mean_log_ratio(name, x64):
    _, p, log_prob, support, *_ = CASES[name]
    targets, weights = support(p)
    with np.errstate(invalid="ignore"):  # where neither allows a target
        ratios = [log_prob(p, y) - log_prob(other(p), y) for y in targets]
    ratios = np.where(weights > 0, ratios, 0)
    divergence = facts(name)["kl"]
    np.testing.assert_allclose(divergence, np.sum(weights * ratios, axis=0), rtol=1e-10)
    assert np.all(divergence > 0)
    if "normal" not in name:
        assert np.abs(facts(name)["reverse_kl"] / divergence - 1).max() > 1e-3  # not symmetric


@every_divergence
@pytest.mark.parametrize("argument", ["in_p", "in_q"])
def test_hessian_of_kl_is_the_fisher_matrix(name, argument, x64):
    """A3, either direction; value and gradient are zero at equality."""
    value, gradient, hessian, elsewhere = facts(name)[argument]
    fisher = CASES[name].information(CASES[name].outputs)
    assert np.abs(value).max() < 1e-15
    assert np.abs(gradient).max() < 1e-14
    np.testing.assert_allclose(hessian, fisher, atol=1e-13)
    if name not in ("normal", "normal_scales"):
        assert np.abs(elsewhere - fisher).max() > 1e-2


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "diagonal_normal"])
def test_small_divergences_keep_their_digits_in_float32(name):
    _, p, _, _, information, _ = CASES[name]
    shift = lambda z: 1e-3 * np.cos(9 * z + np.arange(z.size).reshape(z.shape))
    p, q = arrays((p, jax.tree.map(lambda z: z + shift(z), p)))
    exact = lambda tree: jax.tree.map(lambda z: np.asarray(z, float), tree)
    step = np.asarray(flat(jax.tree.map(np.subtract, exact(q), exact(p))))
    expected = np.einsum("nk,nkl,nl->n", step, information(exact(p)), step) / 2
    got = np.asarray(jax.jit(CASES[name].likelihood.kl)(p, q))
    np.testing.assert_allclose(got, expected, rtol=5e-3)
    if name == "categorical":
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        plain = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
        assert np.max(np.abs(plain / expected - 1)) > 2e-2

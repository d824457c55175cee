"""Probabilities and samples against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Bernoulli
from tests.test_likelihoods.facts import CASES
from tests.test_likelihoods.facts import arrays
from tests.test_likelihoods.facts import draws
from tests.test_likelihoods.facts import every_case
from tests.test_likelihoods.facts import facts
from tests.test_likelihoods.oracles import LOGITS
from tests.test_likelihoods.oracles import SCALARS

INF = float("inf")


@every_case
def test_log_prob_is_that_of_scipy(name, x64):
    targets, _ = CASES[name].support(CASES[name].outputs)
    expected = np.stack([CASES[name].log_prob(CASES[name].outputs, y) for y in targets])
    np.testing.assert_allclose(facts(name)["log_probs"], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "binomial", "ordinal"])
def test_probabilities_sum_to_one(name, x64):
    np.testing.assert_allclose(np.exp(facts(name)["log_probs"]).sum(0), 1.0, rtol=1e-12)
    assert np.abs(np.exp(facts(name)["log_probs"][1:]).sum(0) - 1).max() > 0.1


@pytest.mark.parametrize("name", ["normal", "normal_scales", "diagonal_normal"])
def test_densities_integrate_to_one(name, x64):
    grid, step = np.linspace(-60, 60, 3001, retstep=True)
    outputs = arrays(CASES[name].outputs)
    log_prob = jax.jit(jax.vmap(lambda y: CASES[name].likelihood.log_prob(outputs, y)))
    density = np.exp(log_prob(jnp.asarray(np.tile(grid[:, None], 3))))
    np.testing.assert_allclose(density.sum(0) * step, 1.0, rtol=1e-12)


def test_fractional_targets_give_the_cross_entropy(x64):
    y, p = np.array([0.0, 0.3, 1.0]), scipy.special.expit(SCALARS)
    got = Bernoulli().log_prob(jnp.asarray(SCALARS), jnp.asarray(y))
    np.testing.assert_allclose(got, y * np.log(p) + (1 - y) * np.log1p(-p), rtol=1e-12)


@every_case
def test_samples_follow_the_distribution(name):
    targets, weights = CASES[name].support(CASES[name].outputs)
    samples, _ = draws(name)
    for power in (1, 2):
        mean = (weights * targets**power).sum(0)
        deviation = np.sqrt((weights * targets ** (2.0 * power)).sum(0) - mean**2)
        limit = 4.5 * deviation / np.sqrt(len(samples))
        error = (samples**power).mean(0) - mean
        assert np.all(np.abs(error) < limit)
        # Another row's distribution is far outside.
        assert np.any(np.abs(error + mean - np.roll(mean, 1)) > 5 * limit)


def test_categorical_frequencies():
    samples, _ = draws("categorical")
    for drawn, p in zip(samples.T, scipy.special.softmax(LOGITS, axis=-1), strict=True):
        counts = np.bincount(drawn.astype(int), minlength=4)
        assert scipy.stats.chisquare(counts, p * len(drawn)).pvalue > 1e-3

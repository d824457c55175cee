"""The Fisher matrix of a row: A2, A8, A9 and A11 in output space."""

import jax.numpy as jnp
import numpy as np

from natgrad_jax.likelihoods import Normal
from tests.test_likelihoods.facts import CASES
from tests.test_likelihoods.facts import draws
from tests.test_likelihoods.facts import every_case
from tests.test_likelihoods.facts import every_divergence
from tests.test_likelihoods.facts import facts
from tests.test_likelihoods.facts import transposed
from tests.test_likelihoods.oracles import LOGITS
from tests.test_likelihoods.oracles import SCALARS
from tests.test_likelihoods.oracles import categorical_information

INF = float("inf")


@every_case
def test_score_has_zero_mean(name, x64):
    weights, scores = facts(name)["weights"], facts(name)["scores"]
    assert np.abs(np.einsum("sn,snk->nk", weights, scores)).max() < 1e-12
    # Not so under weights that the likelihood does not give.
    assert np.abs(np.einsum("sn,snk->nk", np.roll(weights, 1, axis=0), scores)).max() > 0.1


@every_case
def test_fisher_product_is_the_covariance_of_the_score(name, x64):
    """A2, A8 and A9."""
    scores = facts(name)["scores"]
    fisher = np.einsum("sn,snk,snl->nkl", facts(name)["weights"], scores, scores)
    got, expected = facts(name)["fisher"], CASES[name].information(CASES[name].outputs)
    np.testing.assert_allclose(got, fisher, atol=1e-12)
    np.testing.assert_allclose(got, expected, atol=1e-14)
    empirical = np.einsum("nk,nl->nkl", scores[0], scores[0])
    assert np.abs(empirical - fisher).max() > 0.1


@every_case
def test_fisher_product_is_minus_the_mean_hessian(name, x64):
    fisher = CASES[name].information(CASES[name].outputs)
    np.testing.assert_allclose(facts(name)["mean_hessian"], -fisher, atol=1e-12)


def test_fisher_of_a_fixed_variance_scales_as_its_inverse(x64):
    """A9."""
    z = jnp.asarray(SCALARS)
    one, two = (Normal(scale).fisher_product(z, z) for scale in (1.0, 2.0))
    np.testing.assert_allclose(one, 4 * two, rtol=1e-14)


@every_case
def test_factor_times_its_transpose_is_the_fisher_matrix(name, x64):
    factor = facts(name)["factor"]
    fisher = CASES[name].information(CASES[name].outputs)
    np.testing.assert_allclose(factor @ transposed(factor), fisher, atol=1e-14)


def test_the_other_order_is_not_the_fisher_matrix(x64):
    """E2: B^T B = M for equal class probabilities only."""
    factor = facts("categorical")["factor"]
    wrong = transposed(factor) @ factor
    error = np.abs(wrong - categorical_information(LOGITS)).max((1, 2))
    assert error[1] < 1e-14 < 0.05 < min(error[0], error[2])


@every_case
def test_sampled_scores_average_to_the_fisher_matrix(name):
    """A11: at the Monte Carlo rate."""
    _, scores = draws(name)
    fisher = CASES[name].information(CASES[name].outputs)
    errors = scores[..., None] * scores[..., None, :] - fisher
    deviation = np.sqrt((errors**2).mean(0))
    assert np.all(np.abs(errors.mean(0)) <= 5 * deviation / np.sqrt(len(errors)) + 1e-6)
    of_means = lambda n: np.sqrt((errors.reshape(-1, n, *fisher.shape).mean(1) ** 2).mean())
    assert 7 < of_means(4) / of_means(400) < 14  # sqrt(400 / 4) = 10


@every_divergence
def test_defaults_by_autodiff_are_the_closed_forms(name, x64):
    fisher, factor = CASES[name].information(CASES[name].outputs), facts(name)["default_factor"]
    np.testing.assert_allclose(facts(name)["default_fisher"], fisher, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(factor @ transposed(factor), fisher, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(factor, transposed(factor), rtol=1e-13, atol=1e-13)
    if name == "categorical":
        assert np.abs(factor - facts(name)["factor"]).max() > 0.05  # it is another factor

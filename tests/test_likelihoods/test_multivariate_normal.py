"""A Gaussian vector of any covariance against scipy and dense formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from natgrad_jax.likelihoods import DiagonalNormal
from natgrad_jax.likelihoods import MultivariateNormal
from tests.test_likelihoods.facts import Hidden
from tests.test_likelihoods.facts import dense
from tests.test_likelihoods.facts import transposed

MEAN = np.array([[0.4, -1.0, 0.2], [1.3, 0.0, -0.5]])
FACTOR = np.random.default_rng(0).normal(size=(2, 3, 3))
NORMAL = MultivariateNormal()


def lower(factor):
    return jnp.tril(factor, -1) + jnp.diag(jnp.exp(jnp.diagonal(factor)))


def covariance(factor):
    return lower(factor) @ lower(factor).T


def information(mean, factor):
    """dm^T S^-1 dm + tr(S^-1 dS S^-1 dS) / 2 in the mean and all nine entries of the factor."""
    inverse = np.linalg.inv(covariance(factor))
    slopes = np.asarray(jax.jacfwd(covariance)(factor)).reshape(3, 3, 9)
    products = np.einsum("ij,jka->ika", inverse, slopes)
    matrix = np.zeros((12, 12))
    matrix[:3, :3] = inverse
    matrix[3:, 3:] = np.einsum("ika,kib->ab", products, products) / 2
    return matrix


def test_log_prob_is_that_of_scipy(x64):
    y = np.array([[0.1, 0.2, 0.3], [-2.0, 0.4, 1.0]])
    pairs = zip(MEAN, FACTOR, y, strict=True)
    expected = [scipy.stats.multivariate_normal(m, covariance(a)).logpdf(v) for m, a, v in pairs]
    np.testing.assert_allclose(NORMAL.log_prob((MEAN, FACTOR), y), expected, rtol=1e-12)


def test_fisher_matrix_its_factor_and_the_hessian_of_kl(x64):
    z = jnp.asarray(MEAN), jnp.asarray(FACTOR)
    expected = np.stack([information(m, a) for m, a in zip(MEAN, FACTOR, strict=True)])
    by_default = Hidden(NORMAL).fisher_product
    products = NORMAL.fisher_product, by_default, NORMAL.fisher_factor_product
    fisher, default, factor = jax.jit(lambda z: [dense(f, z) for f in products])(z)
    np.testing.assert_allclose(fisher, expected, atol=1e-10)
    np.testing.assert_allclose(default, expected, atol=1e-10)
    np.testing.assert_allclose(factor @ transposed(factor), expected, atol=1e-10)


def test_kl_is_the_formula(x64):
    q = MEAN[::-1] + 0.1, FACTOR[::-1]
    found = NORMAL.kl((MEAN, FACTOR), q)
    for n in range(2):
        one, two = covariance(FACTOR[n]), covariance(q[1][n])
        shift = q[0][n] - MEAN[n]
        inverse = np.linalg.inv(two)
        trace = np.trace(inverse @ one) + shift @ inverse @ shift - 3
        expected = 0.5 * (trace + np.linalg.slogdet(two)[1] - np.linalg.slogdet(one)[1])
        np.testing.assert_allclose(found[n], expected, rtol=1e-11)


def test_samples_have_mean_and_covariance():
    repeat = lambda x: jnp.tile(jnp.float32(x[:1]), (20_000,) + (1,) * (x.ndim - 1))
    z = repeat(MEAN), repeat(FACTOR)
    drawn = np.asarray(NORMAL.sample(jax.random.key(0), z))
    wanted = np.asarray(covariance(FACTOR[0]))
    scale = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert np.all(np.abs(drawn.mean(0) - MEAN[0]) < 5 * np.sqrt(np.diag(wanted) / 20_000))
    assert np.all(np.abs(np.cov(drawn.T) - wanted) < 7 * scale / np.sqrt(20_000))


def test_one_dimension_is_a_diagonal_normal(x64):
    mean, scale, y = (np.array(x) for x in ([[0.3], [1.0]], [[-0.5], [2.0]], [[1.0], [-3.0]]))
    found = NORMAL.log_prob((mean, scale[..., None]), y)
    np.testing.assert_allclose(found, DiagonalNormal().log_prob((mean, scale), y), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2), (2, 2, 3, 3)])
def test_a_factor_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"MultivariateNormal.kl: mean.*needs a factor"):
        NORMAL.kl((MEAN, np.zeros(shape)), (MEAN, FACTOR))

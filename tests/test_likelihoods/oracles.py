"""Likelihoods beside what numpy and scipy say about them, in output space."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Bernoulli
from natgrad_jax.likelihoods import Categorical
from natgrad_jax.likelihoods import DiagonalNormal
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.likelihoods import Normal
from natgrad_jax.likelihoods import Poisson


class Case(NamedTuple):
    """A likelihood, three rows of outputs, and what numpy and scipy say about it.

    `support(z)` gives targets and weights, both (S, N), with sum_s w_s f(y_s) = E[f(y)] for the
    functions of interest: all outcomes of a discrete likelihood, quadrature nodes of a density.
    """

    likelihood: Likelihood
    outputs: Any
    log_prob: Callable[[Any, np.ndarray], np.ndarray]
    support: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    information: Callable[[Any], np.ndarray]
    has_kl: bool = True


def outcomes(number, pmf):
    def support(z):
        y = np.tile(np.arange(number)[:, None], len(z))
        return y, pmf(z, y)

    return support


def categorical_pmf(z, y):
    return np.take_along_axis(scipy.special.softmax(z, axis=-1), np.atleast_2d(y).T, axis=-1).T


def bernoulli_pmf(z, y):
    return scipy.stats.bernoulli.pmf(y, scipy.special.expit(z))


def hermite(mean, scale):
    x, w = np.polynomial.hermite.hermgauss(20)
    y = mean + np.sqrt(2) * scale * x[:, None]
    return y, np.tile(w[:, None] / np.sqrt(np.pi), len(mean))


def diagonals(*columns):
    return np.stack([np.diag(row) for row in np.stack(columns, axis=-1)])


def categorical_information(z):
    p = scipy.special.softmax(z, axis=-1)
    return np.stack([np.diag(row) - np.outer(row, row) for row in p])


LOGITS = np.array([[0.2, -1.3, 2.0, 0.1], [0.0, 0.0, 0.0, 0.0], [3.0, -4.0, 1.0, -0.5]])
SCALARS = np.array([0.4, -1.7, 1.2])
SCALES = np.array([0.5, 2.0, 1.5])

CASES = {
    "categorical": Case(
        Categorical(),
        LOGITS,
        lambda z, y: np.log(categorical_pmf(z, y))[0],
        outcomes(4, categorical_pmf),
        categorical_information,
    ),
    "bernoulli": Case(
        Bernoulli(),
        SCALARS,
        lambda z, y: scipy.stats.bernoulli.logpmf(y, scipy.special.expit(z)),
        outcomes(2, bernoulli_pmf),
        lambda z: diagonals(scipy.stats.bernoulli.var(scipy.special.expit(z))),
    ),
    "poisson": Case(
        Poisson(),
        SCALARS,
        lambda z, y: scipy.stats.poisson.logpmf(y, np.exp(z)),
        outcomes(50, lambda z, y: scipy.stats.poisson.pmf(y, np.exp(z))),
        lambda z: diagonals(scipy.stats.poisson.var(np.exp(z))),
    ),
    "normal": Case(
        Normal(),
        SCALARS,
        lambda z, y: scipy.stats.norm.logpdf(y, z),
        lambda z: hermite(z, 1.0),
        lambda z: diagonals(np.ones_like(z)),
    ),
    "normal_scales": Case(
        Normal(scale=SCALES),
        SCALARS,
        lambda z, y: scipy.stats.norm.logpdf(y, z, SCALES),
        lambda z: hermite(z, SCALES),
        lambda z: diagonals(1 / SCALES**2),
    ),
    "diagonal_normal": Case(
        DiagonalNormal(),
        (SCALARS, np.array([-0.6, 0.3, 0.9])),
        lambda z, y: scipy.stats.norm.logpdf(y, z[0], np.exp(z[1])),
        lambda z: hermite(z[0], np.exp(z[1])),
        lambda z: diagonals(np.exp(-2 * z[1]), np.full_like(z[1], 2)),
    ),
}

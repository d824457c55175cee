"""The table of likelihoods, continued: families of regression, each with a constant a row."""

import numpy as np
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Beta
from natgrad_jax.likelihoods import Binomial
from natgrad_jax.likelihoods import Gamma
from natgrad_jax.likelihoods import NegativeBinomial
from natgrad_jax.likelihoods import Ordinal
from natgrad_jax.likelihoods import StudentT
from tests.test_likelihoods.oracles import SCALARS
from tests.test_likelihoods.oracles import Case
from tests.test_likelihoods.oracles import diagonals
from tests.test_likelihoods.oracles import outcomes

TRIALS = np.array([3, 10, 25])
DISPERSIONS = np.array([0.3, 2.0, 1.0])
SHAPES = np.array([0.8, 3.0, 5.0])
PRECISIONS = np.array([6.0, 20.0, 9.0])
DEGREES = np.array([5.0, 9.0, 30.0])
SCALES = np.array([-0.6, 0.3, 0.9])
CUTPOINTS = np.array([[-0.5, 0.1, -0.7], [0.3, -1.0, 0.5], [-1.2, 0.8, 0.2]])


def grid(of_point, slope, density, end, number=600):
    """The trapezoidal rule along y = of_point(u), with weights p(y) dy: exact for what decays."""
    u = np.linspace(-end, end, number)[:, None]
    y = of_point(u)
    weights = density(y) * slope(u, y) * (u[1] - u[0])
    return np.broadcast_to(y, weights.shape), weights


def trigamma(x):
    return scipy.special.polygamma(1, x)


def matrices(*rows):
    """Symmetric matrices (N, K, K) from their entries, each (N,) or a number."""
    number = max(np.size(x) for row in rows for x in row)
    full = [[np.broadcast_to(x, (number,)) for x in row] for row in rows]
    return np.moveaxis(np.array(full, float), -1, 0)


def binomial(z, y):
    return scipy.stats.binom(TRIALS, scipy.special.expit(z)).logpmf(y)


def negative_binomial(z, y, dispersion=DISPERSIONS):
    r = 1 / dispersion
    return scipy.stats.nbinom(r, r / (r + np.exp(z))).logpmf(y)


def counts(log_pmf):
    return outcomes(600, lambda z, y: np.exp(log_pmf(z, y)))


def of_mean(z, dispersion=DISPERSIONS):
    return np.exp(z) / (1 + dispersion * np.exp(z))


def of_dispersion(z):
    """Lawless, 1987: minus the mean second derivative, by a sum over counts, in log dispersion."""
    mu, r = np.exp(z[0]), np.exp(-z[1])
    y, p = counts(lambda z, y: negative_binomial(z[0], y, np.exp(z[1])))(Pair(z))
    return r**2 * (np.sum(p * (trigamma(r) - trigamma(r + y)), axis=0) - mu / (r * (r + mu)))


class Pair(tuple):
    """Outputs of several leaves, whose length is the number of rows."""

    __slots__ = ()

    def __len__(self):
        return len(self[0])


def gamma(z, y, shape=SHAPES):
    return scipy.stats.gamma(shape, scale=np.exp(z) / shape).logpdf(y)


def beta(z, y, precision=PRECISIONS):
    mean = scipy.special.expit(z)
    return scipy.stats.beta(mean * precision, (1 - mean) * precision).logpdf(y)


def beta_information(z, precision=PRECISIONS):
    """J^T M J of the information in (a, b), J being the derivative of (a, b) in the outputs."""
    mean = scipy.special.expit(z)
    a, b = mean * precision, (1 - mean) * precision
    joint = trigamma(precision)
    of_ends = matrices([trigamma(a) - joint, -joint], [-joint, trigamma(b) - joint])
    slope = precision * mean * (1 - mean)
    jacobian = matrices([slope, a], [-slope, b])
    return np.swapaxes(jacobian, -1, -2) @ of_ends @ jacobian


def student(z, y, df=DEGREES):
    return scipy.stats.t(df, z[0], np.exp(z[1])).logpdf(y)


def student_information(z, df=DEGREES):
    """Lange, Little and Taylor, 1989, appendix B, in (location, log scale, log df)."""
    location = (df + 1) / (df + 3) * np.exp(-2 * z[1])
    scale, mixed = 2 * df / (df + 3), -2 * df / ((df + 1) * (df + 3))
    of_df = (trigamma(df / 2) - trigamma((df + 1) / 2)) / 4
    of_df = df**2 * (of_df - (df + 5) / (2 * df * (df + 1) * (df + 3)))
    return matrices([location, 0, 0], [0, scale, mixed], [0, mixed, of_df])


def student_grid(z, df=DEGREES):
    scale = np.exp(z[1])
    slope = lambda u, y: scale * np.cosh(u)
    density = lambda y: np.exp(student(z, y, df))
    return grid(lambda u: z[0] + scale * np.sinh(u), slope, density, 18, number=300)


def ordinal_parts(z):
    """Probabilities of K classes, (N, K), and their derivatives in the K outputs, (N, K, K)."""
    gaps = np.exp(z[1][:, 1:])
    a = np.cumsum(np.concatenate([z[1][:, :1], gaps], axis=1), axis=1) - z[0][:, None]
    cumulative = scipy.special.expit(a)
    # d a_k / d (location, c_0, c_1, ...)
    steps = np.concatenate([-np.ones((3, 1)), np.ones((3, 1)), gaps], axis=1)[:, None, :]
    reach = np.concatenate([np.ones((3, 1)), np.tril(np.ones((3, 3)))], axis=1)
    slopes = (cumulative * (1 - cumulative))[..., None] * steps * reach
    ends = np.zeros((3, 1)), np.ones((3, 1))
    p = np.diff(np.concatenate([ends[0], cumulative, ends[1]], axis=1), axis=1)
    nothing = np.zeros((3, 1, 4))
    return p, np.diff(np.concatenate([nothing, slopes, nothing], axis=1), axis=1)


def ordinal_pmf(z, y):
    return np.take_along_axis(ordinal_parts(z)[0], np.atleast_2d(y).T, axis=1).T


def ordinal_information(z):
    p, slopes = ordinal_parts(z)
    return np.einsum("nk,nki,nkj->nij", 1 / p, slopes, slopes)


def own(u, y):
    return y


def logistic(u, y):
    return y * (1 - y)


def exponentials(z):
    return np.exp(z[1])


CASES = {
    "binomial": Case(
        Binomial(TRIALS),
        SCALARS,
        binomial,
        outcomes(26, lambda z, y: np.exp(binomial(z, y))),
        lambda z: diagonals(TRIALS * scipy.stats.bernoulli.var(scipy.special.expit(z))),
    ),
    "negative_binomial": Case(
        NegativeBinomial(DISPERSIONS),
        SCALARS,
        negative_binomial,
        counts(negative_binomial),
        lambda z: diagonals(of_mean(z)),
    ),
    "negative_binomial_dispersion": Case(
        NegativeBinomial(),
        (SCALARS, np.log(DISPERSIONS)),
        lambda z, y: negative_binomial(z[0], y, exponentials(z)),
        lambda z: counts(lambda z, y: negative_binomial(z[0], y, exponentials(z)))(Pair(z)),
        lambda z: diagonals(of_mean(z[0], exponentials(z)), of_dispersion(z)),
        has_kl=False,
    ),
    "gamma": Case(
        Gamma(SHAPES),
        SCALARS,
        gamma,
        lambda z: grid(lambda u: np.exp(z + u), own, lambda y: np.exp(gamma(z, y)), 50),
        lambda z: diagonals(SHAPES),
    ),
    "gamma_shape": Case(
        Gamma(),
        (SCALARS, np.log(SHAPES)),
        lambda z, y: gamma(z[0], y, exponentials(z)),
        lambda z: grid(
            lambda u: np.exp(z[0] + u), own, lambda y: np.exp(gamma(z[0], y, exponentials(z))), 50
        ),
        lambda z: diagonals(
            exponentials(z), exponentials(z) ** 2 * trigamma(exponentials(z)) - exponentials(z)
        ),
    ),
    "beta": Case(
        Beta(PRECISIONS),
        SCALARS / 2,
        beta,
        lambda z: grid(scipy.special.expit, logistic, lambda y: np.exp(beta(z, y)), 20),
        lambda z: beta_information(z)[:, :1, :1],
    ),
    "beta_precision": Case(
        Beta(),
        (SCALARS / 2, np.log(PRECISIONS)),
        lambda z, y: beta(z[0], y, exponentials(z)),
        lambda z: grid(
            scipy.special.expit, logistic, lambda y: np.exp(beta(z[0], y, exponentials(z))), 20
        ),
        lambda z: beta_information(z[0], exponentials(z)),
    ),
    "student_t": Case(
        StudentT(DEGREES),
        (SCALARS, SCALES),
        student,
        student_grid,
        lambda z: student_information(z)[:, :2, :2],
        has_kl=False,
    ),
    "student_t_df": Case(
        StudentT(),
        (SCALARS, SCALES, np.log(DEGREES)),
        lambda z, y: student(z, y, np.exp(z[2])),
        lambda z: student_grid(z, np.exp(z[2])),
        lambda z: student_information(z, np.exp(z[2])),
        has_kl=False,
    ),
    "ordinal": Case(
        Ordinal(),
        (SCALARS, CUTPOINTS),
        lambda z, y: np.log(ordinal_pmf(z, y))[0],
        lambda z: (np.tile(np.arange(4)[:, None], 3), ordinal_parts(z)[0].T),
        ordinal_information,
    ),
}

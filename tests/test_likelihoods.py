"""Likelihoods against scipy, enumeration and quadrature: A2, A3, A8, A9, A11 in output space."""

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Bernoulli
from natgrad_jax.likelihoods import Categorical
from natgrad_jax.likelihoods import DiagonalNormal
from natgrad_jax.likelihoods import Joint
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.likelihoods import Normal
from natgrad_jax.likelihoods import Poisson
from natgrad_jax.likelihoods import from_distribution

INF = float("inf")
METHODS = ("fisher_product", "fisher_factor_product")


class Case(NamedTuple):
    """A likelihood, three rows of outputs, and what numpy and scipy say about it.

    `support(z)` gives targets and weights, both (S, N), with sum_s w_s f(y_s) = E[f(y)] for the
    functions of interest: all outcomes of a discrete likelihood, quadrature nodes of a Gaussian.
    """

    likelihood: Likelihood
    outputs: Any
    log_prob: Callable[[Any, np.ndarray], np.ndarray]
    support: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    information: Callable[[Any], np.ndarray]


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

every_case = pytest.mark.parametrize("name", CASES)


class Hidden(Likelihood):
    """A likelihood whose closed-form products are hidden: what remains are the defaults."""

    def __init__(self, inner):
        self.inner = inner

    def log_prob(self, outputs, targets):
        return self.inner.log_prob(outputs, targets)

    def sample(self, key, outputs):
        return self.inner.sample(key, outputs)

    def kl(self, outputs_p, outputs_q):
        return self.inner.kl(outputs_p, outputs_q)


class SampledOnly(Likelihood):
    def log_prob(self, outputs, targets):
        return -jnp.abs(outputs - targets)

    def sample(self, key, outputs):
        return outputs + jax.random.laplace(key, outputs.shape)


def arrays(tree, dtype=None):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def flat(tree, axes=1):
    """Leaves (N, ...) as one array (N, K), keeping so many leading axes."""
    parts = [jnp.reshape(leaf, (*leaf.shape[:axes], -1)) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(parts, axis=axes)


def dense(product, outputs):
    """The matrices (N, K, K) of a product that works row by row."""
    leaves, structure = jax.tree.flatten(outputs)
    sizes = [leaf[0].size for leaf in leaves]
    parts = np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    units = [
        jnp.asarray(np.repeat(part.reshape(-1, 1, *z.shape[1:]), len(z), axis=1), z.dtype)
        for part, z in zip(parts, leaves, strict=True)
    ]
    columns = jax.vmap(lambda u: product(outputs, u))(jax.tree.unflatten(structure, units))
    return jnp.moveaxis(flat(columns, 2), 0, -1)


def score(likelihood, outputs, targets):
    return jax.grad(lambda z: jnp.sum(likelihood.log_prob(z, targets)))(outputs)


def other(outputs):
    shift = lambda z: 0.3 * np.cos(7 * z + np.arange(z.size).reshape(z.shape))
    return jax.tree.map(lambda z: z + shift(z), outputs)


def transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@functools.cache
def facts(name):
    """What a likelihood says in float64, by one compilation."""
    likelihood, outputs, _, support, _ = CASES[name]
    # The default factor takes rows one by one, and so cannot have a scale for each.
    default = Hidden(Normal(SCALES[:1]) if name == "normal_scales" else likelihood)

    @jax.jit
    def compute(z, q, y, w):
        def hessians(divergence):
            gradient = jax.grad(lambda x: jnp.sum(divergence(x)))
            product = lambda x, v: jax.jvp(gradient, (x,), (v,))[1]
            return divergence(z), flat(gradient(z)), dense(product, z), dense(product, q)

        def mean_score(z):
            scores = jax.vmap(lambda y: score(likelihood, z, y))(y)
            weigh = lambda g: jnp.sum(g * w.reshape(w.shape + (1,) * (g.ndim - 2)), axis=0)
            return jax.tree.map(weigh, scores)

        return {
            "log_probs": jax.vmap(lambda y: likelihood.log_prob(z, y))(y),
            "scores": flat(jax.vmap(lambda y: score(likelihood, z, y))(y), 2),
            "fisher": dense(likelihood.fisher_product, z),
            "factor": dense(likelihood.fisher_factor_product, z),
            "default_fisher": dense(default.fisher_product, jax.tree.map(lambda x: x[:1], z)),
            "default_factor": dense(
                default.fisher_factor_product, jax.tree.map(lambda x: x[:1], z)
            ),
            "mean_hessian": dense(lambda z, v: jax.jvp(mean_score, (z,), (v,))[1], z),
            "kl": likelihood.kl(z, q),
            "reverse_kl": likelihood.kl(q, z),
            "in_p": hessians(lambda x: likelihood.kl(x, z)),
            "in_q": hessians(lambda x: likelihood.kl(z, x)),
        }

    targets, weights = support(outputs)
    results = compute(*arrays((outputs, other(outputs), targets, weights)))
    return {"weights": weights, **jax.tree.map(np.asarray, results)}


@functools.cache
def draws(name, number=20_000):
    """Samples (number, N) and their scores (number, N, K)."""
    likelihood = CASES[name].likelihood

    @jax.jit
    def draw(key, z):
        samples = likelihood.sample(key, z)
        return samples, score(likelihood, z, samples)

    repeat = lambda z: jnp.asarray(np.tile(z, (number, 1, 1)[: z.ndim + 1]), jnp.float32)
    samples, scores = draw(jax.random.key(3), jax.tree.map(repeat, CASES[name].outputs))
    return np.asarray(samples, float), np.asarray(flat(scores, 2), float)


# Probabilities


@every_case
def test_log_prob_is_that_of_scipy(name, x64):
    targets, _ = CASES[name].support(CASES[name].outputs)
    expected = np.stack([CASES[name].log_prob(CASES[name].outputs, y) for y in targets])
    np.testing.assert_allclose(facts(name)["log_probs"], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson"])
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


# The Fisher matrix of a row


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


@every_case
def test_defaults_by_autodiff_are_the_closed_forms(name, x64):
    fisher, factor = CASES[name].information(CASES[name].outputs)[:1], facts(name)["default_factor"]
    np.testing.assert_allclose(facts(name)["default_fisher"], fisher, atol=1e-13)
    np.testing.assert_allclose(factor @ transposed(factor), fisher, atol=1e-13)
    np.testing.assert_allclose(factor, transposed(factor), atol=1e-13)
    if name == "categorical":
        assert np.abs(factor - facts(name)["factor"][:1]).max() > 0.05  # it is another factor


# Divergence


@every_case
def test_kl_is_the_mean_log_ratio(name, x64):
    _, p, log_prob, support, _ = CASES[name]
    targets, weights = support(p)
    ratios = [log_prob(p, y) - log_prob(other(p), y) for y in targets]
    divergence = facts(name)["kl"]
    np.testing.assert_allclose(divergence, np.sum(weights * ratios, axis=0), rtol=1e-10)
    assert np.all(divergence > 0)
    if "normal" not in name:
        assert np.abs(facts(name)["reverse_kl"] / divergence - 1).max() > 1e-3  # not symmetric


@every_case
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
    _, p, _, _, information = CASES[name]
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


# Impossible outcomes and extreme values


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


# Structure: positions, rows, transformations, dtypes

TRAILING = {name: c.likelihood for name, c in CASES.items() if name != "normal_scales"}
TRAILING["normal_scales"] = Normal(np.array([[0.5, 2.0]]))
every_shape = pytest.mark.parametrize("name", TRAILING)
# The defaults where rows hold one array with and without a class axis, and a pair.
WITH_DEFAULTS = ("categorical", "poisson", "diagonal_normal")
every_implementation = pytest.mark.parametrize(
    ("name", "default"),
    [(name, False) for name in TRAILING] + [(name, True) for name in WITH_DEFAULTS],
    ids=[*TRAILING, *(f"{name}_by_default" for name in WITH_DEFAULTS)],
)


def trailing(name, *shape, dtype=None):
    """Random outputs (*shape, ...) of a likelihood, others, and targets."""
    draw = lambda *event: jnp.asarray(rng.normal(size=(*shape, *event)), dtype)
    rng = np.random.default_rng(0)
    if name == "diagonal_normal":
        return (draw(), draw()), (draw(), draw()), draw()
    event = (4,) if name == "categorical" else ()
    return draw(*event), draw(*event), jnp.asarray(rng.integers(2, size=shape))


def one_by_one(function, axis, *trees):
    """`function` of the slices at each place of an axis; its results have that axis in front."""
    slices = lambda *trees: function(*jax.tree.map(lambda x: jnp.expand_dims(x, axis), trees))
    return jax.vmap(slices, in_axes=axis)(*trees)


@every_shape
def test_trailing_positions_are_independent_and_summed(name, x64):
    likelihood, (z, q, y) = TRAILING[name], trailing(name, 3, 5, 2)

    @jax.jit
    def compute(z, q, y):
        results = []
        for method, second in (("log_prob", y), ("kl", q)):
            function = getattr(likelihood, method)
            parts = jnp.sum(one_by_one(function, 1, z, second), axis=0)
            results.append((function(z, second), parts))
        for method in METHODS:
            function = getattr(likelihood, method)
            parts = one_by_one(function, 1, z, q)
            parts = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), parts)
            results.append((function(z, q), parts))
        return results

    for whole, parts in compute(z, q, y):
        assert_trees_close(whole, parts, rtol=1e-12, atol=1e-15)


@every_implementation
def test_rows_are_independent_and_products_linear(name, default, x64):
    """Under jit and vmap, and with transposes by JAX."""
    likelihood = Hidden(TRAILING[name]) if default else TRAILING[name]
    z, q, y = trailing(name, 3, 2)

    @jax.jit
    def compute(z, q, y):
        pairs, inner = [], []
        for method, second in (("log_prob", y), ("kl", q), *((method, q) for method in METHODS)):
            function = getattr(likelihood, method)
            rows = jax.tree.map(lambda x: x[:, 0], one_by_one(function, 0, z, second))
            pairs.append((function(z, second), rows))
        for method in METHODS:
            product = lambda u, method=method: getattr(likelihood, method)(z, u)
            (back,) = jax.linear_transpose(product, q)(z)
            inner.append((jnp.vdot(flat(product(q)), flat(z)), jnp.vdot(flat(q), flat(back))))
        return pairs, inner

    # Square roots magnify rounding: eigenvalues that are zero come out as 1e-16, their roots 1e-8.
    tolerance = 1e-7 if default else 1e-12
    for together, apart in itertools.chain.from_iterable(compute(z, q, y)):
        assert_trees_close(together, apart, rtol=tolerance, atol=tolerance)


@every_implementation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(name, dtype, default, x64):
    """At least float32 in every result, whatever the dtype of tangents and targets."""
    likelihood = Hidden(TRAILING[name]) if default else TRAILING[name]
    z, _, _ = trailing(name, 3, 2, dtype=dtype)
    wide = "float64" if dtype == "float64" else "float32"
    kinds = lambda f, *a: {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(f, *a))}
    drawn = "int32" if name in ("categorical", "poisson") else wide
    assert kinds(likelihood.sample, jax.random.key(0), z) == {drawn}
    assert kinds(likelihood.kl, z, z) == {wide}
    for target in (drawn, "int8" if name == "categorical" else "bfloat16", "int64"):
        assert kinds(likelihood.log_prob, z, jnp.zeros((3, 2), target)) == {wide}
    for vector in (z, arrays(z, "float64"), arrays(z, "bfloat16")):
        for method in METHODS:
            assert kinds(getattr(likelihood, method), z, vector) == {wide}


def test_narrow_outputs_are_computed_in_float32():
    z = jnp.array([[0.1, 3.0, -2.0]], jnp.bfloat16)
    exact = Categorical().log_prob(z.astype(jnp.float32), jnp.array([0]))
    assert Categorical().log_prob(z, jnp.array([0]))[0] == exact[0]
    assert jax.nn.log_softmax(z)[0, 0].astype(jnp.float32) != exact[0]


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8", "float32"])
def test_coins_of_any_dtype(dtype):
    got = Bernoulli().log_prob(jnp.array([0.3, 0.3]), jnp.array([0, 1]).astype(dtype))
    np.testing.assert_allclose(got, scipy.special.log_expit([-0.3, 0.3]), rtol=1e-6)


def test_a_traced_scale_can_be_differentiated():
    loss = lambda scale: -jnp.sum(Normal(scale).log_prob(jnp.zeros((1,)), jnp.ones((1,))))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(2.0), 1 / 2 - 1 / 8, rtol=1e-6)


# One's own, several heads, other libraries


class Correlated(Likelihood):
    """Two correlated Gaussians in a dict of outputs; the precision is not diagonal in a row."""

    precision = np.array([[2.0, -0.6], [-0.6, 0.5]])

    def kl(self, outputs_p, outputs_q):
        a, b = (outputs_p[name] - outputs_q[name] for name in "ab")
        p = self.precision
        return 0.5 * (p[0, 0] * a**2 + 2 * p[0, 1] * a * b + p[1, 1] * b**2)


def test_ones_own_likelihood_with_a_tree_of_outputs(x64):
    z = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([3.0, -1.0])}
    products = Correlated().fisher_product, Correlated().fisher_factor_product
    fisher, factor = jax.jit(lambda z: [dense(product, z) for product in products])(z)
    expected = np.stack([Correlated.precision] * 2)
    np.testing.assert_allclose(fisher, expected, atol=1e-14)
    np.testing.assert_allclose(factor @ transposed(factor), expected, atol=1e-14)


def test_what_is_missing_is_named():
    z, own = jnp.zeros((2,)), SampledOnly()
    assert own.log_prob(z, own.sample(jax.random.key(0), z)).shape == (2,)
    for call in (own.kl, own.fisher_product, own.fisher_factor_product):
        with pytest.raises(
            TypeError, match="exact Fisher of SampledOnly needs `kl`.*sampled_fisher"
        ):
            call(z, z)
    with pytest.raises(TypeError, match="Correlated.log_prob.*must implement"):
        Correlated().log_prob(z, z)
    with pytest.raises(TypeError, match="Correlated.sample"):
        Correlated().sample(jax.random.key(0), z)


def test_likelihoods_compare_by_identity():
    one, two = Normal(1.0), Normal(1.0)
    assert one == one and one != two and len({one, two, one}) == 2


Heads = collections.namedtuple("Heads", ["first", "second"])
CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda a, b: (a, b)),
    "list": (lambda a, b: [a, b], lambda a, b: [a, b]),
    "dict": (lambda a, b: {"z": a, "y": b}, lambda a, b: {"z": a, "y": b}),
    "namedtuple": (lambda a, b: (a, b), Heads),
    "ordered": (lambda a, b: {"z": a, "y": b}, lambda a, b: collections.OrderedDict(z=a, y=b)),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_heads_are_summed_and_block_diagonal(container):
    of_likelihoods, of_arrays = CONTAINERS[container]
    action, value = Normal(0.5), DiagonalNormal()
    joint = Joint(of_likelihoods(action, value))
    means, pair = jnp.ones((3, 2)), (jnp.ones((3,)), jnp.zeros((3,)))
    outputs, shifted = of_arrays(means, pair), of_arrays(2 * means, pair[::-1])
    targets = joint.sample(jax.random.key(0), outputs)
    assert jax.tree.structure(targets) == jax.tree.structure(of_arrays(0, 0))
    first, second = (targets[k] for k in (("z", "y") if isinstance(targets, dict) else (0, 1)))
    expected = action.log_prob(means, first) + value.log_prob(pair, second)
    np.testing.assert_allclose(joint.log_prob(outputs, targets), expected, rtol=1e-6)
    expected = action.kl(means, 2 * means) + value.kl(pair, pair[::-1])
    np.testing.assert_allclose(joint.kl(outputs, shifted), expected, rtol=1e-6)
    for method in METHODS:
        heads = (action, means, 2 * means), (value, pair, pair[::-1])
        expected = of_arrays(*(getattr(head, method)(z, v) for head, z, v in heads))
        got = getattr(joint, method)(outputs, shifted)
        assert jax.tree.structure(got) == jax.tree.structure(outputs)
        assert_trees_close(got, expected, rtol=1e-6)
    default = jax.jit(Hidden(joint).fisher_product)(outputs, shifted)
    assert_trees_close(default, joint.fisher_product(outputs, shifted), rtol=1e-6)


def test_heads_draw_from_keys_of_their_own():
    z = jnp.zeros((5,))
    one, two = Joint((Normal(), Normal())).sample(jax.random.key(0), (z, z))
    assert not np.any(np.asarray(one) == np.asarray(two))


def test_heads_may_differ_in_dtype_and_in_rows(x64):
    joint = Joint((Normal(), Normal()))
    mixed = jnp.zeros((3,), jnp.float32), jnp.zeros((3,), jnp.float64)
    assert joint.log_prob(mixed, mixed).dtype == jnp.float64
    uneven = jnp.ones((3,)), jnp.ones((5,))
    assert_trees_close(joint.fisher_product(uneven, uneven), uneven)
    assert [y.shape for y in joint.sample(jax.random.key(0), uneven)] == [(3,), (5,)]
    for call in (joint.log_prob, joint.kl):
        with pytest.raises(ValueError, match="cannot be summed row by row.*3.*5"):
            call(uneven, uneven)


def check_adapter(adapted, closed, outputs):
    z, v = arrays((outputs, other(outputs)))
    repeated = jax.tree.map(lambda z: jnp.tile(z[:1], (4000,) + (1,) * (z.ndim - 1)), z)

    @jax.jit
    def compute(z, v, repeated):
        y = adapted.sample(jax.random.key(0), z)
        facts = [(x.log_prob(z, y), x.kl(z, v), x.fisher_product(z, v)) for x in (adapted, closed)]
        drawn = [x.sample(jax.random.key(1), repeated) for x in (adapted, closed)]
        return (
            facts,
            drawn,
            dense(adapted.fisher_factor_product, z),
            dense(closed.fisher_product, z),
        )

    (got, expected), (ours, theirs), factor, fisher = compute(z, v, repeated)
    assert_trees_close(got, expected, rtol=1e-9, atol=1e-10)
    difference = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    assert np.all(difference < 6 * np.std(ours, axis=0) / np.sqrt(2000))
    np.testing.assert_allclose(factor @ transposed(factor), fisher, atol=1e-10)


IMAGES = np.random.default_rng(0).normal(size=(3, 2, 2))


def test_distrax_distributions(x64, standard_promotion):
    distrax = pytest.importorskip("distrax")
    check_adapter(from_distribution(lambda z: distrax.Categorical(logits=z)), Categorical(), LOGITS)
    diagonal = lambda z: distrax.MultivariateNormalDiag(z[0], jnp.exp(z[1]))
    check_adapter(from_distribution(diagonal), DiagonalNormal(), (IMAGES[0], IMAGES[1]))


def test_numpyro_distributions(x64, standard_promotion):
    numpyro = pytest.importorskip("numpyro.distributions")
    make = lambda z: numpyro.Categorical(logits=z)
    kl = lambda p, q: jnp.sum(p.probs * (jnp.log(p.probs) - jnp.log(q.probs)), axis=-1)
    check_adapter(from_distribution(make, kl=kl), Categorical(), LOGITS)
    make = lambda z: numpyro.Normal(z[0], jnp.exp(z[1])).to_event(1)
    diagonal = from_distribution(make, kl=numpyro.kl_divergence)
    check_adapter(diagonal, DiagonalNormal(), (IMAGES[0], IMAGES[1]))
    with pytest.raises(
        TypeError, match="needs `kl`; pass kl= to from_distribution.*sampled_fisher"
    ):
        from_distribution(make).fisher_product((IMAGES[0], IMAGES[1]), (IMAGES[0], IMAGES[1]))


class Exponential:
    """A distribution object in the style of distrax, with batch shape that of its rate."""

    def __init__(self, log_rate):
        self.log_rate = log_rate

    def log_prob(self, value):
        return self.log_rate - jnp.exp(self.log_rate) * value

    def sample(self, *, seed):
        return jax.random.exponential(seed, self.log_rate.shape) * jnp.exp(-self.log_rate)

    def kl_divergence(self, other):
        gap = other.log_rate - self.log_rate
        return jnp.expm1(gap) - gap


def test_any_object_will_do(x64):
    adapted, z = from_distribution(Exponential), jnp.asarray(IMAGES)
    y = adapted.sample(jax.random.key(0), z)
    expected = scipy.stats.expon.logpdf(y, scale=np.exp(-IMAGES)).sum((1, 2))
    np.testing.assert_allclose(adapted.log_prob(z, y), expected, rtol=1e-12)
    products = jax.jit(lambda z: [getattr(adapted, method)(z, z) for method in METHODS])(z)
    assert_trees_close(products, [z, z], rtol=1e-12)  # unit information
    assert adapted.log_prob(z.astype(jnp.bfloat16), y.astype(jnp.float32)).dtype == jnp.float32
    assert isinstance(adapted, Likelihood)


# Bad input

ZEROS, PAIRS = np.zeros((3, 2), np.float32), (np.zeros((3, 2)), np.zeros((3, 4)))
LABELS = np.zeros((3,), np.int32)
JOINT = Joint({"a": Normal(), "b": Normal()})
KEY = np.zeros((2,), np.uint32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Normal(0.0), ValueError, "Normal: scale must be positive, got 0.0"),
        (lambda: Normal(-1), ValueError, "Normal: scale must be positive, got -1"),
        (
            lambda: Normal(np.array([1.0, -2.0])),
            ValueError,
            r"Normal: scale must be .* got \[ 1. -2",
        ),
        (lambda: Normal(float("nan")), ValueError, "Normal: scale must be positive, got nan"),
        (
            lambda: Normal(np.ones(3)).kl(ZEROS, ZEROS),
            ValueError,
            r"Normal.kl: scale \(3,\).*\(3, 2\)",
        ),
        (lambda: Normal(np.ones((1, 1, 2))).kl(ZEROS, ZEROS), ValueError, r"scale \(1, 1, 2\)"),
        (
            lambda: Normal().log_prob(ZEROS, ZEROS[:, :1]),
            ValueError,
            r"Normal.log_prob: outputs of shape \(3, 2\) need .* \(3, 2\), got .* \(3, 1\)",
        ),
        (
            lambda: Categorical().log_prob(ZEROS, LABELS[:, None] + np.zeros((1, 2), np.int32)),
            ValueError,
            r"Categorical.log_prob: outputs of shape \(3, 2\) need .* \(3,\), got .* \(3, 2\)",
        ),
        (lambda: Poisson().log_prob(ZEROS, LABELS), ValueError, r"Poisson.log_prob: .*\(3,\)"),
        (
            lambda: Categorical().log_prob(ZEROS, ZEROS[:, 0]),
            TypeError,
            "Categorical.log_prob: targets must be integer class labels, got dtype float32",
        ),
        (lambda: Categorical().log_prob(ZEROS, LABELS > 0), TypeError, "integer.*bool"),
        (
            lambda: Bernoulli().log_prob(ZEROS, ZEROS + 1j),
            TypeError,
            "Bernoulli.log_prob: .*complex",
        ),
        (lambda: Normal().log_prob(ZEROS, [0.0]), TypeError, "targets must be one array, got list"),
        (lambda: Categorical().log_prob(ZEROS[0], LABELS[0]), ValueError, r"rows.*classes.*\(2,\)"),
        (
            lambda: Bernoulli().sample(KEY, np.float32(0)),
            ValueError,
            r"Bernoulli.sample: outputs need a leading axis of rows, got shape \(\)",
        ),
        (
            lambda: Poisson().kl(1.0, 1.0),
            TypeError,
            "Poisson.kl: outputs must be one array, got float",
        ),
        (
            lambda: Categorical().sample(KEY, (ZEROS, ZEROS)),
            TypeError,
            "Categorical.sample: outputs must be one array, got tuple",
        ),
        (lambda: Normal().kl(LABELS, LABELS), TypeError, "Normal.kl: .*floating point, got int32"),
        (lambda: Normal().kl(ZEROS + 1j, ZEROS), TypeError, "real floating point, got complex64"),
        (lambda: Normal().kl(ZEROS, ZEROS[:2]), ValueError, r"Normal.kl: .*\(3, 2\).*\(2, 2\)"),
        (
            lambda: Normal().fisher_product(ZEROS, ZEROS[:2]),
            ValueError,
            r"Normal.fisher_product: .*\(3, 2\).*\(2, 2\)",
        ),
        (
            lambda: Hidden(Normal()).fisher_factor_product(ZEROS, ZEROS[0]),
            ValueError,
            r"Hidden.fisher_factor_product: .*\(3, 2\).*\(2,\)",
        ),
        (
            lambda: DiagonalNormal().sample(KEY, ZEROS),
            TypeError,
            r"DiagonalNormal.sample: outputs must be a pair \(mean, log_scale\), got PyTreeDef",
        ),
        (
            lambda: DiagonalNormal().sample(KEY, (ZEROS,)),
            TypeError,
            r"pair.*got PyTreeDef\(\(\*,\)\)",
        ),
        (
            lambda: DiagonalNormal().sample(KEY, PAIRS),
            ValueError,
            r"DiagonalNormal.sample: mean \(3, 2\) and log_scale \(3, 4\) must have one shape",
        ),
        (
            lambda: DiagonalNormal().log_prob((ZEROS, ZEROS), LABELS),
            ValueError,
            r"DiagonalNormal.log_prob: outputs of shape \(3, 2\) .* got .* \(3,\)",
        ),
        (lambda: Joint((Normal(), Categorical)), TypeError, "Joint: head 1 must be a Likelihood"),
        (lambda: Joint(Normal()), TypeError, "Joint: needs a tuple, list or dict.*Normal"),
        (lambda: Joint({}), ValueError, "Joint: needs at least one likelihood"),
        (
            lambda: JOINT.log_prob({"a": ZEROS, "c": ZEROS}, {"a": ZEROS, "b": ZEROS}),
            ValueError,
            r"Joint.log_prob: .*\['a', 'c'\].*\['a', 'b'\]",
        ),
        (
            lambda: JOINT.log_prob({"a": ZEROS, "b": ZEROS}, {"a": ZEROS}),
            ValueError,
            r"Joint.log_prob: .*\['a'\].*\['a', 'b'\]",
        ),
        (lambda: JOINT.sample(KEY, (ZEROS, ZEROS)), ValueError, r"Joint.sample: .*tuple.*\[0, 1\]"),
        (
            lambda: JOINT.fisher_product(ZEROS, ZEROS),
            TypeError,
            "Joint.fisher_product: needs a tuple",
        ),
        (
            lambda: Joint((SampledOnly(),)).kl((ZEROS,), (ZEROS,)),
            TypeError,
            "exact Fisher of SampledOnly needs `kl`",
        ),
        (
            lambda: from_distribution(3),
            TypeError,
            "from_distribution: make and kl must be functions",
        ),
        (
            lambda: from_distribution(Exponential, kl=3),
            TypeError,
            "functions, got .*Exponential.*, 3",
        ),
        (
            lambda: from_distribution(lambda z: Exponential(jnp.sum(z))).log_prob(
                ZEROS, ZEROS[0, 0]
            ),
            ValueError,
            r"from_distribution.log_prob: .*\(3,\).*shape \(\)",
        ),
    ],
)
def test_bad_input_is_named_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Scores in float32 keep their digits, and nothing finite becomes NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import natgrad_jax as ng
from tests.test_likelihoods.facts import dense

f32 = functools.partial(np.asarray, dtype=np.float32)


def gradient(likelihood, z, y):
    total = lambda z: jnp.sum(likelihood.log_prob(z, y))
    return jax.jit(jax.grad(total))(z)


def test_the_score_of_a_certain_label_is_the_mass_of_the_others():
    """Logits (20, 0, 0): 1 - p is 0 in float32, the truth is 4.1e-9."""
    logits, labels = f32([[20.0, 0.0, 0.0], [0.0, 30.0, 12.0]]), np.array([0, 1])
    p = scipy.special.softmax(np.asarray(logits, np.longdouble), axis=-1)
    expected = -np.asarray(p, float)
    expected[[0, 1], labels] = -np.asarray([expected[0, 1:].sum(), expected[1, [0, 2]].sum()])
    found = gradient(ng.Categorical(), logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(
        ng.Categorical().log_prob(logits, labels), -expected[[0, 1], labels], rtol=1e-6
    )
    soft = np.eye(3, dtype=np.float32)[labels]
    np.testing.assert_allclose(gradient(ng.Categorical(), logits, soft), expected, rtol=1e-6)
    # The control.
    plain = jax.grad(lambda z: jnp.sum(jax.nn.log_softmax(z)[:, 0]))(logits)
    assert plain[0, 0] == 0 < expected[0, 0]


def test_the_hessian_of_a_label_is_minus_the_fisher_matrix():
    logits = f32([20.0, 0.0, 0.5])
    for label in range(3):
        log_prob = lambda z, y=label: ng.Categorical().log_prob(z[None], np.array([y]))[0]
        fisher = dense(ng.Categorical().fisher_product, logits[None])[0]
        np.testing.assert_allclose(jax.hessian(log_prob)(logits), -fisher, rtol=1e-6)


def test_soft_targets_are_cross_entropies(x64):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(5, 2, 4)), rng.dirichlet(np.ones(4), size=(5, 2))
    expected = np.sum(y * scipy.special.log_softmax(z, axis=-1), axis=(1, 2))
    np.testing.assert_allclose(ng.Categorical().log_prob(z, y), expected, rtol=1e-12)
    expected = y - scipy.special.softmax(z, axis=-1)
    np.testing.assert_allclose(gradient(ng.Categorical(), z, y), expected, atol=1e-14)
    labels = rng.integers(4, size=(5, 2))
    hard = ng.Categorical().log_prob(z, labels)
    np.testing.assert_allclose(ng.Categorical().log_prob(z, np.eye(4)[labels]), hard, rtol=1e-12)


def test_masked_labels_leave_no_nan():
    """Labels of padding are often -1, their log-probability replaced."""
    z, y = f32(np.ones((2, 3))), np.array([0, -1])
    loss = lambda z: jnp.sum(jnp.where(y >= 0, ng.Categorical().log_prob(z, y), 0))
    assert np.all(np.isfinite(jax.grad(loss)(z)))


# Outputs and targets in float32, exactly; scores are compared with those in float64, whose
# cancellation is 2^29 times smaller.
POINTS = {
    "bernoulli": (ng.Bernoulli(), f32([18.0, -18.0, 0.3]), f32([1, 0, 1])),
    "binomial": (ng.Binomial(50), f32([14.0, -14.0, 0.3]), f32([50, 0, 20])),
    "ordinal": (ng.Ordinal(), (f32([16.0, -15.0, 0.3]), f32([[0, 1], [0.5, -9], [0, 2]])), None),
    "negative_binomial": (
        ng.NegativeBinomial(),
        (f32([1.25, 1.25, 5.0, 8.0, -3.0]), f32([-16.0, -6.0, -12.0, 2.0, 5.0])),
        f32([5, 2, 170, 9000, 0]),
    ),
    "gamma": (
        ng.Gamma(),
        (f32([0.0, 0.5, -2.0, 1.0]), f32([12.0, -8.0, 3.0, 0.0])),
        f32([1.0625, 0.03125, 0.25, 20.0]),
    ),
    "beta": (
        ng.Beta(),
        (f32([0.25, -4.0, 5.0, 0.0]), f32([8.0, -3.0, 2.0, 0.5])),
        f32([0.5, 0.0625, 0.75, 0.125]),
    ),
    "student_t": (
        ng.StudentT(),
        (f32([0, 1, -2, 0, 0]), f32([0, -1, 3, 0.5, 0]), f32([9, 0.5, -2, 14, -16])),
        f32([0.5, 9, 4, 3, 0.75]),
    ),
}


@pytest.mark.parametrize("name", POINTS)
def test_scores_in_float32_are_those_in_float64(name, x64):
    likelihood, z, y = POINTS[name]
    y = np.array([0, 2, 1]) if y is None else y
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    narrow = gradient(likelihood, z, y)
    exact = gradient(likelihood, wide(z), y if name == "ordinal" else wide(y))
    for got, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(exact), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=4e-6)


EXTREME = (-100.0, -40.0, 40.0, 100.0)
PARAMETERS = {
    "binomial": (ng.Binomial(5), 1, [0.0, 5.0]),
    "negative_binomial": (ng.NegativeBinomial(), 2, [0.0, 3.0, 1e6]),
    "negative_binomial_fixed": (ng.NegativeBinomial(0.5), 1, [0.0, 3.0]),
    "gamma": (ng.Gamma(), 2, [1e-30, 1.0, 1e30]),
    "beta": (ng.Beta(), 2, [1e-6, 0.5]),
    "student_t": (ng.StudentT(), 3, [0.0, 1.0, 1e30]),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_extreme_parameters_give_no_nan(name):
    likelihood, leaves, targets = PARAMETERS[name]
    mesh = np.meshgrid(*[EXTREME] * leaves, targets, indexing="ij")
    *z, y = (f32(x.reshape(-1)) for x in mesh)
    z = z[0] if leaves == 1 else tuple(z)

    @jax.jit
    def compute(z):
        v = jax.tree.map(jnp.ones_like, z)
        products = likelihood.fisher_product(z, v), likelihood.fisher_factor_product(z, v)
        score = jax.grad(lambda z: jnp.sum(likelihood.log_prob(z, y)))(z)
        draws = likelihood.sample(jax.random.key(0), z)
        return likelihood.log_prob(z, y), score, products, draws.astype(jnp.float32)

    for part in jax.tree.leaves(compute(z)):
        assert not np.any(np.isnan(part))


def test_cutpoints_far_and_near_give_no_nan():
    rows = np.array(np.meshgrid(EXTREME, EXTREME, EXTREME, indexing="ij")).reshape(3, -1)
    z = f32(rows[0]), f32(rows[1:].T)
    for label in range(3):
        y = np.full(rows.shape[1], label)
        assert not np.any(np.isnan(ng.Ordinal().log_prob(z, y)))
        assert all(not np.any(np.isnan(x)) for x in gradient(ng.Ordinal(), z, y))
    products = ng.Ordinal().fisher_product(z, z), ng.Ordinal().fisher_factor_product(z, z)
    assert all(not np.any(np.isnan(x)) for x in jax.tree.leaves(products))


DRAWN = {
    "negative_binomial": (ng.NegativeBinomial(0.5), 1.0, scipy.stats.nbinom(2, 2 / (2 + np.e))),
    "binomial": (ng.Binomial(12), 1.0, scipy.stats.binom(12, scipy.special.expit(1))),
    "gamma": (ng.Gamma(0.4), 1.0, scipy.stats.gamma(0.4, scale=np.e / 0.4)),
    "beta": (ng.Beta(3.0), 1.0, scipy.stats.beta(3 * 0.7310585786, 3 * 0.2689414214)),
    "student_t": (ng.StudentT(2.5), (1.0, 0.5), scipy.stats.t(2.5, 1.0, np.exp(0.5))),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_distribution_of_scipy(name):
    likelihood, z, expected = DRAWN[name]
    outputs = jax.tree.map(lambda x: jnp.full((5000,), x, jnp.float32), z)
    drawn = np.asarray(jax.jit(likelihood.sample)(jax.random.key(7), outputs))
    if drawn.dtype.kind == "i":
        top = int(expected.ppf(0.99))
        counts = np.bincount(np.minimum(drawn, top), minlength=top + 1)
        p = np.append(expected.pmf(np.arange(top)), expected.sf(top - 1))
        assert scipy.stats.chisquare(counts, p * len(drawn)).pvalue > 1e-3
        return
    assert scipy.stats.kstest(drawn, expected.cdf).pvalue > 1e-3
    assert scipy.stats.kstest(1.2 * drawn + 0.1, expected.cdf).pvalue < 1e-3  # it has power

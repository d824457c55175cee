"""Identities A1-A11: the Fisher matrix is what its definitions say, in float64."""

# ruff: noqa: N802 - tests carry the tag of the identity they show

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

TOL = 1e4 * np.finfo(np.float64).eps
VISIBLE = 0.1
RNG = np.random.default_rng(0)

X = RNG.normal(size=(5, 2))
PARAMS = {
    "b": 0.3 * RNG.normal(size=(3,)),
    "c": 0.3 * RNG.normal(size=(4,)),
    "v": 0.6 * RNG.normal(size=(3, 4)),
    "w": RNG.normal(size=(2, 3)),
}
THETA = np.concatenate([leaf.ravel() for leaf in PARAMS.values()])
TANGENT = RNG.normal(size=THETA.shape)
ELSEWHERE = THETA + 0.5 * RNG.normal(size=THETA.shape)


def error(value: Any, expected: np.ndarray) -> float:
    return np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected)


def network(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None])
    return hidden @ params["v"] + params["c"][None]


def tree(theta):
    pieces = np.cumsum([leaf.size for leaf in PARAMS.values()])
    starts = [0, *pieces[:-1]]
    return {
        name: theta[start:stop].reshape(leaf.shape)
        for (name, leaf), start, stop in zip(PARAMS.items(), starts, pieces, strict=True)
    }


def flat(params) -> np.ndarray:
    return np.concatenate([np.asarray(params[name]).ravel() for name in PARAMS])


class ExponentialDistribution:
    def __init__(self, log_rate):
        self.log_rate = log_rate

    def log_prob(self, value):
        return self.log_rate - jnp.exp(self.log_rate) * value

    def sample(self, seed):
        shape = self.log_rate.shape
        return jax.random.exponential(seed, shape, self.log_rate.dtype) / jnp.exp(self.log_rate)

    def kl_divergence(self, other):
        gap = other.log_rate - self.log_rate
        return jnp.expm1(gap) - gap


class Gamma(ng.Likelihood):
    """Shape 2, outputs are log rates: a likelihood of one's own, with M = 2 in every entry."""

    def log_prob(self, outputs, targets):
        return jnp.sum(2 * outputs - jnp.exp(outputs) * targets, axis=-1)

    def sample(self, key, outputs):
        two = jax.random.exponential(key, (2, *outputs.shape), outputs.dtype)
        return jnp.sum(two, axis=0) / jnp.exp(outputs)

    def kl(self, outputs_p, outputs_q):
        gap = outputs_q - outputs_p
        return jnp.sum(2 * (jnp.expm1(gap) - gap), axis=-1)


class Case(NamedTuple):
    """A likelihood on the four network outputs z of an example.

    `information(z)` is M in closed form. `log_prob(z, y)` is log p up to terms without z, and
    `support(z)` gives targets (S, D) and weights (S,) that integrate its squared gradient exactly.
    """

    likelihood: ng.Likelihood
    outputs: Callable[[jax.Array], Any]
    information: Callable[[np.ndarray], np.ndarray]
    log_prob: Callable[[jax.Array, jax.Array], jax.Array]
    support: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def grid(*axes):
    values = np.meshgrid(*(y for y, _ in axes), indexing="ij")
    weights = np.meshgrid(*(w for _, w in axes), indexing="ij")
    points = np.stack([v.ravel() for v in values], axis=-1).astype(float)
    return points, np.prod(weights, axis=0).ravel()


def classes(z):
    return np.arange(len(z)), scipy.special.softmax(z)


def gaussian(mean, scale):
    x, w = np.polynomial.hermite.hermgauss(3)
    return mean + np.sqrt(2) * scale * x, w / np.sqrt(np.pi)


def coin(z):
    return np.arange(2), np.array([scipy.special.expit(-z), scipy.special.expit(z)])


def counts(z):
    y = np.arange(40)
    return y, scipy.stats.poisson.pmf(y, np.exp(z))


def gamma(shape, z):
    x, w = scipy.special.roots_genlaguerre(3, shape - 1)
    return x / np.exp(z), w / w.sum()


def softmax_information(z):
    p = scipy.special.softmax(z)
    return np.diag(p) - np.outer(p, p)


def pick(z, y):
    return z[y.astype(int)] - jax.nn.logsumexp(z)


SCALES = np.array([0.5, 2.0, 1.0, 1.5])
CASES = {
    "categorical": Case(
        ng.Categorical(),
        lambda z: z,
        softmax_information,
        lambda z, y: pick(z, y[0]),
        lambda z: grid(classes(z)),
    ),
    "categorical over positions": Case(
        ng.Categorical(),
        lambda z: z.reshape(-1, 2, 2),
        lambda z: scipy.linalg.block_diag(*map(softmax_information, z.reshape(2, 2))),
        lambda z, y: pick(z[:2], y[0]) + pick(z[2:], y[1]),
        lambda z: grid(classes(z[:2]), classes(z[2:])),
    ),
    "bernoulli": Case(
        ng.Bernoulli(),
        lambda z: z,
        lambda z: np.diag(scipy.special.expit(z) * scipy.special.expit(-z)),
        lambda z, y: jnp.sum(y * z - jax.nn.softplus(z)),
        lambda z: grid(*map(coin, z)),
    ),
    "normal": Case(
        ng.Normal(scale=SCALES),
        lambda z: z,
        lambda z: np.diag(SCALES**-2.0),
        lambda z, y: -0.5 * jnp.sum(((y - z) / jnp.asarray(SCALES)) ** 2),
        lambda z: grid(*map(gaussian, z, SCALES)),
    ),
    "diagonal normal": Case(
        ng.DiagonalNormal(),
        lambda z: (z[:, :2], z[:, 2:]),
        lambda z: np.diag([*np.exp(-2 * z[2:]), 2, 2]),
        lambda z, y: -jnp.sum(0.5 * ((y - z[:2]) / jnp.exp(z[2:])) ** 2 + z[2:]),
        lambda z: grid(*map(gaussian, z[:2], np.exp(z[2:]))),
    ),
    "poisson": Case(
        ng.Poisson(),
        lambda z: z[:, :2],
        lambda z: np.diag([*np.exp(z[:2]), 0, 0]),
        lambda z, y: jnp.sum(y * z[:2] - jnp.exp(z[:2])),
        lambda z: grid(*map(counts, z[:2])),
    ),
    "joint": Case(
        ng.Joint({"policy": ng.Categorical(), "value": ng.Normal(0.5)}),
        lambda z: {"policy": z[:, :3], "value": z[:, 3]},
        lambda z: scipy.linalg.block_diag(softmax_information(z[:3]), 4.0),
        lambda z, y: pick(z[:3], y[0]) - 2 * (y[1] - z[3]) ** 2,
        lambda z: grid(classes(z[:3]), gaussian(z[3], 0.5)),
    ),
    "from_distribution": Case(
        ng.from_distribution(ExponentialDistribution),
        lambda z: 2 * z[:, :3],
        lambda z: np.diag([4.0, 4.0, 4.0, 0.0]),
        lambda z, y: jnp.sum(2 * z[:3] - jnp.exp(2 * z[:3]) * y),
        lambda z: grid(*(gamma(1, 2 * zi) for zi in z[:3])),
    ),
    "own": Case(
        Gamma(),
        lambda z: z,
        lambda z: 2 * np.eye(4),
        lambda z, y: jnp.sum(2 * z - jnp.exp(z) * y),
        lambda z: grid(*(gamma(2, zi) for zi in z)),
    ),
}
MODELS = {
    name: lambda params, x, case=case: case.outputs(network(params, x))
    for name, case in CASES.items()
}
METRICS = {name: ng.exact_fisher(MODELS[name], case.likelihood) for name, case in CASES.items()}
every_likelihood = pytest.mark.parametrize("name", CASES)


@functools.cache
def outputs_and_jacobian(elsewhere: bool = False) -> tuple[np.ndarray, np.ndarray]:
    theta = ELSEWHERE if elsewhere else THETA
    both = jax.jit(lambda t: (network(tree(t), X), jax.jacrev(lambda t: network(tree(t), X))(t)))
    return tuple(map(np.asarray, both(theta)))


def pulled_back(information: Callable[[np.ndarray], np.ndarray], elsewhere: bool = False):
    z, jacobian = outputs_and_jacobian(elsewhere)
    return sum(j.T @ information(row) @ j for row, j in zip(z, jacobian, strict=True)) / len(z)


@every_likelihood
def test_A1_product_by_jvp_and_vjp_is_the_dense_pull_back(name):
    metric, fisher = METRICS[name], pulled_back(CASES[name].information)
    product = ng.fisher_vector_product(metric, tree(THETA), X, tree(TANGENT))
    matrix = ng.fisher_matrix(metric, tree(THETA), X)
    assert error(flat(product), fisher @ TANGENT) < TOL
    assert error(matrix, fisher) < TOL
    assert error(flat(product), pulled_back(lambda z: np.eye(4)) @ TANGENT) > VISIBLE


@every_likelihood
def test_A2_expected_outer_product_of_scores_is_the_fisher_matrix(name):
    case = CASES[name]
    gradients = jax.jit(jax.vmap(jax.grad(case.log_prob), in_axes=(None, 0)))

    def second_moment(z, drawn_from):
        targets, weights = case.support(drawn_from)
        s = np.asarray(gradients(z, targets))
        return s.T @ (weights[:, None] * s)

    fisher = ng.fisher_matrix(METRICS[name], tree(THETA), X)
    assert error(fisher, pulled_back(lambda z: second_moment(z, z))) < TOL
    other = lambda z: z + np.array([0.9, -0.6, 0.5, -0.8])
    assert error(fisher, pulled_back(lambda z: second_moment(z, other(z)))) > VISIBLE


@every_likelihood
def test_A3_hessian_of_the_mean_kl_is_the_fisher_matrix_and_its_gradient_vanishes(name):
    @jax.jit
    def derivatives(p, q):
        def kl(both):
            pair = tree(both[: len(p)]), tree(both[len(p) :])
            return ng.kl_divergence(MODELS[name], CASES[name].likelihood, *pair, X)

        both = jnp.concatenate([p, q])
        return jax.grad(kl)(both), jax.jacfwd(jax.grad(kl))(both)

    def halves(p, q):
        gradient, hessian = map(np.asarray, derivatives(p, q))
        return [(gradient[half], hessian[half, half]) for half in (np.s_[:25], np.s_[25:])]

    fisher = pulled_back(CASES[name].information)
    for gradient, hessian in halves(THETA, THETA):
        np.testing.assert_allclose(gradient, 0, atol=TOL)
        assert error(hessian, fisher) < TOL
    for gradient, hessian in halves(THETA, ELSEWHERE):
        assert np.linalg.norm(gradient) > VISIBLE
        assert error(hessian, fisher) > VISIBLE


@pytest.mark.parametrize("name", ["categorical", "normal", "diagonal normal"])
def test_A4_kl_over_the_quadratic_form_tends_to_one_linearly(name):
    def deviation(fisher, size):
        params = tree(THETA), tree(THETA + size * TANGENT)
        kl = ng.kl_divergence(MODELS[name], CASES[name].likelihood, *params, X)
        return abs(float(kl) / (size**2 * TANGENT @ fisher @ TANGENT / 2) - 1)

    fisher = pulled_back(CASES[name].information)
    errors = [deviation(fisher, size) for size in (1e-3, 1e-4)]
    assert errors[0] < 0.01
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert deviation(pulled_back(lambda z: np.eye(4)), 1e-4) > VISIBLE


CANONICAL = {
    "categorical": np.array([0, 3, 1, 1, 2]),
    "bernoulli": RNG.integers(0, 2, size=(5, 4)).astype(float),
    "normal": RNG.normal(size=(5, 4)),
}


@pytest.mark.parametrize("name", CANONICAL)
def test_A5_hessian_of_a_generalised_linear_model_is_the_fisher_matrix(name):
    likelihood = CASES[name].likelihood
    linear = lambda w, x: x @ w.reshape(2, 4)

    def relative(model, theta, to_params):
        @jax.jit
        def both(theta, x, y):
            loss = lambda t: -jnp.mean(likelihood.log_prob(model(to_params(t), x), y))
            metric = ng.exact_fisher(lambda t, x: model(to_params(t), x), likelihood)
            return jax.hessian(loss)(theta), ng.fisher_matrix(metric, theta, x)

        hessian, fisher = both(theta, X, CANONICAL[name])
        return error(hessian, np.asarray(fisher))

    assert relative(linear, TANGENT[:8], lambda t: t) < TOL
    assert relative(network, THETA, tree) > VISIBLE


def test_A6_without_residuals_the_empirical_fisher_vanishes_and_the_fisher_does_not():
    case = CASES["normal"]
    log_prob = lambda params, batch: case.likelihood.log_prob(network(params, batch[0]), batch[1])
    metric = ng.empirical_fisher(log_prob)
    fitted = network(tree(THETA), X)
    empirical = lambda y: ng.fisher_matrix(metric, tree(THETA), (X, y))
    np.testing.assert_allclose(empirical(fitted), 0, atol=TOL)
    assert np.linalg.norm(pulled_back(case.information)) > VISIBLE
    assert np.linalg.norm(empirical(fitted + 1)) > VISIBLE


def test_A7_fisher_of_a_union_is_the_mean_weighted_by_the_numbers_of_examples():
    fisher = lambda x: np.asarray(ng.fisher_matrix(METRICS["bernoulli"], tree(THETA), x))
    one, two, union = fisher(X[:2]), fisher(X[2:]), fisher(X)
    assert error((2 * one + 3 * two) / 5, union) < TOL
    assert error((one + two) / 2, union) > 0.01


def test_A8_fisher_of_a_mean_and_a_log_scale_is_diagonal_and_known():
    def fisher(scale_of, params):
        model = lambda p, x: (p[0] + 0 * x, scale_of(p[1]) + 0 * x)
        metric = ng.exact_fisher(model, ng.DiagonalNormal())
        return np.asarray(ng.fisher_matrix(metric, np.asarray(params), X[:, 0]))

    sigma = 0.4
    expected = np.diag([sigma**-2, 2])
    np.testing.assert_allclose(fisher(lambda s: s, [1.3, np.log(sigma)]), expected, atol=TOL)
    assert error(fisher(jnp.log, [1.3, sigma]), expected) > VISIBLE


@pytest.mark.parametrize("sampled", [False, True])
def test_A9_fisher_of_a_fixed_variance_scales_as_its_inverse(sampled):
    def fisher(scale):
        make = ng.sampled_fisher if sampled else ng.exact_fisher
        metric, key = make(network, ng.Normal(scale)), jax.random.key(1)
        return np.asarray(ng.fisher_matrix(metric, tree(THETA), X, key=key))

    assert error(3.0**2 * fisher(3.0), fisher(1.0)) < TOL
    assert error(3.0 * fisher(3.0), fisher(1.0)) > VISIBLE


def test_A10_empirical_fisher_is_the_mean_of_outer_products():
    labels = CANONICAL["categorical"]
    picked = lambda t: jax.nn.log_softmax(network(tree(t), X))[np.arange(5), labels]
    scores = np.asarray(jax.jit(jax.jacrev(picked))(THETA))
    log_prob = lambda p, batch: ng.Categorical().log_prob(network(p, batch[0]), batch[1])
    metric = ng.empirical_fisher(log_prob)
    empirical = ng.fisher_matrix(metric, tree(THETA), (X, labels))
    assert error(empirical, scores.T @ scores / 5) < TOL
    assert error(empirical, np.outer(scores.mean(axis=0), scores.mean(axis=0))) > VISIBLE


def test_A11_sampled_fisher_tends_to_the_exact_one_at_the_monte_carlo_rate():
    # Heads of both kinds: finitely many targets, and a continuum.
    name = "joint"
    metric = ng.sampled_fisher(MODELS[name], CASES[name].likelihood)
    keys = jax.random.split(jax.random.key(7), 64 * 32)
    draw = lambda key: ng.fisher_matrix(metric, tree(THETA), X, key=key)
    fishers = np.asarray(jax.jit(jax.vmap(draw))(keys))

    def distances(expected, together):
        means = fishers.reshape(-1, together, *expected.shape).mean(axis=1)
        return np.sqrt(np.mean(np.sum((means - expected) ** 2, axis=(1, 2))))

    exact, wrong = (pulled_back(CASES[name].information, elsewhere) for elsewhere in (False, True))
    # 64 independent means of 32 draws: their mean distance is known to about 10 %.
    assert distances(exact, 1) / distances(exact, 32) == pytest.approx(32**0.5, rel=0.3)
    assert distances(exact, 2048) < 3 * distances(exact, 1) / 2048**0.5
    assert distances(wrong, 2048) > 10 * distances(exact, 1) / 2048**0.5

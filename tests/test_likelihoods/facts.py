"""What a likelihood of the table says, computed once for all tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.likelihoods import Likelihood
from tests.test_likelihoods import families
from tests.test_likelihoods import oracles

CASES = oracles.CASES | families.CASES
METHODS = ("fisher_product", "fisher_factor_product")

every_case = pytest.mark.parametrize("name", CASES)
every_divergence = pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.has_kl])


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
    likelihood, outputs, _, support, _, has_kl = CASES[name]
    default = Hidden(likelihood)

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

        found = {
            "log_probs": jax.vmap(lambda y: likelihood.log_prob(z, y))(y),
            "scores": flat(jax.vmap(lambda y: score(likelihood, z, y))(y), 2),
            "fisher": dense(likelihood.fisher_product, z),
            "factor": dense(likelihood.fisher_factor_product, z),
            "mean_hessian": dense(lambda z, v: jax.jvp(mean_score, (z,), (v,))[1], z),
        }
        if not has_kl:
            return found
        return found | {
            "default_fisher": dense(default.fisher_product, z),
            "default_factor": dense(default.fisher_factor_product, z),
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

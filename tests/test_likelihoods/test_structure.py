"""Positions, rows, transformations and dtypes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Bernoulli
from natgrad_jax.likelihoods import Beta
from natgrad_jax.likelihoods import Binomial
from natgrad_jax.likelihoods import Categorical
from natgrad_jax.likelihoods import Gamma
from natgrad_jax.likelihoods import NegativeBinomial
from natgrad_jax.likelihoods import Normal
from natgrad_jax.likelihoods import Ordinal
from natgrad_jax.likelihoods import StudentT
from tests.test_likelihoods import oracles
from tests.test_likelihoods.facts import METHODS
from tests.test_likelihoods.facts import Hidden
from tests.test_likelihoods.facts import arrays
from tests.test_likelihoods.facts import assert_trees_close
from tests.test_likelihoods.facts import flat

INF = float("inf")


TRAILING = {n: c.likelihood for n, c in oracles.CASES.items() if n != "normal_scales"} | {
    "normal_scales": Normal(np.array([[0.5, 2.0]])),
    "binomial": Binomial(np.array([[3.0, 7.0]])),
    "negative_binomial": NegativeBinomial(0.5),
    "gamma": Gamma(),
    "beta": Beta(),
    "student_t": StudentT(),
    "ordinal": Ordinal(),
}
WITHOUT_KL = ("student_t",)
COUNTS = ("categorical", "poisson", "binomial", "negative_binomial", "ordinal")
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
    numbers = jnp.asarray(rng.integers(2, size=shape))
    if name == "ordinal":
        return (draw(), draw(3)), (draw(), draw(3)), numbers
    if name in ("diagonal_normal", "gamma", "beta", "student_t"):
        leaves = range(3 if name == "student_t" else 2)
        y = jnp.asarray(rng.uniform(0.1, 0.9, size=shape), dtype)
        z, q = (tuple(draw() for _ in leaves) for _ in range(2))
        return z, q, y
    event = (4,) if name == "categorical" else ()
    return draw(*event), draw(*event), numbers


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
            if method == "kl" and name in WITHOUT_KL:
                continue
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
            if method == "kl" and name in WITHOUT_KL:
                continue
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
    drawn = "int32" if name in COUNTS else wide
    assert kinds(likelihood.sample, jax.random.key(0), z) == {drawn}
    assert name in WITHOUT_KL or kinds(likelihood.kl, z, z) == {wide}
    for target in (drawn, "int8" if name in ("categorical", "ordinal") else "bfloat16", "int64"):
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

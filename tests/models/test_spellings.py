"""J2: writing a model another way changes nothing but what `explain` may say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import natgrad_jax as ng
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")


def layers(p):
    return [(p["w"][i], p["b"][i]) for i in range(3)]


def right(p, x):
    for w, b in layers(p):
        x = jnp.tanh(x @ w + b)
    return x


def left(p, x):
    z = x.T
    for w, b in layers(p):
        z = jnp.tanh(w.T @ z + b[:, None])
    return z.T


def vmapped(p, x):
    return jax.vmap(lambda x: right(p, x))(x)


def one_by_one(p, x):
    return jnp.concatenate([right(p, x[i : i + 1]) for i in range(x.shape[0])])


def einsum(p, x):
    for w, b in layers(p):
        x = jnp.tanh(jnp.einsum("kj,nk->nj", w, x) + b)
    return x


def scanned(p, x):
    return lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None), x, p)[0]


def looped(p, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i] + p["b"][i]), x)


def jitted(p, x):
    layer = jax.jit(lambda w, b, x: jnp.tanh(x @ w + b))
    for w, b in layers(p):
        x = layer(w, b, x)
    return x


def rematerialised(p, x):
    return jax.checkpoint(right)(p, x)


def as_convolution(p, x):
    for w, b in layers(p):
        z = lax.conv_general_dilated(
            x[:, None, :], w[None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        x = jnp.tanh(z[:, 0] + b)
    return x


SPELLINGS = [left, vmapped, einsum, scanned, looped, jitted, rematerialised, as_convolution]


def arguments():
    rng = np.random.default_rng(0)
    return {
        "b": jnp.asarray(rng.normal(size=(3, 4))),
        "w": jnp.asarray(rng.normal(size=(3, 4, 4))),
    }, (jnp.asarray(rng.normal(size=(5, 4))))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_a_spelling_changes_no_number(spelling):
    p, x = arguments()
    np.testing.assert_allclose(spelling(p, x), right(p, x), rtol=1e-12)
    gram = lambda f: np.asarray(ng.gram_matrix(ng.gauss_newton(f), p, x))
    np.testing.assert_allclose(gram(spelling), gram(right), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("spelling", [right, *SPELLINGS], ids=lambda f: f.__name__)
def test_every_spelling_factors(spelling):
    report = ng.explain(ng.gauss_newton(spelling), *arguments())
    assert report.mode == "examples"
    assert [leaf.form for leaf in report.leaves] == ["rows", "factored"]


def test_examples_sliced_out_one_by_one_are_put_together():
    p, x = arguments()
    metric = ng.gauss_newton(one_by_one)
    gram, warned = oracle.quietly(ng.gram_matrix, metric, p, x)
    assert not warned
    np.testing.assert_allclose(gram, ng.gram_matrix(ng.gauss_newton(right), p, x), atol=1e-12)

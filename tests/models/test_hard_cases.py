"""Models at the edge of what the reader can follow: exact, whatever it makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import natgrad_jax as ng
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def through_cond(p, x):
    """A leaf that is dense: its rows are computed example by example where that is allowed."""
    return lax.cond(p["s"] > 0, lambda w: x @ w, lambda w: -x @ w, p["w"])


def tanh_scan(layers, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]


def normalised_in_a_loop(p, x):
    def layer(h, w):
        own = jnp.tanh(w)
        return lax.scan(lambda h, _: (jnp.tanh(h @ own), None), h, None, length=2)[0], None

    return lax.scan(layer, x, p["w"])[0]


def shared_kernel(p, x):
    kernel = jnp.broadcast_to(p["k"][..., None, None], (1, 2, 1, 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    images = x.reshape(-1, 1, 4, 2)
    result = lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
    )
    return result.reshape(x.shape[0], -1)


def nested_maps(p, x):
    def one(pair):
        step = lambda h, _: (jnp.tanh(h @ p["w"]), None)
        return lax.scan(step, pair[0], None, length=2)[0] * pair[1]

    split = x.reshape(3, 3, 8)
    return lax.map(lambda pair: lax.map(one, pair), (split, 2 * split)).reshape(9, 8)


def own_rule(backward):
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), backward)
    return lambda p, x: product(p["w"], x)


@jax.custom_jvp
def with_a_constant(w, x):
    return x @ w, jnp.sin(w)


@with_a_constant.defjvp
def _with_a_constant_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return with_a_constant(w, x), (dx @ w + x @ dw, jnp.cos(w) * dw)


# As numpy: float64 is on within a test alone.
W, SQUARE = {"w": draw(1, 8, 3)}, {"w": draw(2, 8, 8)}
GATED = {"w": draw(1, 8, 3), "s": draw(3)}
MODELS = {
    "tiled copies": (
        lambda p, x: jnp.einsum(
            "ngi,gij->ngj", x.reshape(9, 4, 2), jnp.tile(p["w"], (2, 1, 1))
        ).reshape(9, -1),
        {"w": draw(1, 2, 2, 3)},
    ),
    "tied layers": (lambda p, x: tanh_scan(jnp.broadcast_to(p["w"], (3, 8, 8)), x), SQUARE),
    "repeated layers": (
        lambda p, x: tanh_scan(jnp.repeat(p["w"], 2, axis=0), x),
        {"w": draw(1, 2, 8, 8)},
    ),
    "tied biases": (
        lambda p, x: lax.scan(
            lambda h, b: (jnp.tanh(h + b), None), x, jnp.broadcast_to(p["b"], (3, 8))
        )[0],
        {"b": draw(1, 8)},
    ),
    "a kernel shared by channels": (shared_kernel, {"k": draw(1, 1, 2)}),
    "divided by a sum of ones": (
        lambda p, x: through_cond(p, x) / jnp.ones(x.shape[0]).sum(),
        GATED,
    ),
    "a softmax over constants": (
        lambda p, x: through_cond(p, x) * jax.nn.softmax(jnp.zeros(x.shape[0]))[0],
        GATED,
    ),
    "raised to the number of examples": (
        lambda p, x: through_cond(p, 0.5 * x) ** x.shape[0],
        GATED,
    ),
    "as many steps as examples": (
        lambda p, x: lax.fori_loop(0, x.shape[0], lambda i, c: c * 1.1, through_cond(p, x)),
        GATED,
    ),
    "a branch on the number of examples": (
        lambda p, x: through_cond(p, x) * (2.0 if x.shape[0] > 4 else 1.0),
        GATED,
    ),
    "a weight for each position": (
        lambda p, x: lax.scan(lambda c, x: (c * p["d"], c * x), 1.0, x)[1],
        {"d": draw(3)},
    ),
    "a counter over examples": (
        lambda p, x: lax.scan(
            lambda i, x: (i + 1, lax.cond(i > 4, lambda w: x @ w, lambda w: -x @ w, p["w"])), 0, x
        )[1],
        W,
    ),
    "a root of an inner loop": (
        lambda p, x: normalised_in_a_loop(p, x) * jnp.exp(p["g"]),
        {"w": draw(1, 3, 8, 8), "g": draw(2, 8)},
    ),
    "a root of an inner loop alone": (normalised_in_a_loop, {"w": draw(1, 3, 8, 8)}),
    "a look-up in a broadcast table": (
        lambda p, x: jnp.broadcast_to(p["e"], (5, 4))[jnp.argsort(x)[:, :2] % 5].reshape(9, -1),
        {"e": draw(1, 4)},
    ),
    "indices out of range": (
        lambda p, x: p["e"][jnp.argmax(x, 1) * 3 - 9],
        {"e": draw(1, 4, 2)},
    ),
    "a barrier": (lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))), W),
    "a result without examples": (
        lambda p, x: with_a_constant(p["w"], x)[0] + with_a_constant(p["w"], x)[1].sum(),
        W,
    ),
    "maps within maps": (nested_maps, SQUARE),
    "parts of a complex array of two precisions": (
        lambda p, x: jnp.abs(x @ (p["re"] + 1j * p["im"])),
        {"re": draw(1, 8, 3), "im": draw(2, 8, 3).astype(np.float32)},
    ),
    "a rule that sums over examples": (own_rule(lambda r, g: (r[1].T @ g, g @ r[0].T)), W),
}
#: Derivative rules that mix examples although their functions do not, and a sum over none.
MIXING = {
    "a rule with a mean": own_rule(lambda r, g: (r[1].mean() * r[1].T @ g, g @ r[0].T)),
    "a sum over an empty slice": lambda p, x: x @ p["w"] + x[:0].reshape(-1).sum(),
    "a rule with sums so far": own_rule(lambda r, g: (r[1].T @ jnp.cumsum(g, 0), g @ r[0].T)),
}


def agrees(model, params, x, rtol):
    params, x = jax.tree.map(jnp.asarray, (params, x))
    v = oracle.draw_like(params, 1)
    size = jax.eval_shape(model, params, x).size

    def everything(params, x, v, u):
        return oracle.gauss_newton_rows(model, params, x), oracle.engine_results(
            model, params, x, v, u
        )

    everything_at = params, x, v, jnp.asarray(draw(2, size))
    (rows, results), warned = oracle.quietly(oracle.compiled, everything, *everything_at)
    expected = oracle.expected_results(np.asarray(rows), params, v, draw(2, size))
    oracle.assert_same(results, expected, rtol)
    return warned


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_those_of_reverse_mode(name):
    model, params = MODELS[name]
    assert not agrees(model, params, draw(0, 9, 8), 1e-5 if "precisions" in name else 1e-10)


def test_examples_along_a_new_dimension_of_the_same_size():
    model = lambda p, x: jnp.moveaxis(
        jnp.tanh(jnp.stack([x, jnp.broadcast_to(p["s"], x.shape)])), 0, 2
    ).reshape(9, -1)
    assert not agrees(model, {"s": draw(1)}, draw(0, 9, 9), 1e-10)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_is_found(name):
    assert agrees(MIXING[name], W, draw(0, 9, 8), 1e-10)


def test_kfac_takes_a_parameter_without_entries():
    params, x = {"w": draw(1, 8, 2), "z": draw(1, 0, 3)}, draw(0, 9, 8)
    params, x = jax.tree.map(jnp.asarray, (params, x))
    model = lambda p, x: jnp.concatenate([x @ p["w"], x[:, :0] @ p["z"]], 1)
    solver = ng.kfac(x, damping_split="exact")
    tx = ng.scale_by_natural_gradient(ng.gauss_newton(model), solver=solver)
    updates, _ = tx.update(params, tx.init(params), params, batch=x)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))

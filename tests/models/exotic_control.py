"""Models of many trades, continued: rules of their own, loops, branches, sorting, small shapes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.models.zoo import Draw
from tests.models.zoo import N
from tests.models.zoo import specimen


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _leaky(x, slope):
    return jnp.where(x > 0, x, slope * x)


@_leaky.defjvp
def _leaky_jvp(slope, primals, tangents):
    (x,), (t,) = primals, tangents
    return _leaky(x, slope), jnp.where(x > 0, t, slope * t)


@specimen("an activation with its own jvp, and another inside it")
def custom_jvp_activation(key):
    r = Draw(key)
    p = {"w": r(4, 6), "b": r(6), "v": r(6, 2)}
    f = lambda p, x: jax.nn.relu(_leaky(jax.nn.silu(x @ p["w"] + p["b"]), 0.1)) @ p["v"]
    return f, p, r(N, 4)


@specimen("rematerialised blocks in a scan, with a policy")
def rematerialised_scan(key):
    r = Draw(key)
    p = {"up": r(2, 3, 5), "down": r(2, 5, 3)}

    def f(p, x):
        policy = jax.checkpoint_policies.dots_saveable
        block = jax.checkpoint(lambda h, w: h + jnp.tanh(h @ w["up"]) @ w["down"], policy=policy)
        return lax.scan(lambda h, w: (block(h, w), None), x, p)[0]

    return f, p, r(N, 3)


@specimen("complex numbers in a scan in a rematerialised block", dense=("phase",))
def complex_scan_rematerialised(key):
    r = Draw(key)
    p = {"re": r(3, 4), "im": r(3, 4), "phase": r(4), "v": r(4, 2)}

    @jax.checkpoint
    def block(p, x):
        w, turn = lax.complex(p["re"], p["im"]), jnp.exp(1j * p["phase"])
        step = lambda h, u: (turn * h + u @ w, None)
        return lax.scan(step, jnp.zeros((x.shape[1], 4), w.dtype), x)[0]

    f = lambda p, x: jnp.abs(block(p, x.swapaxes(0, 1)) + 0.1) @ p["v"]
    return f, p, r(N, 4, 3)


@specimen("one weight in a fori_loop, beside a weight for each turn")
def fori_loop(key):
    r = Draw(key)
    p = {"w": r(4, 4), "each": r(3, 4, 4)}
    body = lambda p, i, h: jnp.tanh(h @ p["w"] + h @ p["each"][i])
    return lambda p, x: lax.fori_loop(0, 3, lambda i, h: body(p, i, h), x), p, r(N, 4)


@specimen("a branch for each example by switch under vmap")
def switch_on_data(key):
    r = Draw(key)
    p = {"a": r(4, 2), "b": r(4, 2), "c": r(4, 2)}

    def one(p, i, x):
        return lax.switch(
            i, [lambda: x @ p["a"], lambda: jnp.tanh(x @ p["b"]), lambda: (x @ p["c"]) ** 2]
        )

    return lambda p, b: jax.vmap(one, (None, 0, 0))(p, *b), p, (r.integers(3, N), r(N, 4))


@specimen("a branch for each example by cond under vmap, of layers around it")
def cond_on_data(key):
    r = Draw(key)
    p = {"w": r(4, 4), "v": r(4, 2)}

    def one(p, x):
        h = x @ p["w"]
        h = lax.cond(h[0] > 0, jnp.tanh, lambda h: h * jax.nn.sigmoid(h), h)
        return h @ p["v"]

    return lambda p, x: jax.vmap(one, (None, 0))(p, x), p, r(N, 4)


@specimen("experts routed to by top_k, their weights gathered", dense=("w",))
def top_k_routing(key):
    r = Draw(key)
    p = {"gate": r(4, 3), "w": r(3, 4, 2)}

    def f(p, x):
        scores, chosen = lax.top_k(x @ p["gate"], 2)
        own = p["w"][chosen]
        return jnp.einsum("nk,nd,nkdo->no", jax.nn.softmax(scores), x, own)

    return f, p, r(N, 4)


@specimen("experts routed to by top_k, by one-hot masks")
def top_k_masks(key):
    r = Draw(key)
    p = {"gate": r(4, 3), "w": r(3, 4, 2)}

    def f(p, x):
        scores, chosen = lax.top_k(x @ p["gate"], 2)
        routes = jax.nn.one_hot(chosen, 3, dtype=x.dtype)
        gains = jnp.einsum("nk,nke->ne", jax.nn.softmax(scores), routes)
        return jnp.einsum("ne,neo->no", gains, jnp.tanh(jnp.einsum("nd,edo->neo", x, p["w"])))

    return f, p, r(N, 4)


@specimen("sort pooling over the points of a cloud")
def sort_pooling(key):
    r = Draw(key)
    p = {"w": r(3, 4), "v": r(8, 2)}

    def f(p, x):
        h = jnp.sort(jnp.tanh(x @ p["w"]), axis=1)[:, -2:]
        return h.reshape(x.shape[0], -1) @ p["v"]

    return f, p, r(N, 5, 3)


@specimen("points ordered by a score, by argsort and take_along_axis")
def ordered_points(key):
    r = Draw(key)
    p = {"w": r(3, 4), "v": r(4, 2)}

    def f(p, x):
        h = jnp.tanh(x @ p["w"])
        order = jnp.argsort(h[..., :1], axis=1)
        return jnp.cumprod(jnp.take_along_axis(h, order, axis=1), axis=1).sum(1) @ p["v"]

    return f, p, r(N, 4, 3)


@specimen("examples along the last axis inside the model, and back")
def examples_last(key):
    r = Draw(key)
    p = {"w": r(3, 4), "b": r(4), "v": r(4, 2)}

    def f(p, x):
        z = jnp.moveaxis(x, 0, -1)
        h = jnp.einsum("fh,tfn->thn", p["w"], z) + p["b"][:, None]
        h = jax.nn.softmax(h, axis=0).sum(0)
        return jnp.tensordot(h, p["v"], ((0,), (0,)))

    return f, p, r(N, 5, 3)


@specimen("one class, and one feature")
def one_class(key):
    r = Draw(key)
    p = {"w": r(1, 3), "b": r(3), "v": r(3, 1), "c": r(1)}
    return lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"], p, r(N, 1)


@specimen("map over the examples, to save memory")
def mapped_examples(key):
    r = Draw(key)
    p = {"w": r(4, 6), "b": r(6), "v": r(6, 2)}
    return lambda p, x: lax.map(lambda x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], x), p, r(N, 4)


@specimen("map over the examples two by two, with one left over")
def mapped_pairs(key):
    r = Draw(key)
    p = {"w": r(4, 6), "v": r(6, 2)}
    f = lambda p, x: lax.map(lambda x: jnp.sin(x @ p["w"]) @ p["v"], x, batch_size=2)
    return f, p, r(N, 4)


@specimen("forces: the gradient of an energy by positions, distances of pairs", dense=("v",))
def forces(key):
    r = Draw(key)
    p = {"w": r(3, 4), "b": r(4), "v": r(4)}

    def energy(p, x):
        i, j = jnp.tril_indices(3, k=-1)
        distances = jnp.sqrt(jnp.sum((x[i] - x[j]) ** 2, axis=-1) + 0.1)
        return jnp.tanh(distances @ p["w"] + p["b"]) @ p["v"]

    f = lambda p, x: -jax.vmap(jax.grad(energy, argnums=1), (None, 0))(p, x)
    return f, p, r(N, 3, 2)

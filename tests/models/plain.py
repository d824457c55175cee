"""Plain JAX: every orientation and spelling of a linear use."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.models.zoo import Draw
from tests.models.zoo import N
from tests.models.zoo import specimen


@specimen("the textbook net, weights on the right")
def mlp(key):
    r = Draw(key)
    p = {"w1": r(4, 6), "b1": r(6), "w2": r(6, 3), "b2": r(3)}
    return lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], p, r(N, 4)


@specimen("weights on the left, examples in columns")
def weights_on_the_left(key):
    r = Draw(key)
    p = {"w1": r(6, 4), "b1": r(6, 1), "w2": r(3, 6)}
    return lambda p, x: (p["w2"] @ jnp.tanh(p["w1"] @ x.T + p["b1"])).T, p, r(N, 4)


@specimen("transposed weights")
def transposed_weights(key):
    r = Draw(key)
    p = {"w1": r(6, 4), "w2": r(3, 6)}
    return lambda p, x: jnp.tanh(x @ p["w1"].T) @ p["w2"].T, p, r(N, 4)


@specimen("vmap over examples of a function of vectors")
def vmapped(key):
    r = Draw(key)
    p = {"w1": r(6, 4), "b1": r(6), "w2": r(3, 6)}
    one = lambda p, x: p["w2"] @ jnp.tanh(p["w1"] @ x + p["b1"])
    return lambda p, x: jax.vmap(one, (None, 0))(p, x), p, r(N, 4)


@specimen("layers behind jit, one of them called twice")
def jitted_layers(key):
    r = Draw(key)
    p = {"w1": r(4, 4), "w2": r(4, 4)}
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return lambda p, x: layer(p["w2"], layer(p["w1"], x)), p, r(N, 4)


@specimen("one weight matrix at two depths")
def tied_depths(key):
    r = Draw(key)
    return lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]), {"w": r(4, 4)}, r(N, 4)


@specimen("one weight matrix, used upright and transposed (autoencoder)")
def tied_transposed(key):
    r = Draw(key)
    p = {"w": r(4, 3), "b": r(4)}
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"], p, r(N, 4)


@specimen("a scalar and vectors enter nonlinearly", dense=("c",))
def nonlinear_uses(key):
    r = Draw(key)
    p = {"a": r(), "b": r(4), "c": r(4)}
    f = lambda p, x: jnp.exp(p["a"] * x) + jnp.maximum(x, p["b"]) ** 2 + x / (2 + p["c"] ** 2)
    return f, p, r(N, 4)


@specimen("weights normalised before use", dense=("v", "g"))
def weight_norm(key):
    r = Draw(key)
    p = {"v": r(4, 3), "g": r(3)}
    f = lambda p, x: x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"])
    return f, p, r(N, 4)


@specimen("masked weights of an autoregressive net", dense=("w",))
def masked_weights(key):
    r = Draw(key)
    mask = jnp.tril(jnp.ones((4, 4)))
    return lambda p, x: jnp.tanh(x @ (p["w"] * mask)), {"w": r(4, 4)}, r(N, 4)


@specimen("weights scaled by a constant (NTK parametrisation)")
def scaled_weights(key):
    r = Draw(key)
    p = {"w1": r(4, 6), "b1": r(6), "w2": r(6, 2)}
    f = lambda p, x: jnp.tanh(x @ (p["w1"] / 2.0) + p["b1"]) @ (-0.3 * p["w2"])
    return f, p, r(N, 4)


@specimen("parameters alone reach an output (log-scale of a Gaussian)")
def state_independent_scale(key):
    r = Draw(key)
    p = {"w": r(4, 2), "log_scale": r(2)}
    f = lambda p, x: (x @ p["w"], jnp.broadcast_to(p["log_scale"], (x.shape[0], 2)))
    return f, p, r(N, 4)


@specimen("an exponential of parameters multiplies outputs", dense=("log_scale",))
def exponential_scale(key):
    r = Draw(key)
    p = {"w": r(4, 2), "log_scale": r(2)}
    return lambda p, x: jnp.exp(p["log_scale"]) * jnp.sin(x @ p["w"]), p, r(N, 4)


@specimen("one weight over positions of a sequence")
def sequence(key):
    r = Draw(key)
    p = {"w1": r(3, 4), "b": r(4), "w2": r(4, 2)}
    f = lambda p, x: jnp.mean(jnp.tanh(x @ p["w1"] + p["b"]) @ p["w2"], axis=1)
    return f, p, r(N, 6, 3)


@specimen("positions merged with examples by a reshape, and back")
def merged_positions(key):
    r = Draw(key)
    p = {"w": r(3, 4)}
    f = lambda p, x: jnp.tanh(x.reshape(-1, 3) @ p["w"]).reshape(-1, 6 * 4)
    return f, p, r(N, 6, 3)


@specimen("positions before examples (time-major)")
def time_major(key):
    r = Draw(key)
    p = {"w": r(3, 4)}

    def f(p, x):
        z = jnp.tanh(x.swapaxes(0, 1).reshape(-1, 3) @ p["w"])
        return z.reshape(6, -1, 4).sum(0)

    return f, p, r(N, 6, 3)


@specimen("tokens as rows: several rows for each example")
def tokens_as_rows(key):
    r = Draw(key)
    p = {"w": r(3, 4), "v": r(4, 2)}
    f = lambda p, x: jnp.tanh(jnp.cumsum(x @ p["w"], axis=1)).reshape(-1, 4) @ p["v"]
    return f, p, r(N, 3, 3)


@specimen("self-attention written with einsum, heads in the weights")
def attention_einsum(key):
    r = Draw(key)
    p = {"q": r(4, 2, 3), "k": r(4, 2, 3), "v": r(4, 2, 3), "o": r(2, 3, 4)}

    def f(p, x):
        q, k, v = (jnp.einsum("ntd,dhk->nhtk", x, p[i]) for i in "qkv")
        a = jax.nn.softmax(jnp.einsum("nhtk,nhsk->nhts", q, k) / 3**0.5)
        return jnp.einsum("nhts,nhsk,hkd->ntd", a, v, p["o"]).mean(1)

    return f, p, r(N, 3, 4)


@specimen("self-attention with one projection, split")
def attention_split(key):
    r = Draw(key)
    p = {"qkv": r(4, 12), "o": r(4, 4)}

    def f(p, x):
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        a = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k))
        return (jnp.einsum("nts,nsd->ntd", a, v) @ p["o"]).sum(1)

    return f, p, r(N, 3, 4)


@specimen("weights sliced into blocks that are used apart")
def sliced_weights(key):
    r = Draw(key)
    p = {"w": r(4, 9)}

    def f(p, x):
        a, b = p["w"][:, :4], p["w"][:, 4:6]
        return jnp.tanh(x @ a) @ b + x @ p["w"][:, 7:]

    return f, p, r(N, 4)


@specimen("stacked layers picked by static index")
def stacked_layers(key):
    r = Draw(key)
    p = {"w": r(3, 4, 4), "b": r(3, 4)}

    def f(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i] + p["b"][i])
        return x

    return f, p, r(N, 4)


@specimen("overlapping slices of one matrix", dense=("w",))
def overlapping_slices(key):
    r = Draw(key)
    f = lambda p, x: x @ p["w"][:, :3] + x @ p["w"][:, 1:4]
    return f, {"w": r(4, 4)}, r(N, 4)


@specimen("layers scanned over")
def scanned_layers(key):
    r = Draw(key)
    p = {"w": r(3, 4, 4), "b": r(3, 4)}

    def f(p, x):
        step = lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None)
        return lax.scan(step, x, p)[0]

    return f, p, r(N, 4)


@specimen("a recurrent net in scan, weights held constant")
def recurrent(key):
    r = Draw(key)
    p = {"w": r(4, 4), "u": r(3, 4), "b": r(4), "v": r(4, 2)}

    def f(p, x):
        def step(h, x):
            h = jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"])
            return h, h @ p["v"]

        _, out = lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))
        return out.swapaxes(0, 1)

    return f, p, r(N, 5, 3)


@specimen("a recurrent net with a learned first state, vmapped")
def learned_first_state(key):
    r = Draw(key)
    p = {"w": r(4, 4), "u": r(4, 3), "h": r(4)}

    def one(p, x):
        step = lambda h, x: (jnp.tanh(p["w"] @ h + p["u"] @ x), None)
        return lax.scan(step, p["h"], x)[0]

    return lambda p, x: jax.vmap(one, (None, 0))(p, x), p, r(N, 5, 3)


@specimen("a scan in a scan, layers within time")
def nested_scans(key):
    r = Draw(key)
    p = {"w": r(2, 4, 4), "u": r(3, 4)}

    def f(p, x):
        def time(h, x):
            layer = lambda h, w: (jnp.tanh(h @ w), None)
            return lax.scan(layer, h + x @ p["u"], p["w"])[0], None

        return lax.scan(time, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[0]

    return f, p, r(N, 3, 3)


@specimen("a backwards scan")
def reverse_scan(key):
    r = Draw(key)
    p = {"w": r(3, 4, 4)}
    f = lambda p, x: lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, p["w"], reverse=True)[0]
    return f, p, r(N, 4)


@specimen("stacked weights indexed by the counter of a loop")
def loop_counter(key):
    r = Draw(key)
    f = lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)
    return f, {"w": r(3, 4, 4)}, r(N, 4)


@specimen("rematerialised blocks")
def checkpointed(key):
    r = Draw(key)
    block = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
    p = {"w1": r(4, 5), "w2": r(5, 3)}
    return lambda p, x: block(p["w2"], block(p["w1"], x)), p, r(N, 4)


@jax.custom_vjp
def _dense(x, w):
    return x @ w


_dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))


@specimen("a dense layer with its own backward rule")
def custom_vjp_layer(key):
    r = Draw(key)
    p = {"w1": r(4, 5), "w2": r(5, 3)}
    return lambda p, x: _dense(jnp.tanh(_dense(x, p["w1"])), p["w2"]), p, r(N, 4)


@jax.custom_jvp
def _rounded(x):
    return jnp.round(2 * x) / 2


_rounded.defjvp(lambda x, t: (_rounded(*x), t[0]))


@specimen("straight-through rounding of weights", dense=("w",))
def straight_through(key):
    r = Draw(key)
    return lambda p, x: jnp.tanh(x @ _rounded(p["w"])), {"w": r(4, 3)}, r(N, 4)


@jax.custom_jvp
def _halved(x, w):
    return x @ w


@_halved.defjvp
def _halved_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 0.5 * (dx @ w + x @ dw)


@specimen("a custom rule that is not the derivative of its body")
def untrue_rule(key):
    r = Draw(key)
    p = {"w1": r(4, 5), "w2": r(5, 3)}
    return lambda p, x: _halved(jnp.tanh(_halved(x, p["w1"])), p["w2"]), p, r(N, 4)


@specimen("an embedding and a head")
def embedding(key):
    r = Draw(key)
    p = {"e": r(7, 3), "w": r(3, 2)}
    f = lambda p, i: jnp.tanh(p["e"][i].sum(1)) @ p["w"]
    return f, p, r.integers(7, N, 4)


@specimen("an embedding by jnp.take, used again as the head")
def tied_embedding(key):
    r = Draw(key)
    p = {"e": r(7, 3), "b": r(7)}
    f = lambda p, i: jnp.tanh(jnp.take(p["e"], i, axis=0)).mean(1) @ p["e"].T + p["b"]
    return f, p, r.integers(7, N, 4)


@specimen("an embedding looked up by one example at a time, and positions")
def vmapped_embedding(key):
    r = Draw(key)
    p = {"e": r(7, 3), "s": r(4, 3), "w": r(3, 2)}
    one = lambda p, i: jnp.tanh(p["e"][i] + p["s"]).sum(0) @ p["w"]
    return lambda p, i: jax.vmap(one, (None, 0))(p, i), p, r.integers(7, N, 4)


@specimen("a table with two indices, out of range ones dropped")
def two_indices(key):
    r = Draw(key)
    p = {"t": r(3, 4, 2), "w": r(2, 2)}
    f = lambda p, i: p["t"].at[i[:, 0], i[:, 1]].get(mode="fill", fill_value=0.0) @ p["w"]
    return f, p, r.integers(5, N, 2)


@specimen("layer normalisation")
def layer_norm(key):
    r = Draw(key)
    p = {"w": r(4, 6), "g": r(6), "b": r(6), "v": r(6, 2)}

    def f(p, x):
        h = x @ p["w"]
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)
        return jnp.tanh(h * p["g"] + p["b"]) @ p["v"]

    return f, p, r(N, 4)


@specimen("batch normalisation in training mode: examples mix", mixes=True)
def batch_norm(key):
    r = Draw(key)
    p = {"w": r(4, 3), "g": r(3)}

    def f(p, x):
        h = x @ p["w"]
        return jnp.tanh(p["g"] * (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-2))

    return f, p, r(N, 4)


@specimen("a batched bank of experts, examples routed softly")
def experts(key):
    r = Draw(key)
    p = {"gate": r(4, 3), "w": r(3, 4, 2)}
    f = lambda p, x: jnp.einsum(
        "ne,nek->nk", jax.nn.softmax(x @ p["gate"]), jnp.tanh(jnp.einsum("nd,edk->nek", x, p["w"]))
    )
    return f, p, r(N, 4)


@specimen("weights broadcast to every example by hand")
def broadcast_weights(key):
    r = Draw(key)
    p = {"w": r(4, 3)}
    f = lambda p, x: jnp.einsum("nd,ndk->nk", x, jnp.broadcast_to(p["w"], (x.shape[0], 4, 3)))
    return f, p, r(N, 4)


@specimen("a class token concatenated to each sequence")
def class_token(key):
    r = Draw(key)
    p = {"t": r(1, 1, 3), "w": r(3, 3)}

    def f(p, x):
        t = jnp.broadcast_to(p["t"], (x.shape[0], 1, 3))
        return jnp.tanh(jnp.concatenate([t, x], axis=1) @ p["w"]).mean(1)

    return f, p, r(N, 2, 3)


@specimen("one reshaped vector holds all weights")
def one_vector(key):
    r = Draw(key)

    def f(p, x):
        w1, w2 = p[:20].reshape(4, 5), p[20:].reshape(5, 2)
        return jnp.tanh(x @ w1) @ w2

    return f, r(30), r(N, 4)


@specimen("a bilinear form of the example")
def bilinear(key):
    r = Draw(key)
    return lambda p, x: jnp.einsum("ni,ijk,nj->nk", x, p, x), r(4, 4, 2), r(N, 4)


@specimen("low-rank weights, multiplied before use", dense=("a", "b"))
def low_rank(key):
    r = Draw(key)
    p = {"a": r(4, 2), "b": r(2, 5)}
    return lambda p, x: jnp.tanh(x @ (p["a"] @ p["b"])), p, r(N, 4)


@specimen("parameters behind a branch", dense=("w",))
def branch(key):
    r = Draw(key)
    p = {"w": r(4, 3), "s": r(3)}

    def f(p, x):
        return lax.cond(True, lambda: jnp.tanh(x @ p["w"]), lambda: x @ p["w"]) * p["s"]

    return f, p, r(N, 4)


@specimen("a triangular solve with parameters", dense=("l",))
def triangular(key):
    r = Draw(key)
    p = {"l": jnp.eye(4) + 0.1 * r(4, 4), "w": r(4, 2)}

    def f(p, x):
        return jax.scipy.linalg.solve_triangular(p["l"], x.T, lower=True).T @ p["w"]

    return f, p, r(N, 4)


@specimen("a residual net that ends in a scalar for each example")
def scalar_outputs(key):
    r = Draw(key)
    p = {"w1": r(4, 4), "w2": r(4, 4), "v": r(4)}

    def f(p, x):
        for w in (p["w1"], p["w2"]):
            x = x + jax.nn.gelu(x @ w)
        return x @ p["v"]

    return f, p, r(N, 4)


@specimen("labels picked by advanced indexing: log-probabilities")
def picked_labels(key):
    r = Draw(key)
    p = {"w": r(4, 3)}

    def f(p, batch):
        x, y = batch
        return jax.nn.log_softmax(x @ p["w"])[jnp.arange(x.shape[0]), y]

    return f, p, (r(N, 4), r.integers(3, N))


@specimen("a Laplacian of a net: second derivatives by the input", dense=("w1", "b1", "w2"))
def laplacian(key):
    r = Draw(key)
    p = {"w1": r(2, 5), "b1": r(5), "w2": r(5)}

    def f(p, x):
        u = lambda x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]
        return jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(x)

    return f, p, r(N, 2)


@specimen("a Laplacian by nested jvp, its directions broadcast to the batch")
def laplacian_of_batch(key):
    r = Draw(key)
    p = {"w1": r(2, 5), "b1": r(5), "w2": r(5)}

    def f(p, x):
        u = lambda x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]

        def second(e):
            e = jnp.broadcast_to(e, x.shape)
            slope = lambda x: jax.jvp(u, (x,), (e,))[1]
            return jax.jvp(slope, (x,), (e,))[1]

        return sum(second(e) for e in jnp.eye(2, dtype=x.dtype))

    return f, p, r(N, 2)


@specimen("parameters alone, without a batch", dense=("x",))
def rosenbrock(key):
    r = Draw(key)
    f = lambda p, _: jnp.stack([10 * (p["x"][1] - p["x"][0] ** 2), 1 - p["x"][0]])
    return f, {"x": r(2)}, None


@specimen("the model knows the size of its batch, and hides a weight", dense=("w",))
def divided_by_size(key):
    r = Draw(key)
    p = {"w": r(4, 4), "v": r(4, 2)}

    def f(p, x):
        y = lax.cond(True, lambda: jnp.tanh(x @ p["w"]), lambda: x)
        return y @ p["v"] / x.shape[0]

    return f, p, r(N, 4)


@specimen("a linear solve, which JAX differentiates by a rule of its own")
def linear_solve(key):
    r = Draw(key)
    p = {"a": jnp.eye(4) + 0.1 * r(4, 4), "w": r(4, 2)}
    f = lambda p, x: jnp.linalg.solve(p["a"], x[..., None])[..., 0] @ p["w"]
    return f, p, r(N, 4)


@specimen("one mask for each place in the batch (dropout)")
def dropout(key):
    r = Draw(key)
    p = {"w1": r(4, 6), "w2": r(6, 2)}

    def f(p, x):
        h = jnp.tanh(x @ p["w1"])
        return jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, h.shape), h, 0) @ p["w2"]

    return f, p, r(N, 4)

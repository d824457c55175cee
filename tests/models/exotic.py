"""Models of many trades: what lies beyond layers, written as people there write it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import sparse
from jax.experimental.ode import odeint

from tests.models import implicit
from tests.models.zoo import Draw
from tests.models.zoo import N
from tests.models.zoo import specimen


def _state_space(r):
    shapes = {"decay": (4,), "phase": (4,), "b_re": (3, 4), "b_im": (3, 4)}
    return {name: r(*shape) for name, shape in shapes.items()} | {"c_re": r(4, 2), "c_im": r(4, 2)}


def _multiplier(p):
    return jnp.exp(lax.complex(-jnp.exp(p["decay"]), p["phase"]))


@specimen("a diagonal state-space model, complex, in a scan over time", dense=("decay", "phase"))
def state_space_scan(key):
    r = Draw(key)

    def f(p, x):
        a = _multiplier(p)
        b, c = lax.complex(p["b_re"], p["b_im"]), lax.complex(p["c_re"], p["c_im"])

        def step(h, u):
            h = a * h + u @ b
            return h, jnp.real(h @ c)

        start = jnp.zeros((x.shape[0], 4), b.dtype)
        return lax.scan(step, start, x.swapaxes(0, 1))[1].sum(0)

    return f, _state_space(r), r(N, 6, 3)


@specimen("the same by an associative scan, example by example", dense=("decay", "phase"))
def state_space_associative(key):
    r = Draw(key)

    def one(p, x):
        drive = x @ lax.complex(p["b_re"], p["b_im"])
        a = jnp.broadcast_to(_multiplier(p), drive.shape)
        join = lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1])
        h = lax.associative_scan(join, (a, drive))[1]
        return jnp.real(h @ lax.complex(p["c_re"], p["c_im"])).sum(0)

    return lambda p, x: jax.vmap(one, (None, 0))(p, x), _state_space(r), r(N, 5, 3)


@specimen("a gated linear recurrence by an associative scan along time")
def gated_recurrence(key):
    r = Draw(key)
    p = {"gate": r(3, 4), "w": r(3, 4), "v": r(4, 2)}

    def f(p, x):
        gate = jax.nn.sigmoid(x @ p["gate"])
        join = lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1])
        h = lax.associative_scan(join, (gate, (1 - gate) * (x @ p["w"])), axis=1)[1]
        return h[:, -1] @ p["v"]

    return f, p, r(N, 5, 3)


def _turned(state, qubit, gate):
    """A gate (2, 2) on one qubit of a state (2, 2, 2)."""
    return jnp.moveaxis(jnp.tensordot(gate, state, ((1,), (qubit,))), 0, qubit)


def _rotation_y(t):
    c, s = jnp.cos(t / 2), jnp.sin(t / 2)
    return jnp.array([[c, -s], [s, c]])


def _rotation_x(t):
    c, s = jnp.cos(t / 2), jnp.sin(t / 2)
    return lax.complex(jnp.array([[c, 0], [0, c]]), jnp.array([[0, -s], [-s, 0]]))


@specimen("a simulated quantum circuit: rotation angles to probabilities", dense=("angles",))
def circuit(key):
    r = Draw(key)
    signs = np.ones((2, 2, 2))
    signs[1, 1, :] *= -1
    signs[:, 1, 1] *= -1

    def one(p, x):
        state = jnp.zeros((2, 2, 2), x.dtype).at[0, 0, 0].set(1) * (1 + 0j)
        for angles in p["angles"]:
            for qubit in range(3):
                state = _turned(state, qubit, _rotation_y(x[qubit] + 0j))
                state = _turned(state, qubit, _rotation_x(angles[qubit]))
            state = state * signs
        return jnp.abs(state.reshape(8)) ** 2

    return lambda p, x: jax.vmap(one, (None, 0))(p, x), {"angles": r(2, 3)}, r(N, 3)


@specimen("a Fourier neural operator: complex weights for each mode, and a bypass")
def fourier_operator(key):
    r = Draw(key)
    p = {"re": r(3, 2, 4), "im": r(3, 2, 4), "w": r(2, 4), "head": r(4, 1)}

    def f(p, x):
        z = jnp.fft.rfft(x, axis=1)[:, :3]
        z = jnp.einsum("nmc,mcd->nmd", z, lax.complex(p["re"], p["im"]))
        h = jnp.tanh(jnp.fft.irfft(z, n=x.shape[1], axis=1) + x @ p["w"])
        return (h @ p["head"])[..., 0]

    return f, p, r(N, 8, 2)


@specimen("a deep equilibrium layer: implicit derivatives", dense=("u", "w"), mixes=True)
def deep_equilibrium(key):
    r = Draw(key)
    p = {"u": r(2, 3), "v": r(3, 2), "w": r(3, 3, scale=0.2)}
    return implicit.equilibrium, p, r(N, 2)


def _flow(y, t, w):
    return jnp.tanh(y @ w) + t


@specimen("a neural ODE by odeint, example by example", dense=("w",))
def neural_ode(key):
    r = Draw(key)
    p = {"u": r(2, 3), "v": r(3, 2), "w": r(3, 3)}

    def f(p, x):
        tolerance = 1e-12 if x.dtype == jnp.float64 else 1e-6
        times = jnp.array([0.0, 0.5], x.dtype)
        flow = lambda y: odeint(_flow, y, times, p["w"], rtol=tolerance, atol=tolerance)[-1]
        return jax.vmap(flow)(x @ p["u"]) @ p["v"]

    return f, p, r(N, 2)


if importlib.util.find_spec("diffrax"):

    @specimen("a neural ODE by diffrax with its default adjoint", dense=("u", "w"), mixes=True)
    def diffrax_ode(key):
        r = Draw(key)
        p = {"u": r(2, 3), "v": r(3, 2), "w": r(3, 3)}
        return implicit.diffrax_ode, p, r(N, 2)


def _log_cosh(x):
    """As NetKet has it: the sign by the bits of the number."""
    x = x * (-2 * jnp.signbit(x) + 1)
    return x + jnp.log1p(jnp.exp(-2.0 * x)) - jnp.log(2.0)


@specimen("a restricted Boltzmann machine as wave function")
def boltzmann_machine(key):
    r = Draw(key)
    p = {"w": r(4, 6), "hidden": r(6), "visible": r(4)}
    f = lambda p, s: _log_cosh(s @ p["w"] + p["hidden"]).sum(-1) + s @ p["visible"]
    return f, p, jnp.sign(r(N, 4))


@specimen("a Jastrow factor: pairs put into a triangle", dense=("pairs",))
def jastrow(key):
    r = Draw(key)
    places = jnp.tril_indices(4, k=-1)

    def f(p, s):
        w = jnp.zeros((4, 4), s.dtype).at[places].set(p["pairs"], unique_indices=True)
        return jnp.einsum("...i,ij,...j", s, w, s)

    return f, {"pairs": r(6)}, jnp.sign(r(N, 4))


@specimen("an autoregressive wave function: masked layers, conditionals", dense=("w1", "w2"))
def autoregressive(key):
    r = Draw(key)
    p = {"w1": r(4, 1, 4, 3), "b1": r(4, 3), "w2": r(4, 3, 4, 2), "b2": r(4, 2)}
    before, until = np.triu(np.ones((4, 4)), k=1), np.triu(np.ones((4, 4)))

    def f(p, s):
        layer = lambda h, w, mask: jnp.einsum("nia,iajb->njb", h, w * mask[:, None, :, None])
        h = jax.nn.selu(layer(s[..., None], p["w1"], before) + p["b1"])
        z = jax.nn.log_softmax(layer(h, p["w2"], until) + p["b2"])
        picked = jnp.take_along_axis(z, (s > 0).astype(jnp.int32)[..., None], axis=-1)
        return 0.5 * picked.sum((1, 2))

    return f, p, jnp.sign(r(N, 4))


def _on_host(function, *args):
    shape = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    return jax.pure_callback(function, shape, *args, vmap_method="broadcast_all")


@jax.custom_vjp
def _host_tanh(x):
    return _on_host(np.tanh, x)


_host_tanh.defvjp(
    lambda x: (_host_tanh(x), x),
    lambda x, g: (_on_host(lambda x, g: g * (1 - np.tanh(x) ** 2), x, g),),
)


@specimen("a callback to the host with a backward rule of its own", mixes=True)
def host_callback(key):
    r = Draw(key)
    p = {"w": r(4, 3), "v": r(3, 2)}
    return lambda p, x: _host_tanh(x @ p["w"]) @ p["v"], p, r(N, 4)


# jax 0.7 has references, but no batching of their reads, which `jax.jacrev` needs.
if hasattr(jax, "freeze"):

    @specimen("a sum over time kept in a reference", dense=("w", "v"), mixes=True)
    def reference(key):
        r = Draw(key)
        p = {"w": r(3, 4), "v": r(4, 2)}

        def f(p, x):
            total = jax.new_ref(jnp.zeros((x.shape[0], 4), x.dtype))
            for t in range(x.shape[1]):
                total[...] += jnp.tanh(x[:, t] @ p["w"])
            return total[...] @ p["v"]

        return f, p, r(N, 3, 3)


@specimen("a sparse matrix (BCOO) that all examples share", mixes=True)
def sparse_mixing(key):
    r = Draw(key)
    links = sparse.BCOO.fromdense(r(6, 6) * (jnp.abs(r(6, 6)) > 0.4))
    p = {"w": r(3, 4), "v": r(4, 2)}

    def f(p, x):
        matrix = sparse.BCOO((links.data.astype(x.dtype), links.indices), shape=links.shape)
        h = jax.vmap(lambda x: matrix @ jnp.tanh(x @ p["w"]))(x)
        return (h @ p["v"]).sum(1)

    return f, p, r(N, 6, 3)


def _graph(r):
    return r(N, 4, 3), r.integers(4, N, 6), r.integers(4, N, 6)


@specimen("a graph net: messages summed at their receivers by segment_sum")
def graph_net_segments(key):
    r = Draw(key)
    p = {"message": r(6, 4), "node": r(7, 2)}

    def one(p, x, senders, receivers):
        m = jnp.tanh(jnp.concatenate([x[senders], x[receivers]], axis=-1) @ p["message"])
        total = jax.ops.segment_sum(m, receivers, num_segments=4)
        return (jnp.concatenate([x, total], axis=-1) @ p["node"]).mean(0)

    return lambda p, b: jax.vmap(one, (None, 0, 0, 0))(p, *b), p, _graph(r)


@specimen("a graph net with a scatter-add for the whole batch at once")
def graph_net_scatter(key):
    r = Draw(key)
    p = {"message": r(3, 4), "node": r(4, 2)}

    def f(p, batch):
        x, senders, receivers = batch
        sent = jnp.take_along_axis(x, senders[..., None], axis=1)
        rows = jnp.arange(x.shape[0])[:, None]
        total = jnp.zeros((*x.shape[:2], 4), x.dtype)
        total = total.at[rows, receivers].add(jnp.tanh(sent @ p["message"]))
        return (total @ p["node"]).max(1)

    return f, p, _graph(r)


@specimen("a graph net by adjacency matrices, two rounds of one weight")
def graph_net_adjacency(key):
    r = Draw(key)
    p = {"w": r(3, 3), "v": r(3, 2)}

    def f(p, batch):
        x, adjacency = batch
        for _ in range(2):
            x = jnp.tanh(jnp.einsum("nij,njf->nif", adjacency, x @ p["w"]))
        return x.mean(1) @ p["v"]

    return f, p, (r(N, 4, 3), jnp.abs(r(N, 4, 4)))

"""The Gram matrix of a Fourier layer over that of a dense layer of as many inputs and outputs.

    a multiplier of each mode, 512 inputs and outputs, N = 1024                      budget 2
    a matrix of channels for each mode (Fourier neural operator), 32 x 64, N = 1024  budget 2
    the same with few channels, 64 x 8: short inner products, so that writing counts

Complex weights are pairs of real parameters: with layer inputs A and output cotangents G, both
complex, their Gram matrix is Re((A A^*) o (G G^*)). One core, float32.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import _timing
import jax
import jax.numpy as jnp

import natgrad_jax as ng

EXAMPLES = 1024


def multiplier(p, x):
    """One complex number for each mode."""
    modes = jnp.fft.rfft(x) * jax.lax.complex(p["re"], p["im"])
    return jnp.tanh(jnp.fft.irfft(modes, n=x.shape[1]))


def operator(p, x):
    """A complex matrix of channels for each mode: x is (N, grid, channels)."""
    modes = jnp.fft.rfft(x, axis=1)
    mixed = jnp.einsum("nmi,mio->nmo", modes, jax.lax.complex(p["re"], p["im"]))
    return jnp.tanh(jnp.fft.irfft(mixed, n=x.shape[1], axis=1))


def dense(p, x):
    """A real matrix of all inputs and outputs."""
    return jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"])


def gram(model):
    """The Gram matrix of one row an example: a scalar of the layer's outputs."""
    log_prob = lambda p, x: jnp.sum(model(p, x).reshape(x.shape[0], -1) ** 2, axis=1)
    metric = ng.empirical_fisher(log_prob)
    return jax.jit(lambda p, x: ng.gram_matrix(metric, p, x))


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[-1] ** 0.5


def measure(name, model, shape, params) -> None:
    x = draw(0, EXAMPLES, *shape)
    width = x[0].size
    matrix = {"w": draw(3, width, width)}
    fourier, plain = gram(model), gram(dense)
    small = jax.tree.map(lambda a: a[:16], x)
    rows = jax.jacrev(lambda p: jnp.sum(model(p, small).reshape(16, -1) ** 2, axis=1))(params)
    flat = jnp.concatenate([r.reshape(16, -1) for r in jax.tree.leaves(rows)], axis=1)
    error = jnp.max(jnp.abs(gram(model)(params, small) - flat @ flat.T / 16))
    assert error < 1e-4 * jnp.max(flat @ flat.T / 16), error
    times = _timing.interleaved(
        {"dense layer": lambda: plain(matrix, x), "Fourier layer": lambda: fourier(params, x)},
        rounds=15,
    )
    _timing.print_ratios(f"{name}, N = {EXAMPLES} (budget 2)", times, "dense layer")


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    modes = {"re": draw(1, 257), "im": draw(2, 257)}
    measure("a multiplier of each mode, 512 inputs", multiplier, (512,), modes)
    for grid, width in [(32, 64), (64, 8)]:
        shape = (grid // 2 + 1, width, width)
        channels = {"re": draw(1, *shape), "im": draw(2, *shape)}
        measure(
            f"a matrix for each mode, {grid} x {width} inputs", operator, (grid, width), channels
        )


if __name__ == "__main__":
    main()

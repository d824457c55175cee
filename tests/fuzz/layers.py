"""Layers of random nets: (weights, values (N, T, D)) -> the same kind, real or complex."""

import jax
import jax.numpy as jnp
from jax import lax

T, D = 3, 2  # positions and features


def shapes() -> dict[str, tuple[int, ...]]:
    """The weights of one set. What is complex has two real parts."""
    return {"m": (D, D), "n": (D, D), "v": (D,), "u": (D,), "f": (T, D), "g": (T, D)}


def weight(w, real, imaginary, x):
    """A weight of the kind of the values."""
    return lax.complex(w[real], w[imaginary]) if jnp.iscomplexobj(x) else w[real]


def alike(y, x):
    """A complex result as the values are: its real part where they are real."""
    return y if jnp.iscomplexobj(x) else y.real


def dense(w, x):
    return jnp.einsum("ntd,dk->ntk", x, weight(w, "m", "n", x))


def scale_and_shift(w, x):
    return x * weight(w, "v", "u", x) + weight(w, "m", "n", x)[0]


def complex_dense(w, x):
    return alike(x @ lax.complex(w["m"], w["n"]) * lax.complex(w["u"], w["v"]), x)


def filtered(w, x):
    """A filter with learned weights between a Fourier transform and its inverse."""
    if jnp.iscomplexobj(x):
        return jnp.fft.ifft(jnp.fft.fft(x, axis=1) * lax.complex(w["f"], w["g"]), axis=1)
    spectrum = jnp.fft.rfft(x, axis=1)
    kept = spectrum.shape[1]
    return jnp.fft.irfft(spectrum * lax.complex(w["f"], w["g"])[:kept], n=T, axis=1)


def _decay(w):
    return jnp.exp(lax.complex(-jnp.exp(w["v"]), w["u"]))


def state_space(w, x):
    """A diagonal recurrence with a complex state."""
    a = _decay(w)
    step = lambda h, x: ((h := a * h + x), h)
    start = jnp.zeros((x.shape[0], D), a.dtype)
    return alike(lax.scan(step, start, x.swapaxes(0, 1).astype(a.dtype))[1].swapaxes(0, 1), x)


def state_space_in_parallel(w, x):
    a = _decay(w)
    join = lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1])
    factors = jnp.broadcast_to(a, (*x.shape[:2], D))
    return alike(lax.associative_scan(join, (factors, x.astype(a.dtype)), axis=1)[1], x)


def parts(w, x):
    """Real and imaginary parts taken apart, and joined again."""
    z = lax.complex(x.real * w["v"], x.real + x.imag if jnp.iscomplexobj(x) else x * w["u"])
    return alike(z * jnp.conj(z + w["m"][0]), x)


def magnitude(w, x):
    size = jnp.abs(lax.complex(x.real * w["v"] + 2.0, x.imag + w["u"]))
    return x / size.astype(x.dtype)


def settled(w, x):
    return x / jnp.sqrt(1 + (x * jnp.conj(x)).real).astype(x.dtype)


def recurrence(w, x):
    m = weight(w, "m", "n", x)
    step = lambda h, x: ((h := settled(w, h @ m + x)), h)
    return lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def repeated(w, x):
    m = weight(w, "m", "n", x)
    return lax.fori_loop(0, 2, lambda i, y: (y @ m + x) / (1 + i), x)


def mapped(w, x):
    """One example after another."""
    return lax.map(lambda x: x @ weight(w, "m", "n", x) + x, x)


def branch_of_example(w, x):
    scaled, mixed = (lambda x: x * weight(w, "v", "u", x)), (lambda x: x @ weight(w, "m", "n", x))
    return jax.vmap(lambda x: lax.cond(x.real.sum() > 0, scaled, mixed, x))(x)


def branch_of_parameter(w, x):
    scaled = lambda x: x * weight(w, "v", "u", x)
    return lax.cond(w["m"][0, 0] > 0, scaled, lambda x: x + x * x, x)


def switched(w, x):
    branches = [jnp.sin, lambda x: x * weight(w, "v", "u", x), lambda x: x]
    return jax.vmap(lambda x: lax.switch(jnp.argmax(x[:, 0].real), branches, x))(x)


@jax.custom_jvp
def _bent(x):
    return x * x


_bent.defjvp(lambda primals, tangents: (_bent(*primals), tangents[0] * (1 + primals[0])))


def own_tangent(w, x):
    return _bent(x * weight(w, "v", "u", x))


@jax.custom_vjp
def _product(x, m):
    return x @ m


_product.defvjp(
    lambda x, m: (x @ m, (x, m)),
    lambda kept, g: (2 * g @ kept[1].T, jnp.einsum("ntd,ntk->dk", kept[0], g)),
)


def own_cotangent(w, x):
    return _product(x, weight(w, "m", "n", x))


def checkpointed(w, x):
    return jax.checkpoint(lambda w, x: settled(w, dense(w, x)))(w, x)


def sorted_gate(w, x):
    return x * jnp.sort(x.real * w["v"], axis=1).astype(x.dtype)


def largest(w, x):
    values, at = lax.top_k((x.real * w["v"]).swapaxes(1, 2), 1)
    return x * values.swapaxes(1, 2).astype(x.dtype) + at.swapaxes(1, 2).astype(x.dtype)


def segments(w, x):
    ids = jnp.array([0, 1, 0])
    total = lambda x: jax.ops.segment_sum(x * weight(w, "f", "g", x), ids, T)
    return jax.vmap(total)(x)


def scattered(w, x):
    return x.at[:, jnp.array([2, 0])].add(weight(w, "f", "g", x)[:2] * x[:, 1:])


def gathered(w, x):
    return x[:, jnp.array([1, 2, 1])] * weight(w, "f", "g", x)[jnp.array([2, 0, 0])]


def looked_up(w, x):
    """Rows of a table that the data choose."""
    return x + weight(w, "f", "g", x)[jnp.argmax(x.real, axis=2)]


def accumulated(w, x):
    ref, m = jax.ref.new_ref(jnp.zeros_like(x)), weight(w, "m", "n", x)
    for t in range(T):
        ref[:, t:] += x[:, t : t + 1] @ m
    return ref[...]


def accumulated_in_a_scan(w, x):
    ref = jax.ref.new_ref(jnp.zeros_like(x[:, 0]))

    def body(carry, x):
        ref[...] += x * weight(w, "v", "u", x)
        return carry, ref[...]

    return lax.scan(body, 0.0, x.swapaxes(0, 1))[1].swapaxes(0, 1)


ARITHMETIC = [dense, scale_and_shift, complex_dense, parts, magnitude, settled]
SPECTRA = [filtered, state_space, state_space_in_parallel]
LOOPS = [recurrence, repeated, mapped, branch_of_example, branch_of_parameter, switched]
RULES = [own_tangent, own_cotangent, checkpointed]
INDICES = [sorted_gate, largest, segments, scattered, gathered, looked_up]
# Older versions of JAX take no rows of references themselves.
REFERENCES = [accumulated, accumulated_in_a_scan] if hasattr(jax.ref, "empty_ref") else []
LAYERS = ARITHMETIC + SPECTRA + LOOPS + RULES + INDICES + REFERENCES

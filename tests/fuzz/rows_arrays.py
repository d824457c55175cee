"""Rows of the table: primitives that move, choose, sum and sort entries."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.case import batched
from tests.fuzz.case import case
from tests.fuzz.case import either
from tests.fuzz.case import gated
from tests.fuzz.case import joined
from tests.fuzz.operands import positive
from tests.fuzz.operands import real

_INDICES = jnp.array([2, 0, 2])
_three = lambda n: jnp.arange(1.0, n + 1)


def _scattered(method):
    """Scatters at fixed indices, and at one that the data choose."""

    def at(x, i, y):  # JAX differentiates a product over repeated indices for no one
        return getattr(x.at[i], method)(y, unique_indices=True)

    return [
        case(lambda x, y: at(x, jnp.array([2, 0]), y), positive(3), positive(2)),
        case(lambda x, y: at(x, jnp.argmax(y), y[0]), positive(3), positive(2)),
    ]


def _window(operation, start, x):
    # A start that is traced would make every window a generic one, without a derivative.
    return lax.reduce_window(x, np.asarray(start, x.dtype), operation, (2,), (1,), "VALID")


def _plus_and_times(a, b):
    """A monoid of its own: 1 + (a with b) = (1 + a)(1 + b)."""
    return a + b + a * b


def _max_pool(x):
    return _window(lax.max, -jnp.inf, x)


_energy_of_pool = lambda x: jnp.sum(_max_pool(x) ** 3)

MOVES = {
    "broadcast_in_dim": [either(lambda x: jnp.broadcast_to(x[:, None], (3, 2)), real(3))],
    "concatenate": [
        either(lambda x, y: jnp.concatenate([x, y, x]), real(2), real(3)),
        batched(
            lambda x, p: jnp.concatenate([x, jnp.broadcast_to(p, x.shape)], 1), real(2), real(2)
        ),
    ],
    "convert_element_type": [
        case(lambda x: x * x.astype(int).astype(x.dtype), real(3)),
        case(lambda x: jnp.exp(1j * x).real, real(3)),
    ],
    "copy": [either(lambda x: x * jnp.array(x, copy=True), real(3))],
    "copy_p": [either(lambda x: x * jnp.array(x, copy=True), real(3))],
    "dynamic_slice": [
        either(lambda x: lax.dynamic_slice(x, (1,), (2,)), real(3)),
        case(lambda x: lax.dynamic_slice(x, (jnp.argmax(x),), (2,)), real(5)),
        case(lambda x, y: lax.dynamic_index_in_dim(x, jnp.argmin(y), 0), real(3, 2), real(3)),
    ],
    "dynamic_update_slice": [
        either(lambda x, y: lax.dynamic_update_slice(x, y, (1,)), real(5), real(2)),
        case(lambda x, y: lax.dynamic_update_slice(x, y, (jnp.argmax(x),)), real(5), real(2)),
    ],
    "gather": [
        either(lambda x: x[_INDICES], real(3)),
        case(lambda x, t: t[jnp.argsort(x)], real(3), real(3, 2)),
        batched(lambda x, t: t[jnp.argmax(x, axis=1)] * x[:, :2], real(3), real(3, 2)),
    ],
    "pad": [either(lambda x: jnp.pad(x, ((1, 2),)), real(3))],
    "reshape": [either(lambda x: x.reshape(3, 2), real(2, 3))],
    "rev": [either(lambda x: x[::-1], real(3))],
    "scatter": _scattered("set"),
    "scatter-add": [
        either(lambda x, y: x.at[_INDICES].add(y), real(3), real(3)),
        case(lambda x: jax.ops.segment_sum(x, _INDICES, 3), real(3)),
        *_scattered("add"),
    ],
    "scatter-max": _scattered("max"),
    "scatter-min": _scattered("min"),
    "scatter-mul": _scattered("multiply"),
    "scatter-sub": _scattered("subtract"),
    "slice": [either(lambda x: x[1:5:2], real(5))],
    "split": [either(lambda x: jnp.multiply(*jnp.split(x, 2)), real(6))],
    "squeeze": [either(lambda x: jnp.squeeze(x, 0), real(1, 3))],
    "stack": [either(lambda x, y: lax.stack([x, y], 1), real(3), real(3))],
    "tile": [either(lambda x: lax.tile(x, (2,)), real(3))],
    "transpose": [either(lambda x: x.T @ x, real(2, 3))],
    "unstack": [either(lambda x: jnp.multiply(*lax.unstack(x)), real(2, 3))],
}

SUMS = {
    "add_any": [case(jax.grad(lambda x: jnp.sum(jnp.sin(x) * jnp.cos(2 * x))), real(3))],
    "cumlogsumexp": [case(lax.cumlogsumexp, real(3))],
    "cummax": [case(lax.cummax, real(3))],
    "cummin": [case(lax.cummin, real(3))],
    "cumprod": [either(lax.cumprod, real(3))],
    "cumsum": [either(lax.cumsum, real(3)), case(lambda x: lax.cumsum(x, 1), real(2, 3))],
    "reduce": [
        case(lambda x: lax.reduce(x, jnp.zeros((), x.dtype), _plus_and_times, (0,)), real(3, 2))
    ],
    "reduce_max": [case(lambda x: x.max(0), real(2, 3))],
    "reduce_min": [case(lambda x: x.min(0), real(2, 3))],
    "reduce_prod": [either(lambda x: x.prod(0), real(2, 3))],
    "reduce_sum": [
        either(lambda x: x.sum(0), real(2, 3)),
        batched(lambda x, p: (x * p).sum(1, keepdims=True), real(3), real(3)),
    ],
    # JAX has no reverse mode of a window with a monoid of its own.
    "reduce_window": [
        case(lambda x: x[1:] * _window(_plus_and_times, 0, lax.stop_gradient(x)), real(3))
    ],
    "reduce_window_max": [case(_max_pool, real(3))],
    "reduce_window_min": [case(lambda x: _window(lax.min, jnp.inf, x), real(3))],
    "reduce_window_sum": [either(lambda x: _window(lax.add, 0, x), real(3))],
    "select_and_gather_add": [
        case(lambda x, t: jax.jvp(_max_pool, (x,), (t,))[1], real(3), real(3))
    ],
    "select_and_scatter_add": [case(jax.grad(_energy_of_pool), real(3))],
}

ORDER = {
    "approx_top_k": [case(lambda x: lax.approx_max_k(x, 2)[0], real(3))],
    "sort": [
        case(jnp.sort, real(3)),
        case(lambda x, y: lax.sort((x, y), num_keys=1)[1], real(3), real(3)),
    ],
    "top_k": [
        case(lambda x: lax.top_k(x, 2)[0], real(3)),
        case(lambda x, y: y[lax.top_k(x, 2)[1]], real(3), real(3)),
    ],
}

CONTRACTIONS = {
    "conv_general_dilated": [
        either(
            lambda x, k: lax.conv_general_dilated(x[None], k, (1,), "SAME")[0],
            real(2, 3),
            real(2, 2, 2),
        ),
        batched(
            lambda x, k: lax.conv_general_dilated(x, k, (1,), "VALID"), real(2, 3), real(2, 2, 2)
        ),
    ],
    "dot_general": [
        either(lambda x, w: x @ w, real(2), real(2, 3)),
        either(lambda x, y: jnp.vdot(x, y)[None], real(3), real(3)),
        batched(lambda x, w: jnp.einsum("ntd,dk->nkt", x, w), real(3, 2), real(2, 3)),
    ],
    "ragged_dot_general": [
        batched(
            lambda x, w: x * lax.ragged_dot(*lax.stop_gradient((x, w)), jnp.array([1, 3])),
            real(2),
            real(2, 2, 2),
        ),
        batched(
            lambda x, w: lax.ragged_dot(
                x.reshape(-1, 2), w, jnp.array([5, 3]).astype(jnp.int32)
            ).reshape(-1, 4),
            real(2, 2),
            real(2, 2, 2),
            refused="ragged_dot vmap over any dim but 0",
        ),
    ],
}

TRANSFORMS = {
    "fft": [
        either(lambda x: jnp.fft.fft(x), real(3)),
        case(lambda x, w: jnp.fft.irfft(jnp.fft.rfft(x) * lax.complex(w, w * w)), real(4), real(3)),
        case(lambda x: joined(jnp.abs(jnp.fft.rfft2(x))), real(2, 3)),
        either(lambda x: jnp.fft.ifft(gated(jnp.fft.fft(x), _three(3))), real(3)),
    ]
}

ROWS = MOVES | SUMS | ORDER | CONTRACTIONS | TRANSFORMS

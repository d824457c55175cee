"""Linear uses of a parameter, brought to one form: rows sum_t left_t (x) right_t.

Whatever the primitive, layout or orientation, entry (b, i, j) of the parameter has the derivative

    row[n, c, b, i, j] = sum_t left[n, b, t, i] * right[n, c, b, t, j]

for example n and output column c: `left` is what enters the use, `right` the cotangent of what
leaves it, t runs over the positions where one example uses the parameter again, b over independent
copies (stacked layers, groups of a convolution).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.view import Pieces
from natgrad_jax.jacobian.view import View

Record = Any


PER_EXAMPLE = "each example has parameters of its own"


class Use(NamedTuple):
    """One linear use.

    Attributes:
      name: of the primitive.
      left: record -> (N, B, T, p), or (N, B, T) indices of one-hot vectors; None for ones, p = 1.
      right: (record, cotangent of the probed value) -> (N, B, T, q).
      b: pieces of the parameter that b runs over.
      p: pieces that `left` runs over.
      q: pieces that `right` runs over.
      record: what enters the use.
      own: dimensions of the probed value that b and q run over, in this order.
    """

    name: str
    left: Callable[[Record], jax.Array] | None
    right: Callable[[Record, jax.Array], jax.Array]
    b: Pieces
    p: Pieces
    q: Pieces
    record: Record = None
    own: tuple[int, ...] = ()


class MisfitError(Exception):
    """A use that has no such form; its message says why."""


def spread(x: jax.Array, label: Axis) -> jax.Array:
    """Moves examples to the front: (N, ...); their dimension keeps what else it held."""
    if label.dim == -1:
        return x[None]
    d, shape = label.dim, x.shape
    rest = label.outer * label.inner
    count = shape[d] // rest
    parts = (*shape[:d], label.outer, count, label.inner, *shape[d + 1 :])
    front = jnp.moveaxis(x.reshape(parts), d + 1, 0)
    return front.reshape(count, *shape[:d], rest, *shape[d + 1 :])


def laid_out(x: jax.Array, label: Axis, *groups: tuple[int, ...]) -> jax.Array:
    """(N, |group 1|, |group 2|, ...) for groups of dimensions of x."""
    front = spread(x, label)
    order = [0, *(d + 1 for group in groups for d in group)]
    sizes = [math.prod(front.shape[d + 1] for d in group) for group in groups]
    return front.transpose(order).reshape(front.shape[0], *sizes)


def operand(name: str, view: View, label: Axis) -> Use:
    """A parameter that enters anything else, broadcast: its rows are the cotangents themselves."""
    if label.dim != -1 and not views.is_broadcast(view.dims[label.dim]):
        raise MisfitError(PER_EXAMPLE)
    kept = tuple(d for d, pieces in enumerate(view.dims) if not views.is_broadcast(pieces))
    summed = tuple(d for d in range(len(view.dims)) if d not in kept)

    def right(_: Record, g: jax.Array) -> jax.Array:
        return laid_out(g, label, summed, kept)[:, None]

    return Use(name, None, right, (), (), views.joined(view, kept), own=kept)

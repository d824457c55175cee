"""A parameter times a constant, followed to where the product enters.

With D = W E for a constant E and rows of D that are cotangents g (N, f, e), the rows of W are
sum_e g_nfe (x) E_ce: those of a linear use whose layer inputs are the constant. Tangents along unit
vectors, as in Laplacians, are of this kind.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import uses
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.primitives.registry import rule_of
from natgrad_jax.jacobian.uses import Use
from natgrad_jax.jacobian.view import View


class Contracted(NamedTuple):
    """The product of a parameter and a constant.

    Attributes:
      view: of the parameter.
      constant: E, its free dimensions first, in order, then the contracted ones.
      contracted: dimensions of the view that the product sums over, in the order of E's.
      free: those that remain.
      shape: of the product.
      first: whether the parameter's free dimensions come first in the product.
    """

    view: View
    constant: jax.Array
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    shape: tuple[int, ...]
    first: bool


def contracted_by(equation: Any, operands: list[Any]) -> Contracted | None:
    """Reads a product of a parameter and a constant without batch dimensions, or None."""
    held = [i for i, value in enumerate(operands) if value.view is not None]
    if not rule_of(equation).contracts or len(held) != 1:
        return None
    (at,) = held
    contract, batch = _jaxpr.parameter(equation, "dimension_numbers")
    view, other = operands[at].view, operands[1 - at].array
    if batch[0] or view.scale is not None or view.scanned:
        return None
    others = tuple(contract[1 - at])
    rest = [d for d in range(other.ndim) if d not in others]
    free = tuple(d for d in range(len(view.dims)) if d not in contract[at])
    shape = _jaxpr.shapes_out(equation)[0]
    constant = jax.lax.transpose(other, (*rest, *others))
    return Contracted(view, constant, tuple(contract[at]), free, shape, at == 0)


def contracted_use(this: Contracted, view: View, label: Axis, shape: tuple[int, ...]) -> Use | None:
    """The linear use of the parameter behind a view of the product, or None for no such form."""
    if label.dim != -1 and not views.is_broadcast(view.dims[label.dim]):
        return None
    where = _dims_of(this, view)
    if where is None:
        return None
    count = len(this.free)
    begin = 0 if this.first else len(this.shape) - count
    own = [k for k in range(len(this.shape)) if begin <= k < begin + count]
    rest = [k for k in range(len(this.shape)) if k not in own]
    kept, along = (tuple(where[k] for k in dims if k in where) for dims in (own, rest))
    summed = tuple(d for d in range(len(shape)) if d not in (*kept, *along))
    examples = 1 if label.dim == -1 else shape[label.dim] // (label.outer * label.inner)

    def left(constant: jax.Array) -> jax.Array:
        wide = constant.reshape(math.prod(constant.shape[: len(rest)]), -1)
        return jnp.broadcast_to(wide, (examples, 1, *wide.shape))

    def right(_: Any, g: jax.Array) -> jax.Array:
        return jnp.sum(uses.laid_out(g, label, summed, along, kept), axis=1)[:, None]

    p, q = views.joined(this.view, this.contracted), views.joined(this.view, this.free)
    return Use("dot_general", left, right, (), p, q, this.constant, own=kept)


def _dims_of(this: Contracted, view: View) -> dict[int, int] | None:
    """For each dimension of the product that is larger than one that of the view that covers it."""
    if view.offset or view.scanned:
        return None
    found = {}
    for k, size in enumerate(this.shape):
        stride = math.prod(this.shape[k + 1 :])
        if size == 1:
            continue
        runs = [
            d for d, pieces in enumerate(view.dims) if views.merged(pieces) == ((size, stride),)
        ]
        if not runs:
            return None
        found[k] = runs[0]
    kept = set(found.values())
    others = [p for d, pieces in enumerate(view.dims) if d not in kept for p in pieces]
    return found if views.is_broadcast(tuple(others)) else None

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
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.example_axis import OWN
from natgrad_jax.jacobian.example_axis import Axis
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
    if label == OWN:
        return x[None]
    d, shape = label.dim, x.shape
    rest = label.outer * label.inner
    count = shape[d] // rest
    parts = (*shape[:d], label.outer, count, label.inner, *shape[d + 1 :])
    front = jnp.moveaxis(x.reshape(parts), d + 1, 0)
    return front.reshape(count, *shape[:d], rest, *shape[d + 1 :])


def _laid_out(x: jax.Array, label: Axis, *groups: tuple[int, ...]) -> jax.Array:
    """(N, |group 1|, |group 2|, ...) for groups of dimensions of x."""
    front = spread(x, label)
    order = [0, *(d + 1 for group in groups for d in group)]
    sizes = [math.prod(front.shape[d + 1] for d in group) for group in groups]
    return front.transpose(order).reshape(front.shape[0], *sizes)


def _joined(view: View, dims: Any) -> Pieces:
    return tuple(piece for d in dims for piece in view.dims[d])


def _is_broadcast(pieces: Pieces) -> bool:
    return all(stride == 0 for _, stride in pieces)


def contraction(equation: Any, operands: list[Any], at: int, label: Axis) -> Use:
    """`dot_general` of a parameter (operand `at`) with what depends on examples."""
    contract, batch = _jaxpr.parameter(equation, "dimension_numbers")
    view, other = operands[at].view, operands[1 - at]
    rank = len(view.dims), other.array.ndim
    own_contract, a_contract = tuple(contract[at]), tuple(contract[1 - at])
    own_batch, a_batch = tuple(batch[at]), tuple(batch[1 - at])
    own_free = [d for d in range(rank[0]) if d not in own_contract + own_batch]
    a_free = [d for d in range(rank[1]) if d not in a_contract + a_batch]
    count = len(own_batch)
    # Results are laid out (batch, free of the left operand, free of the right operand).
    first, second = (own_free, a_free) if at == 0 else (a_free, own_free)
    z_first = tuple(range(count, count + len(first)))
    z_second = tuple(range(count + len(first), count + len(first) + len(second)))
    z_own, z_a = (z_first, z_second) if at == 0 else (z_second, z_first)
    shared = [k for k in range(count) if _is_broadcast(view.dims[own_batch[k]])]
    copies = [k for k in range(count) if k not in shared]
    if label.dim in copies:
        raise MisfitError(PER_EXAMPLE)
    a_copies, a_shared = (tuple(a_batch[k] for k in ks) for ks in (copies, shared))
    a_label = other.label

    def left(a: jax.Array) -> jax.Array:
        return _laid_out(a, a_label, a_copies, (*a_shared, *a_free), a_contract)

    def right(_: Record, g: jax.Array) -> jax.Array:
        return _laid_out(g, label, tuple(copies), (*shared, *z_a), z_own)

    b = _joined(view, [own_batch[k] for k in copies])
    p, q = _joined(view, own_contract), _joined(view, own_free)
    return Use("dot_general", left, right, b, p, q, other.array, own=(*copies, *z_own))


def operand(name: str, view: View, label: Axis) -> Use:
    """A parameter that enters anything else, broadcast: its rows are the cotangents themselves."""
    if label != OWN and not _is_broadcast(view.dims[label.dim]):
        raise MisfitError(PER_EXAMPLE)
    kept = tuple(d for d, pieces in enumerate(view.dims) if not _is_broadcast(pieces))
    summed = tuple(d for d in range(len(view.dims)) if d not in kept)

    def right(_: Record, g: jax.Array) -> jax.Array:
        return _laid_out(g, label, summed, kept)[:, None]

    return Use(name, None, right, (), (), _joined(view, kept), own=kept)


def convolution(equation: Any, operands: list[Any], at: int, label: Axis) -> Use:
    """`conv_general_dilated` with the parameter as its kernel: patches are what enters."""
    if at != 1 or _jaxpr.parameter(equation, "batch_group_count") != 1:
        raise MisfitError("a convolution whose kernel is not the parameter")
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    groups = _jaxpr.parameter(equation, "feature_group_count")
    view, a_label = operands[1].view, operands[0].label
    out_channels = views.size(view.dims[rhs[0]])
    split = views.split_dim(view.dims[rhs[0]], (groups, out_channels // groups))
    if split is None:
        raise MisfitError("channels that its groups do not divide")
    window = [views.size(view.dims[d]) for d in rhs[2:]]
    # Kernel dimensions without a piece have size one: nothing to gather along.
    out_sizes = [_jaxpr.shapes_out(equation)[0][d] for d in out[2:]]
    geometry = [
        _jaxpr.parameter(equation, key)
        for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    ]

    def left(a: jax.Array) -> jax.Array:
        images = _channels_last(a, lhs)
        taps = _patches(images, window, out_sizes, *geometry)  # (taps, batch, spatial, channels)
        count, channels = taps.shape[0], taps.shape[-1]
        x = taps.reshape(*taps.shape[:-1], groups, channels // groups)
        x = jnp.moveaxis(x, 0, -1)  # (batch, *spatial, groups, channels per group, taps)
        x = spread(x, a_label._replace(dim=0) if a_label != OWN else OWN)
        n = x.shape[0]
        x = x.reshape(n, -1, groups, channels // groups * count)
        return jnp.moveaxis(x, 2, 1)

    def right(_: Record, g: jax.Array) -> jax.Array:
        z = _channels_last(g, out)
        z = z.reshape(*z.shape[:-1], groups, out_channels // groups)
        z = spread(z, label._replace(dim=0) if label != OWN else OWN)
        return jnp.moveaxis(z.reshape(z.shape[0], -1, groups, out_channels // groups), 2, 1)

    p = _joined(view, rhs[1:])
    record = operands[0].array
    return Use("conv_general_dilated", left, right, split[0], p, split[1], record, own=(out[1],))


def _channels_last(x: jax.Array, spec: Any) -> jax.Array:
    """(batch, *spatial, channels) from a layout (batch, channels, *spatial) of dimensions."""
    return x.transpose((spec[0], *spec[2:], spec[1]))


def _patches(
    images: jax.Array, window: Any, sizes: Any, strides: Any, padding: Any, lhs: Any, rhs: Any
) -> jax.Array:
    """What each tap of a kernel meets: (taps, batch, *spatial, channels), by strided slices.

    A convolution with identity kernels gives the same, at the price of a grouped convolution.
    """
    config = [(0, 0, 0), *((*p, d - 1) for p, d in zip(padding, lhs, strict=True)), (0, 0, 0)]
    padded = jax.lax.pad(images, jnp.zeros((), images.dtype), config)
    taps = []
    for tap in np.ndindex(*window):
        start = [0, *(t * d for t, d in zip(tap, rhs, strict=True)), 0]
        stop = [
            padded.shape[0],
            *(b + (n - 1) * s + 1 for b, n, s in zip(start[1:-1], sizes, strides, strict=True)),
            padded.shape[-1],
        ]
        taps.append(jax.lax.slice(padded, start, stop, [1, *strides, 1]))
    return jnp.stack(taps)


def lookup(equation: Any, operands: list[Any], at: int, label: Axis) -> Use:
    """`gather` of whole slices of a parameter, as embeddings do: one-hot vectors enter."""
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    sizes, mode = _jaxpr.parameter(equation, "slice_sizes"), _jaxpr.parameter(equation, "mode")
    view, indices = operands[0].view, operands[1]
    full = [views.size(pieces) for pieces in view.dims]
    chosen = [d for d in range(len(full)) if sizes[d] != full[d]]
    if at != 0 or indices.label is None or numbers.operand_batching_dims or not chosen:
        raise MisfitError("a gather that is no look-up of whole slices")
    if any(sizes[d] != 1 or d not in numbers.start_index_map for d in chosen):
        raise MisfitError("a gather of windows of the parameter")
    table = views.merged(_joined(view, chosen))
    if len(table) != 1:
        raise MisfitError("a gather along dimensions that are not neighbours")
    rank = len(_jaxpr.shapes_out(equation)[0])
    positions = tuple(d for d in range(rank) if d not in numbers.offset_dims)
    window = [d for d in range(len(full)) if d not in numbers.collapsed_slice_dims]
    drops = "FILL" in str(mode).upper() or "DROP" in str(mode).upper()
    i_label = indices.label
    axes = tuple(range(indices.array.ndim - 1))

    def flat(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, inside = jnp.zeros(index.shape[:-1], index.dtype), jnp.asarray(True)
        for column, d in enumerate(numbers.start_index_map):
            raw, room = index[..., column], full[d] - sizes[d]
            if drops:
                inside = inside & (raw >= 0) & (raw <= room)
            if d in chosen:
                total = total * full[d] + jnp.clip(raw, 0, room)
        return total, jnp.broadcast_to(inside, total.shape)

    def left(index: jax.Array) -> jax.Array:
        return _laid_out(flat(index)[0], i_label, (), axes)

    def right(index: jax.Array, g: jax.Array) -> jax.Array:
        rows = _laid_out(g, label, (), positions, numbers.offset_dims)
        inside = _laid_out(flat(index)[1], i_label, (), axes)
        return jnp.where(inside[..., None], rows, 0)

    if list(numbers.start_index_map) != sorted(numbers.start_index_map):
        raise MisfitError("a gather with its index columns out of order")
    kept = [d for d in window if d not in chosen]
    return Use("gather", left, right, (), table, _joined(view, kept), indices.array)


LINEAR = {
    "dot_general": contraction,
    "conv_general_dilated": convolution,
    "gather": lookup,
}

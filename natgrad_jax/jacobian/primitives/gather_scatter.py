"""Gathers and scatters: embeddings, picked entries, sums over segments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import uses
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Mixed
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.primitives.registry import BlendError
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.uses import MisfitError
from natgrad_jax.jacobian.uses import Use


def _gather(equation: Any, labels: list[Label], known: list[Any]) -> Label:
    """Slices that hold whole examples, or one choice for each example."""
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    sizes = _jaxpr.parameter(equation, "slice_sizes")
    operand, out_rank = _jaxpr.shapes_in(equation)[0], len(_jaxpr.shapes_out(equation)[0])
    batched = [d for d in range(out_rank) if d not in numbers.offset_dims]
    window = [
        d
        for d in range(len(operand))
        if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    require(not any(isinstance(x, Mixed) or (x is not None and x.slow) for x in labels))
    found: list[Label] = []
    if isinstance(labels[1], Axis):
        require(labels[1].dim < len(batched))
        found.append(move(labels[1], batched[labels[1].dim]))
    label = labels[0]
    if isinstance(label, Axis):
        if label.dim in numbers.operand_batching_dims:
            place = list(numbers.operand_batching_dims).index(label.dim)
            found.append(move(label, batched[numbers.start_indices_batching_dims[place]]))
        elif label.dim in window and sizes[label.dim] == operand[label.dim]:
            found.append(move(label, numbers.offset_dims[window.index(label.dim)]))
        else:
            counted = _counted_dim(numbers.start_index_map, label.dim, operand[label.dim], known[1])
            require(label.outer == label.inner == 1)
            found.append(move(label, batched[counted]))
    return axis(found)


def _counted_dim(index_map: Any, dim: int, size: int, values: Any) -> int:
    """The dimension of the indices along which the index into a dimension counts 0, 1, ...

    That is how `x[jnp.arange(N), y]` picks one entry of each example.
    """
    require(values is not None and dim in index_map)
    column = values[..., list(index_map).index(dim)]
    require(not np.ma.is_masked(column))
    for d, length in enumerate(column.shape):
        shape = [length if k == d else 1 for k in range(column.ndim)]
        if length == size and np.all(column == np.arange(length).reshape(shape)):
            return d
    raise BlendError


def _scatter(equation: Any, labels: list[Label], known: list[Any]) -> Label:
    """Updates of whole examples, or of the same example that they come from."""
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    operand, _, updates = _jaxpr.shapes_in(equation)
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(operand)) if d not in gone]
    scattered = [d for d in range(len(updates)) if d not in numbers.update_window_dims]
    batching = zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    )
    # For each way to lie: the dimension of examples in operand, indices (-2: none) and updates.
    ways = [(d, index_dim, scattered[index_dim]) for d, index_dim in batching]
    ways += [
        (d, -2, updated)
        for d, updated in zip(window, numbers.update_window_dims, strict=True)
        if operand[d] == updates[updated]
    ]
    ways += _counted_ways(numbers, operand, known[1], scattered)
    for way in ways:
        pairs = list(zip(labels, way, strict=True))
        if all(label is None or label == move(label, dim) for label, dim in pairs):
            return axis([move(label, way[0]) for label in labels])
    raise BlendError


def _counted_ways(
    numbers: Any, operand: tuple[int, ...], values: Any, scattered: list[int]
) -> list[tuple[int, int, int]]:
    """Dimensions along which row n of the updates goes to row n of the operand."""
    found = []
    for d in numbers.inserted_window_dims:
        try:
            counted = _counted_dim(numbers.scatter_dims_to_operand_dims, d, operand[d], values)
        except BlendError:
            continue
        found.append((d, counted, scattered[counted]))
    return found


def _use(equation: Any, operands: list[Any], at: int, label: Axis) -> Use:
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
    table = views.merged(views.joined(view, chosen))
    if len(table) != 1 or not table[0][1]:
        raise MisfitError("a gather along dimensions that are not neighbours")
    rank = len(_jaxpr.shapes_out(equation)[0])
    positions = tuple(d for d in range(rank) if d not in numbers.offset_dims)
    window = [d for d in range(len(full)) if d not in numbers.collapsed_slice_dims]
    drops = "CLIP" not in str(mode).upper()  # as its transpose, a scatter, drops them
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
        return uses.laid_out(flat(index)[0], i_label, (), axes)

    def right(index: jax.Array, g: jax.Array) -> jax.Array:
        rows = uses.laid_out(g, label, (), positions, numbers.offset_dims)
        inside = uses.laid_out(flat(index)[1], i_label, (), axes)
        return jnp.where(inside[..., None], rows, 0)

    if list(numbers.start_index_map) != sorted(numbers.start_index_map):
        raise MisfitError("a gather with its index columns out of order")
    kept = [d for d in window if d not in chosen]
    return Use("gather", left, right, (), table, views.joined(view, kept), indices.array)


register(
    "gather",
    Rule(examples=lambda equation, labels, known: [_gather(equation, labels, known)], use=_use),
)
register(
    """
    scatter scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul scatter-min
    scatter_min scatter-max scatter_max
    """,
    Rule(examples=lambda equation, labels, known: [_scatter(equation, labels, known)]),
)

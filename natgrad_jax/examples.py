"""Rows and examples: along which axes a batch holds examples, and what each output row weighs.

The leading axis of every output leaf counts rows. An example may give several rows (tokens), which
then stand together. `batch_axes` follows the `in_axes` of `jax.vmap`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _trees

Tree = Any


class Group(NamedTuple):
    """Examples that are counted together.

    Attributes:
      size: number of examples N, or None when no leaf of the batch holds examples: the whole
        batch then is one piece and every output row is an example.
      axes: for each leaf of the batch, in tree order, the axis along which these examples lie;
        None for leaves that they share.
    """

    size: int | None
    axes: tuple[int | None, ...]


def leaf_axes(caller: str, batch: Tree, batch_axes: Tree) -> tuple[int | None, ...]:
    """Spreads `batch_axes`, a tree prefix of `batch`, over the leaves of `batch`."""
    axes: list[int | None] = []
    spread = lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part)))
    try:
        jax.tree.map(spread, batch_axes, batch, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"{caller}: batch_axes must be a tree prefix of batch, got {batch_axes!r} for a batch"
            f" of structure {jax.tree.structure(batch)}"
        ) from error
    return tuple(axes)


def example_groups(
    caller: str, batch: Tree, batch_axes: Tree, *, several: bool = False
) -> tuple[Group, ...]:
    """Reads the groups of examples off a batch.

    Args:
      caller: public name for error messages.
      batch: pytree of arrays.
      batch_axes: as `in_axes` of `jax.vmap`.
      several: whether leaves may come in several sizes, each a group of its own.

    Returns:
      One group for each size found among the mapped leaves; one group of size None when no leaf
      is mapped.

    Raises:
      ValueError: a mapped leaf lacks its axis, or sizes disagree where one is needed.
    """
    axes = leaf_axes(caller, batch, batch_axes)
    sizes: list[int | None] = []
    for leaf, axis in zip(jax.tree.leaves(batch), axes, strict=True):
        if axis is not None and not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"{caller}: a batch leaf of shape {leaf.shape} has no axis {axis} along which"
                " examples could lie; give batch_axes=None for leaves that all examples share"
            )
        sizes.append(None if axis is None else leaf.shape[axis])
        if sizes[-1] == 0:
            raise ValueError(
                f"{caller}: the batch is empty: a leaf of shape {leaf.shape} holds no examples"
                f" along axis {axis}; skip the update, or give batch_axes=None for what is shared"
            )
    distinct = list(dict.fromkeys(s for s in sizes if s is not None))
    if not distinct:
        return (Group(None, axes),)
    if len(distinct) > 1 and not several:
        raise ValueError(
            f"{caller}: batch leaves disagree on the number of examples: {distinct[0]} and"
            f" {distinct[1]}; give batch_axes=None for leaves that all examples share"
        )
    return tuple(
        Group(n, tuple(a if s == n else None for a, s in zip(axes, sizes, strict=True)))
        for n in distinct
    )


def rows_per_example(caller: str, rows: int, groups: tuple[Group, ...]) -> tuple[Group, int]:
    """The group an output leaf with `rows` rows belongs to, and its rows for each example."""
    if len(groups) == 1:
        group = groups[0]
        size = 1 if group.size is None else group.size
        if size and rows % size == 0:
            return group, rows // size
        if rows == size:
            return group, 1
    else:
        for group in groups:
            if group.size == rows:
                return group, 1
    sizes = " and ".join(str(group.size) for group in groups)
    raise ValueError(
        f"{caller}: an output leaf has {rows} rows along its leading axis, but the batch holds"
        f" {sizes} examples; the leading axis of every output counts examples"
        + (" or a whole number of rows for each" if len(groups) == 1 else " of one of these sizes")
    )


def check_outputs(caller: str, outputs: Tree, groups: tuple[Group, ...]) -> None:
    """Raises when an output leaf has no leading axis, or one that counts no examples."""
    for leaf in jax.tree.leaves(outputs):
        if leaf.ndim == 0:
            raise ValueError(
                f"{caller}: an output is a scalar, it has no leading axis that counts examples;"
                " return one row for each example, shape (N, ...)"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{caller}: outputs must be real floating point, got {leaf.dtype}")
        rows_per_example(caller, leaf.shape[0], groups)


def row_weights(
    caller: str,
    weights: Callable[[Tree], Tree] | None,
    batch: Tree,
    outputs: Tree,
    groups: tuple[Group, ...],
) -> Tree:
    """Normalised weights of the rows of every output leaf.

    Each output leaf is averaged over its own leading axis: its weights are w_r / sum(w), or 1 / L
    for L rows without weights. Weights that sum to zero give zeros.

    Returns:
      A tree like `outputs` with leaves of shape (L,).
    """
    leaves, treedef = jax.tree.flatten(outputs)
    given: list[Any] = [None] * len(leaves)
    if weights is not None:
        value = weights(batch)
        parts, structure = jax.tree.flatten(value)
        same = structure == treedef  # type: ignore[operator]
        given = parts if same else parts * len(leaves)
        if not same and structure != jax.tree.structure(0):  # type: ignore[operator]
            raise ValueError(
                f"{caller}: weights(batch) must be one array or a tree like the outputs"
                f" ({treedef}), got {structure}"
            )
    dtype = _trees.work_dtype(outputs)
    return jax.tree.unflatten(
        treedef,
        [
            _normalised(caller, w, x.shape[0], groups, dtype)
            for w, x in zip(given, leaves, strict=True)
        ],
    )


def _normalised(
    caller: str, weights: Any, rows: int, groups: tuple[Group, ...], dtype: jnp.dtype
) -> jax.Array:
    if weights is None:
        return jnp.full((rows,), 1.0 / max(rows, 1), dtype)
    _, repeats = rows_per_example(caller, rows, groups)
    shape = jnp.shape(weights)
    if shape not in {(rows,), (rows // max(repeats, 1),)}:
        raise ValueError(
            f"{caller}: weights(batch) has shape {shape}, but the outputs have {rows} rows from"
            f" {rows // max(repeats, 1)} examples: give one weight for each row or each example"
        )
    weights = jnp.asarray(weights).astype(dtype)
    if shape[0] != rows:
        weights = jnp.repeat(weights, repeats, total_repeat_length=rows)
    total = jnp.sum(weights)
    return weights * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def scale_rows(row_scales: Tree, tree: Tree) -> Tree:
    """Multiplies row r of every leaf (L, ...) by entry r of the matching leaf (L,)."""
    return jax.tree.map(
        lambda w, x: w.reshape(w.shape + (1,) * (x.ndim - 1)) * x.astype(w.dtype), row_scales, tree
    )


def map_examples(
    function: Callable[..., Tree],
    batch: Tree,
    group: Group,
    *per_example: Tree,
    chunk: int | None = None,
) -> Tree:
    """Maps a function of a batch over batches that hold one example of a group each.

    Args:
      function: (batch of one example, *extras) -> tree.
      batch: the whole batch; what the group does not map is given to every call whole.
      group: which leaves hold examples, and where.
      *per_example: further trees whose leaves have a leading example axis.
      chunk: how many examples to take at a time; None for all.

    Returns:
      The results, stacked along a leading axis N; N = 1 for a group without mapped leaves.
    """
    leaves, structure = jax.tree.flatten(batch)
    mapped = [i for i, axis in enumerate(group.axes) if axis is not None]

    def one(slices: list[jax.Array], *extras: Tree) -> Tree:
        parts = list(leaves)
        for i, x in zip(mapped, slices, strict=True):
            parts[i] = jnp.expand_dims(x, group.axes[i])
        return function(jax.tree.unflatten(structure, parts), *extras)

    if not mapped and not jax.tree.leaves(per_example):
        return jax.tree.map(lambda x: x[None], one([]))
    slices = [jnp.moveaxis(leaves[i], group.axes[i], 0) for i in mapped]
    if chunk is None or chunk >= (group.size or 1):
        return jax.vmap(one)(slices, *per_example)
    return jax.lax.map(lambda x: one(*x), (slices, *per_example), batch_size=chunk)

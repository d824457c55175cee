"""Rows of R counted by examples and columns: row order, and the cotangents that make them.

Within a group of examples a row has two numbers, its example n and its output column c. The rows
of R are ordered leaf after leaf of the output coefficients, row-major within a leaf.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import examples
from natgrad_jax.examples import Group

Tree = Any


class RowGroup(NamedTuple):
    """Rows of one group of examples.

    Attributes:
      examples: N.
      leaves: for each coefficient leaf of this group (its position, first column, columns).
    """

    examples: int
    leaves: tuple[tuple[int, int, int], ...]

    @property
    def columns(self) -> int:
        """C."""
        return sum(width for _, _, width in self.leaves)


def row_groups(caller: str, coefficients: Tree, groups: tuple[Group, ...]) -> list[RowGroup]:
    """Assigns the columns of every coefficient leaf to its group."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in groups]
    for i, c in enumerate(jax.tree.leaves(coefficients)):
        group, _ = examples.rows_per_example(caller, c.shape[0], groups)
        own = found[groups.index(group)]
        start = sum(width for _, _, width in own)
        own.append((i, start, math.prod(c.shape) // max(group.size or 1, 1)))
    return [
        RowGroup(1 if group.size is None else group.size, tuple(own))
        for group, own in zip(groups, found, strict=True)
    ]


def whole(coefficients: Tree) -> list[RowGroup]:
    """The batch as one example: every row is a column."""
    leaves, start = [], 0
    for i, c in enumerate(jax.tree.leaves(coefficients)):
        leaves.append((i, start, math.prod(c.shape)))
        start += math.prod(c.shape)
    return [RowGroup(1, tuple(leaves))]


def cotangents(output_metric: Any, groups: list[RowGroup]) -> list[jax.Array]:
    """Columns of B for every example at once: for each output leaf (C, L, ...).

    B acts row by row, so one unit coefficient at the same place of every example gives the same
    column of every example's B. Groups do not share outputs: they share columns.
    """
    leaves, structure = jax.tree.flatten(output_metric.coefficients)
    count = max((group.columns for group in groups), default=0)
    basis: list[Any] = [None] * len(leaves)
    for group in groups:
        for i, start, width in group.leaves:
            unit = jnp.eye(count, dtype=leaves[i].dtype)[:, start : start + width]
            everywhere = jnp.broadcast_to(unit[:, None, :], (count, group.examples, width))
            basis[i] = everywhere.reshape(count, *leaves[i].shape)
    stacked = jax.vmap(output_metric.factor_product)(jax.tree.unflatten(structure, basis))
    return jax.tree.leaves(stacked)


def everywhere(output_metric: Any) -> list[jax.Array]:
    """Columns of B for all rows at once: for each output leaf (C, L, ...).

    A column is one place within a row of one coefficient leaf, in every row.
    """
    leaves, structure = jax.tree.flatten(output_metric.coefficients)
    widths = [math.prod(c.shape[1:]) for c in leaves]
    count, start, basis = sum(widths), 0, []
    for c, width in zip(leaves, widths, strict=True):
        unit = jnp.eye(count, dtype=c.dtype)[:, start : start + width]
        start += width
        wide = jnp.broadcast_to(unit[:, None, :], (count, c.shape[0], width))
        basis.append(wide.reshape(count, *c.shape))
    stacked = jax.vmap(output_metric.factor_product)(jax.tree.unflatten(structure, basis))
    return jax.tree.leaves(stacked)


def _placed(groups: list[RowGroup]) -> list[tuple[int, int, int]]:
    """(group, first column, columns) of every coefficient leaf, in order."""
    found = {
        i: (g, start, width) for g, group in enumerate(groups) for i, start, width in group.leaves
    }
    return [found[i] for i in sorted(found)]


def to_rows(groups: list[RowGroup], parts: list[jax.Array]) -> jax.Array:
    """Arrays (N, C, ...), one a group, as rows (M, ...)."""
    pieces = []
    for g, start, width in _placed(groups):
        piece = parts[g][:, start : start + width]
        pieces.append(piece.reshape(piece.shape[0] * width, *piece.shape[2:]))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def from_rows(groups: list[RowGroup], rows: jax.Array) -> list[jax.Array]:
    """The inverse of `to_rows`."""
    columns: list[list[jax.Array]] = [[] for _ in groups]
    begin = 0
    for g, _, width in _placed(groups):
        stop = begin + groups[g].examples * width
        columns[g].append(rows[begin:stop].reshape(groups[g].examples, width, *rows.shape[1:]))
        begin = stop
    empty = lambda group: jnp.zeros((group.examples, 0, *rows.shape[1:]), rows.dtype)
    return [
        jnp.concatenate(own, axis=1) if own else empty(group)
        for own, group in zip(columns, groups, strict=True)
    ]


def to_matrix(groups: list[RowGroup], blocks: dict[tuple[int, int], jax.Array]) -> jax.Array:
    """Blocks (N1, C1, N2, C2), upper ones for pairs of groups, as one symmetric (M, M)."""

    def block(g: int, h: int) -> jax.Array:
        return blocks[g, h] if g <= h else jnp.transpose(blocks[h, g], (2, 3, 0, 1))

    turn: Callable[[jax.Array], jax.Array] = lambda x: jnp.transpose(x, (2, 3, 0, 1))
    lines = []
    for g in range(len(groups)):
        parts = [turn(block(g, h)) for h in range(len(groups))]
        wide = to_rows(groups, parts)  # (M, N, C)
        lines.append(jnp.transpose(wide, (1, 2, 0)))
    return to_rows(groups, lines)


def centered(removed: jax.Array, rows: jax.Array) -> jax.Array:
    """(I - r r^T) X for a unit vector r and rows X (M, ...)."""
    flat = rows.reshape(rows.shape[0], -1)
    along = jnp.dot(removed, flat, precision=jax.lax.Precision.HIGHEST)
    return (flat - removed[:, None] * along[None, :]).reshape(rows.shape)


def centered_gram(removed: jax.Array, gram: jax.Array) -> jax.Array:
    """(I - r r^T) K (I - r r^T) in one pass: K - r b^T - b r^T, b = K r - (r^T K r) r / 2."""
    product = jnp.dot(gram, removed, precision=jax.lax.Precision.HIGHEST)
    b = product - 0.5 * jnp.dot(removed, product) * removed
    outer = removed[:, None] * b[None, :]
    return gram - (outer + removed[None, :] * b[:, None])

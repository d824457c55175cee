"""Parameters in blocks: a linear use with its bias, and how its entries lie in the parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _trees
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.joined import leaves_behind

Tree = Any


class Bias(NamedTuple):
    """A bias within the block of a linear use: entry (b, q) is entries[b, q] of its root."""

    root: int
    shape: tuple[int, ...]
    entries: np.ndarray

    def take(self, array: jax.Array) -> jax.Array:
        """(B, 1, q)."""
        flat = array.reshape(-1)
        whole = np.array_equal(self.entries.reshape(-1), np.arange(flat.size))
        return (flat if whole else flat[self.entries.reshape(-1)]).reshape(self._row_shape)

    def place(self, rows: jax.Array) -> jax.Array:
        """The transpose of `take`."""
        size, flat = math.prod(self.shape), rows.reshape(-1)
        if not np.array_equal(self.entries.reshape(-1), np.arange(size)):
            flat = jnp.zeros((size,), rows.dtype).at[self.entries.reshape(-1)].set(flat)
        return flat.reshape(self.shape)

    @property
    def _row_shape(self) -> tuple[int, int, int]:
        return self.entries.shape[0], 1, self.entries.shape[1]


class Block(NamedTuple):
    """A block of parameters.

    Attributes:
      place: which entries of which root.
      bias: what is added to the result of the use, or None.
      kind: "kronecker"; "look-up" when one-hot vectors enter; "rows" without a linear use.
    """

    place: Place
    bias: Bias | None
    kind: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, p, q)."""
        b, p, q = self.place.sizes
        return b, p + (self.bias is not None), q


def layout(
    blocks: list[Block], joined: dict[int, Joined], params: Tree
) -> tuple[Callable[[Tree], list[jax.Array]], Callable[[list[jax.Array], Tree], Tree], bool]:
    """The two maps between params-like trees and arrays (B, p, q), one a block: split and merge.

    Args:
      blocks: they do not overlap.
      joined: arrays that join parameters, where blocks speak of them.
      params: pytree, for shapes.

    Returns:
      (split, merge, covers), as in :class:`Kronecker`.
    """
    leaves, structure = jax.tree.flatten(params)
    dtype = _trees.work_dtype(params)

    def split(tree: Tree) -> list[jax.Array]:
        vectors = [x.astype(dtype) for x in jax.tree.leaves(tree)]
        roots = dict(enumerate(vectors)) | {r: j.gather(vectors) for r, j in joined.items()}
        return [_take(block, roots) for block in blocks]

    def scatter(arrays: list[jax.Array]) -> list[jax.Array | None]:
        total: list[jax.Array | None] = [None] * len(leaves)
        for block, x in zip(blocks, arrays, strict=True):
            for root, array in _place(block, x):
                pairs = joined[root].scatter(array) if root in joined else [(root, array)]
                for leaf, y in pairs:
                    total[leaf] = y if total[leaf] is None else total[leaf] + y
        return total

    covered = np.zeros(len(leaves), int)
    for block in blocks:
        for root, size in _sizes(block):
            behind = leaves_behind(root, joined)
            if len(behind) > 1 or root in joined:
                for leaf in behind:
                    covered[leaf] += leaves[leaf].size
            else:
                covered[root] += size

    def merge(arrays: list[jax.Array], other: Tree) -> Tree:
        found, result = scatter(arrays), []
        ones = None
        for i, rest in enumerate(jax.tree.leaves(other)):
            if found[i] is None:
                result.append(rest)
            elif covered[i] == leaves[i].size:
                result.append(found[i])
            else:
                ones = scatter([jnp.ones(b.shape, dtype) for b in blocks]) if ones is None else ones
                result.append(found[i] + (1 - ones[i]) * rest)
        return jax.tree.unflatten(structure, result)

    covers = all(n == leaf.size for n, leaf in zip(covered, leaves, strict=True))
    return split, merge, covers


def _take(block: Block, roots: dict[int, jax.Array]) -> jax.Array:
    place = block.place
    entries = views.take(roots[place.leaf], place.offset, place.b + place.p + place.q)
    entries = entries.reshape(place.sizes)
    if block.bias is None:
        return entries
    return jnp.concatenate([entries, block.bias.take(roots[block.bias.root])], axis=1)


def _place(block: Block, x: jax.Array) -> list[tuple[int, jax.Array]]:
    """The transpose of `_take`: arrays like roots."""
    place, p = block.place, block.place.sizes[1]
    pieces = place.b + place.p + place.q
    own = views.place(x[:, :p].reshape(-1), place.shape, place.offset, pieces)
    if block.bias is None:
        return [(place.leaf, own)]
    return [(place.leaf, own), (block.bias.root, block.bias.place(x[:, p]))]


def _sizes(block: Block) -> list[tuple[int, int]]:
    sizes = [(block.place.leaf, math.prod(block.place.sizes))]
    return sizes if block.bias is None else [*sizes, (block.bias.root, block.bias.entries.size)]

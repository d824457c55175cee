"""Parameters joined into one array before use: their factors are those of the joint array.

Fused gates and projections concatenate kernels. Each entry of the joint array is one entry of one
parameter, so inner products of rows are the same for both, and vectors move back and forth.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.view import View


class Joined(NamedTuple):
    """A concatenation or a stack of parameters, each of which appears once, whole.

    Attributes:
      stacks: whether a new dimension was made.
      axis: along which they were joined.
      views: of the parameters, in order.
      shapes: of the parameters.
    """

    stacks: bool
    axis: int
    views: tuple[View, ...]
    shapes: tuple[tuple[int, ...], ...]

    def gather(self, leaves: list[jax.Array]) -> jax.Array:
        """The joint array of parameter-shaped leaves."""
        parts = [
            views.take(leaves[v.root], v.offset, _pieces(v)).reshape(_sizes(v)) for v in self.views
        ]
        return (jnp.stack if self.stacks else jnp.concatenate)(parts, axis=self.axis)

    def scatter(self, array: jax.Array) -> list[tuple[int, jax.Array]]:
        """The transpose of `gather`: pairs (leaf, array like it)."""
        result, start = [], 0
        for view, shape in zip(self.views, self.shapes, strict=True):
            sizes = _sizes(view)
            count = 1 if self.stacks else sizes[self.axis]
            part = jax.lax.slice_in_dim(array, start, start + count, axis=self.axis)
            start += count
            placed = views.place(part.reshape(-1), shape, view.offset, _pieces(view))
            result.append((view.root, placed))
        return result

    def owners(self, indices: np.ndarray) -> np.ndarray:
        """The number, among `views`, of the parameter behind each entry of the flat joint array."""
        sizes = [_sizes(view) for view in self.views]
        counts = [1 if self.stacks else size[self.axis] for size in sizes]
        inner = math.prod(sizes[0][self.axis + (not self.stacks) :])
        along = indices // max(inner, 1) % max(sum(counts), 1)
        return np.repeat(np.arange(len(counts)), counts)[along]


def leaves_behind(root: int, joined: dict[int, Joined]) -> list[int]:
    """The parameters that a root stands for, in order."""
    return [view.root for view in joined[root].views] if root in joined else [root]


def _pieces(view: View) -> views.Pieces:
    return tuple(piece for dim in view.dims for piece in dim)


def _sizes(view: View) -> tuple[int, ...]:
    return tuple(views.size(dim) for dim in view.dims)


def joined(equation: Any, operands: list[View | None], shapes: dict[int, Any]) -> Joined | None:
    """Reads a join of whole parameters, or None."""
    name = _jaxpr.name(equation)
    if name not in ("concatenate", "stack") or any(view is None for view in operands):
        return None
    found = [view for view in operands if view is not None]
    roots = [view.root for view in found]
    if len(set(roots)) < len(roots) or not set(roots) <= set(shapes):
        return None
    for view in found:
        size = math.prod(shapes[view.root])
        broadcast = any(stride == 0 for _, stride in _pieces(view))
        if view.scale is not None or view.scanned or broadcast or views.size(_pieces(view)) != size:
            return None
    axis = _jaxpr.parameter(equation, "axis" if name == "stack" else "dimension")
    return Joined(name == "stack", int(axis), tuple(found), tuple(shapes[r] for r in roots))

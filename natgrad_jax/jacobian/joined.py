"""Parameters joined into one array before use: their factors are those of the joint array.

Fused gates and projections concatenate kernels, complex layers make one complex array of two real
ones. Each entry of the joint array is one entry of one parameter, or of two, so that vectors move
back and forth and inner products of rows are the same for both.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.primitives.registry import rule_of
from natgrad_jax.jacobian.view import View


class Joined(NamedTuple):
    """Parameters, or separate parts of one, that make up an array.

    Attributes:
      views: of the parameters, in order.
      shapes: of the parameters.
      axis: along which they were joined; None for the parts of a complex array.
      stacks: whether that dimension is a new one.
      units: of a complex array, sum_k units[k] * part[k]: unit numbers a quarter turn apart.
    """

    views: tuple[View, ...]
    shapes: tuple[tuple[int, ...], ...]
    axis: int | None = None
    stacks: bool = False
    units: tuple[complex, ...] = ()

    def gather(self, leaves: list[jax.Array]) -> jax.Array:
        """The joint array of parameter-shaped leaves."""
        parts = [
            views.take(leaves[v.root], v.offset, _pieces(v)).reshape(_sizes(v)) for v in self.views
        ]
        if self.axis is None:
            pairs = zip(self.units, parts, strict=True)
            signed = {bool(unit.imag): (unit.real + unit.imag) * x for unit, x in pairs}
            dtype = jnp.promote_types(*(x.dtype for x in parts))
            return jax.lax.complex(signed[False].astype(dtype), signed[True].astype(dtype))
        return (jnp.stack if self.stacks else jnp.concatenate)(parts, axis=self.axis)

    def scatter(self, array: jax.Array) -> list[tuple[int, jax.Array]]:
        """The transpose of `gather`: for each parameter (leaf, array like it)."""
        result: dict[int, jax.Array] = {}
        for view, shape, part in zip(self.views, self.shapes, self._parts(array), strict=True):
            placed = views.place(part.reshape(-1), shape, view.offset, _pieces(view))
            result[view.root] = result[view.root] + placed if view.root in result else placed
        return list(result.items())

    def _parts(self, array: jax.Array) -> list[jax.Array]:
        if self.axis is None:
            return [times(array, unit) for unit in self.units]
        parts, start = [], 0
        for view in self.views:
            count = 1 if self.stacks else _sizes(view)[self.axis]
            parts.append(jax.lax.slice_in_dim(array, start, start + count, axis=self.axis))
            start += count
        return parts

    def owners(self, indices: np.ndarray) -> np.ndarray:
        """The number, among `views`, of the parameter behind each entry of the flat joint array."""
        assert self.axis is not None
        sizes = [_sizes(view) for view in self.views]
        counts = [1 if self.stacks else size[self.axis] for size in sizes]
        inner = math.prod(sizes[0][self.axis + (not self.stacks) :])
        along = indices // max(inner, 1) % max(sum(counts), 1)
        return np.repeat(np.arange(len(counts)), counts)[along]


def times(array: jax.Array, unit: complex) -> jax.Array:
    """Re(unit * array) for a unit that is 1, -1, 1j or -1j."""
    part = jnp.real(array) if unit.real else -jnp.imag(array)
    return -part if -1 in (unit.real, unit.imag) else part


def leaves_behind(root: int, joined: dict[int, Joined]) -> list[int]:
    """The parameters that a root stands for, in order."""
    if root not in joined:
        return [root]
    return list(dict.fromkeys(view.root for view in joined[root].views))


def _pieces(view: View) -> views.Pieces:
    return tuple(piece for dim in view.dims for piece in dim)


def _sizes(view: View) -> tuple[int, ...]:
    return tuple(views.size(dim) for dim in view.dims)


def joined(equation: Any, operands: list[Any], shapes: dict[int, Any]) -> Joined | None:
    """Reads a join of whole parameters, or a complex array of two real ones; None for others."""
    rule, held = rule_of(equation), [value.view for value in operands]
    if any(view is None or view.scanned or view.root not in shapes for view in held):
        return None
    own = tuple(shapes[view.root] for view in held)
    if rule.join is not None:
        if not all(view.scale is None and _is_all(view, shapes) for view in held):
            return None
        distinct = len({view.root for view in held}) == len(held)
        stacks, axis = rule.join(equation)
        return Joined(tuple(held), own, axis, stacks) if distinct else None
    if len(held) != 2 or not rule.complex_parts:
        return None
    units = tuple(_unit(view) * turn for view, turn in zip(held, rule.complex_parts, strict=True))
    turned = all(x in (1, -1, 1j, -1j) for x in units)
    turned = turned and units[0].real * units[1].real == 0 == units[0].imag * units[1].imag
    plain = all(_stride(view) is not None for view in held)
    is_complex = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.complexfloating)
    if not (turned and plain and is_complex and _are_disjoint(*held)):
        return None
    return Joined(tuple(v._replace(scale=None, factor=1) for v in held), own, units=units)


def _is_all(view: View, shapes: dict[int, Any]) -> bool:
    size, pieces = math.prod(shapes[view.root]), _pieces(view)
    return views.size(pieces) == size and all(stride for _, stride in pieces)


def _unit(view: View) -> complex:
    return 0 if view.factor is None else complex(view.factor)


def _stride(view: View) -> int | None:
    """The one stride of a view that runs straight through its parameter; None for others."""
    pieces = views.merged(_pieces(view))
    if len(pieces) > 1 or any(stride <= 0 for _, stride in pieces):
        return None
    return pieces[0][1] if pieces else 1


def _are_disjoint(one: View, two: View) -> bool:
    if one.root != two.root:
        return True
    first, second = (views.indices(view.offset, _pieces(view)) for view in (one, two))
    return not np.intersect1d(first, second).size


def in_leaf(joint: Joined, number: int, offset: int, pieces: views.Pieces) -> tuple[int, Any]:
    """Where entries of a complex array lie in the parameter that is its part `number`."""
    view = joint.views[number]
    stride = _stride(view)
    assert stride is not None
    return view.offset + stride * offset, tuple((n, s * stride) for n, s in pieces)

"""Primitives that take or replace windows at fixed or computed positions."""

from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import sliced
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.view import View


def _slice(equation: Any, labels: list[Label]) -> Label:
    """Leaves the example axis whole, or takes neighbouring examples."""
    label = axis(labels)
    count, left = (
        s[0][label.dim] for s in (_jaxpr.shapes_in(equation), _jaxpr.shapes_out(equation))
    )
    if left == count:
        return label
    start = int(_jaxpr.parameter(equation, "start_indices")[label.dim])
    strides = _jaxpr.parameter(equation, "strides")
    require(label.outer == label.inner == 1 and (strides is None or strides[label.dim] == 1))
    return sliced(label, start, start + left, count)


def _dynamic_slice(equation: Any, labels: list[Label]) -> Label:
    require(all(label is None for label in labels[1:]))
    label = axis(labels[:1])
    require(_jaxpr.shapes_out(equation)[0][label.dim] == _jaxpr.shapes_in(equation)[0][label.dim])
    return label


def _update(equation: Any, labels: list[Label]) -> Label:
    require(all(label is None for label in labels[2:]))
    label = axis(labels[:2])
    sizes = {s[label.dim] for s in _jaxpr.shapes_in(equation)[:2]}
    require(sizes == {_jaxpr.shapes_out(equation)[0][label.dim]})
    return label


def _slice_view(equation: Any, view: View, known: Any) -> list[View] | None:
    steps = _jaxpr.parameter(equation, "strides") or (1,) * len(view.dims)
    starts = _jaxpr.parameter(equation, "start_indices")
    cut = views.strided(view, starts, _jaxpr.shapes_out(equation)[0], steps)
    return None if cut is None else [cut]


def _dynamic_slice_view(equation: Any, view: View, known: list[Any]) -> list[View] | None:
    sizes, starts = _jaxpr.parameter(equation, "slice_sizes"), []
    for pieces, count, start in zip(view.dims, sizes, known[1:], strict=True):
        room = views.size(pieces) - count
        if room and start is None:
            return None
        starts.append(0 if not room else min(max(int(start), 0), room))
    cut = views.strided(view, starts, sizes, (1,) * len(sizes))
    return None if cut is None else [cut]


register("slice", Rule(examples=one(_slice), view=_slice_view))
register("dynamic_slice", Rule(examples=one(_dynamic_slice), view=_dynamic_slice_view))
register("dynamic_update_slice", Rule(examples=one(_update)))

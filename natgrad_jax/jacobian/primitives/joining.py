"""Primitives that join arrays and take them apart again along a dimension."""

from typing import Any

import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import chained
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import over
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.view import View


def _concatenate(equation: Any, labels: list[Label]) -> Label:
    """Along another dimension, or slices of the examples in their order."""
    along = int(_jaxpr.parameter(equation, "dimension"))
    dims = {label.dim for label in labels if isinstance(label, Axis)}
    if dims != {along}:
        label = join("concatenate", labels)
        require(isinstance(label, Axis) and along not in (label.dim, label.dim - bool(label.slow)))
        return label
    slices = [x for x in labels if isinstance(x, Axis) and x.outer == x.inner == 1 and x.is_plain]
    require(len(slices) == len(labels))
    return chained(slices)


def _known_concatenation(equation: Any, known: list[Any]) -> list[Any]:
    """Integers of which some are known: the others are masked."""
    pieces = [
        np.ma.masked_all(shape, int) if own is None else own
        for own, shape in zip(known, _jaxpr.shapes_in(equation), strict=True)
    ]
    return [np.ma.concatenate(pieces, axis=_jaxpr.parameter(equation, "dimension"))]


def _stack(equation: Any, labels: list[Label]) -> Label:
    label, new = axis(labels), _jaxpr.parameter(equation, "axis")
    return move(label, label.dim + (new <= label.dim))


def _unstack(equation: Any, labels: list[Label]) -> Label:
    label, gone = axis(labels), int(_jaxpr.parameter(equation, "axis"))
    require(label.dim != gone)
    return move(label, label.dim - (gone < label.dim))


def _split_view(equation: Any, view: View, known: Any) -> list[View] | None:
    along, parts, start = _jaxpr.parameter(equation, "axis"), [], 0
    full = [views.size(p) for p in view.dims]
    for count in _jaxpr.parameter(equation, "sizes"):
        starts = [start if d == along else 0 for d in range(len(full))]
        counts = [count if d == along else n for d, n in enumerate(full)]
        parts.append(views.strided(view, starts, counts, (1,) * len(full)))
        start += count
    return None if any(p is None for p in parts) else parts


def _unstack_view(equation: Any, view: View, known: Any) -> list[View] | None:
    along = int(_jaxpr.parameter(equation, "axis"))
    order = (along, *(d for d in range(len(view.dims)) if d != along))
    moved = view._replace(dims=tuple(view.dims[d] for d in order))
    parts = [views.window_at(moved, t) for t in range(len(equation.outvars))]
    return None if any(p is None for p in parts) else parts


register(
    "concatenate",
    Rule(
        examples=one(_concatenate),
        join=lambda equation: (False, int(_jaxpr.parameter(equation, "dimension"))),
        fold=_known_concatenation,
    ),
)
register(
    "stack",
    Rule(
        examples=one(_stack),
        join=lambda equation: (True, int(_jaxpr.parameter(equation, "axis"))),
    ),
)
register("split", Rule(examples=over("axis"), view=_split_view))
register("unstack", Rule(examples=one(_unstack), view=_unstack_view))

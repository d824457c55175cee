"""Primitives that move dimensions about: a view of a parameter stays one."""

import itertools
from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.labels import reshaped
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import over
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.view import View

Dims = tuple[int, ...]


def _reshape_examples(equation: Any, labels: list[Label]) -> Label:
    require(equation.params.get("dimensions") is None)
    label = labels[0]
    require(isinstance(label, Axis))
    assert isinstance(label, Axis)
    return reshaped(label, _jaxpr.shapes_in(equation)[0], _jaxpr.shapes_out(equation)[0])


def _reshape_view(equation: Any, view: View, known: Any) -> list[View] | None:
    if equation.params.get("dimensions") is not None:
        return None
    pieces = tuple(itertools.chain.from_iterable(view.dims))
    dims = views.split_dim(pieces, _jaxpr.shapes_out(equation)[0])
    return None if dims is None else [view._replace(dims=dims)]


def _same_but_ones(equation: Any, dims: Dims) -> Dims | None:
    """Where dimensions come from that are dropped or made only if they have size one."""
    (old,), (new,) = _jaxpr.shapes_in(equation)[:1], _jaxpr.shapes_out(equation)[:1]
    before = [d for d, n in enumerate(old) if n != 1]
    after = [d for d, n in enumerate(new) if n != 1]
    if [old[d] for d in before] != [new[d] for d in after]:
        return None
    source = dict(zip(after, before, strict=True))
    return tuple(dims[source[d]] if d in source else -1 for d in range(len(new)))


def _transpose_examples(equation: Any, labels: list[Label]) -> Label:
    label = axis(labels)
    return move(label, list(_jaxpr.parameter(equation, "permutation")).index(label.dim))


def _transpose_view(equation: Any, view: View, known: Any) -> list[View]:
    order = _jaxpr.parameter(equation, "permutation")
    return [view._replace(dims=tuple(view.dims[d] for d in order))]


def _transpose_dims(equation: Any, dims: Dims) -> Dims:
    return tuple(dims[d] for d in _jaxpr.parameter(equation, "permutation"))


def _squeeze_examples(equation: Any, labels: list[Label]) -> Label:
    label, rank = axis(labels), len(_jaxpr.shapes_in(equation)[0])
    gone = [int(d) % rank for d in _jaxpr.parameter(equation, "dimensions")]
    require(label.dim not in gone)
    return move(label, label.dim - sum(d < label.dim for d in gone))


def _squeeze_view(equation: Any, view: View, known: Any) -> list[View]:
    rank = len(view.dims)
    gone = {int(d) % rank for d in _jaxpr.parameter(equation, "dimensions")}
    return [view._replace(dims=tuple(p for d, p in enumerate(view.dims) if d not in gone))]


def _broadcast_examples(equation: Any, labels: list[Label]) -> Label:
    label = axis(labels[:1])
    target = int(_jaxpr.parameter(equation, "broadcast_dimensions")[label.dim])
    require(_jaxpr.shapes_out(equation)[0][target] == _jaxpr.shapes_in(equation)[0][label.dim])
    return move(label, target)


def _broadcast_view(equation: Any, view: View, known: Any) -> list[View]:
    shape = _jaxpr.shapes_out(equation)[0]
    targets = _jaxpr.parameter(equation, "broadcast_dimensions")
    source = {int(target): d for d, target in enumerate(targets)}
    dims = []
    for d, length in enumerate(shape):
        own = view.dims[source[d]] if d in source else ()
        dims.append(own if views.size(own) == length else views.piece(length, 0))
    return [view._replace(dims=tuple(dims))]


def _expand_examples(equation: Any, labels: list[Label]) -> Label:
    label, rank = axis(labels), len(_jaxpr.shapes_out(equation)[0])
    new = {int(d) % rank for d in _jaxpr.parameter(equation, "dimensions")}
    return move(label, [d for d in range(rank) if d not in new][label.dim])


def _tile_examples(equation: Any, labels: list[Label]) -> Label:
    label = axis(labels)
    require(_jaxpr.parameter(equation, "reps")[label.dim] == 1)
    return label


def _tile_view(equation: Any, view: View, known: Any) -> list[View]:
    copies = [views.piece(int(n), 0) for n in _jaxpr.parameter(equation, "reps")]
    return [view._replace(dims=tuple(c + own for c, own in zip(copies, view.dims, strict=True)))]


def _pad_examples(equation: Any, labels: list[Label]) -> Label:
    label = axis(labels[:1])
    require(labels[1] is None)
    require(tuple(_jaxpr.parameter(equation, "padding_config")[label.dim]) == (0, 0, 0))
    return label


register(
    "reshape",
    Rule(examples=one(_reshape_examples), view=_reshape_view, origin=_same_but_ones, linear=True),
)
register(
    "transpose",
    Rule(
        examples=one(_transpose_examples), view=_transpose_view, origin=_transpose_dims, linear=True
    ),
)
register(
    "squeeze",
    Rule(
        examples=one(_squeeze_examples),
        view=_squeeze_view,
        origin=_same_but_ones,
        linear=True,
    ),
)
register(
    "broadcast_in_dim", Rule(examples=one(_broadcast_examples), view=_broadcast_view, linear=True)
)
register("expand_dims", Rule(examples=one(_expand_examples), origin=_same_but_ones, linear=True))
register("rev", Rule(examples=over("dimensions")))
register("tile", Rule(examples=one(_tile_examples), view=_tile_view))
register("pad", Rule(examples=one(_pad_examples)))

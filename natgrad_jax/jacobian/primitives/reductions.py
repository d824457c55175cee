"""Reductions, cumulative operations, sorting, windows: examples must lie along other dimensions."""

from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.primitives.registry import Examples
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import leading
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import over
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.primitives.registry import shape_of


def _removing(key: str) -> Examples:
    """Works along the dimensions in a parameter, which disappear."""

    def rule(equation: Any, labels: list[Label]) -> Label:
        label = axis(labels)
        gone = [int(d) % len(shape_of(equation, labels)) for d in _jaxpr.parameter(equation, key)]
        require(label.dim not in gone)
        return move(label, label.dim - sum(d < label.dim for d in gone))

    return one(rule)


def _sums(equation: Any, labels: list[Label]) -> bool:
    """Whether examples along one dimension are summed, and nothing else happened to them."""
    (label,) = labels
    return (
        isinstance(label, Axis)
        and label.is_plain
        and label.dim in _jaxpr.parameter(equation, "axes")
    )


def _top(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    rule = over("axis") if "axis" in equation.params else leading(1)
    return rule(equation, labels, known)


def _window(equation: Any, labels: list[Label]) -> Label:
    label = axis(labels)
    for key in ("window_dimensions", "window_strides"):
        require(_jaxpr.parameter(equation, key)[label.dim] == 1)
    require(tuple(_jaxpr.parameter(equation, "padding")[label.dim]) == (0, 0))
    for key in ("base_dilation", "window_dilation"):
        dilation = equation.params.get(key)
        require(dilation is None or dilation[label.dim] == 1)
    return label


register(
    """
    reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin
    """,
    Rule(examples=_removing("axes")),
)
register("reduce_sum", Rule(examples=_removing("axes"), linear=True, sums=_sums))
register("reduce", Rule(examples=_removing("dimensions")))
register("cumsum cumprod cummax cummin cumlogsumexp", Rule(examples=over("axis")))
register("sort", Rule(examples=over("dimension")))
register("top_k", Rule(examples=_top))
register("approx_top_k", Rule(examples=over("reduction_dimension")))
register(
    """
    reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add
    select_and_gather_add
    """,
    Rule(examples=one(_window)),
)

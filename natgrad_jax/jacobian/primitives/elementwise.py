"""Primitives that work entry by entry: examples stay where they are, parameters enter broadcast."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.view import View


def _stays(equation: Any, labels: list[Label]) -> Label:
    """Operands of the shape of the result, or ones that hold no examples."""
    label, shape = join("", labels), _jaxpr.shapes_out(equation)[0]
    require(isinstance(label, Axis))
    assert isinstance(label, Axis)
    first = label.dim - 1 if label.slow else label.dim
    for operand, own in zip(_jaxpr.shapes_in(equation), labels, strict=True):
        same = operand[first : label.dim + 1] == shape[first : label.dim + 1]
        require(own is None or (len(operand) == len(shape) and same))
    return label


examples = one(_stays)


def _same_view(equation: Any, view: View, known: list[Any]) -> list[View]:
    return [view]


def _same_place(equation: Any, dims: tuple[int, ...]) -> tuple[int, ...]:
    return dims


def _multiple(equation: Any, operands: list[Any]) -> View | None:
    """The view that a product of a view and one number is."""
    at = 0 if operands[0].view is not None else 1
    other = operands[1 - at]
    divides = _jaxpr.name(equation) == "div"
    if other.view is not None or other.array.ndim or (divides and at == 1):
        return None
    factor = None if other.known is None else other.known.item()
    if not divides:
        return _times(operands[at].view, other.array, factor)
    return _times(operands[at].view, 1 / other.array, 1 / factor if factor else None)


def _negative(equation: Any, operands: list[Any]) -> View | None:
    return _times(operands[0].view, jnp.asarray(-1.0, operands[0].array.dtype), -1)


def _times(view: View, scalar: jax.Array, factor: complex | None) -> View:
    known = factor is not None and view.factor is not None
    product = factor * view.factor if known else None
    if view.scale is not None:
        dtype = jnp.promote_types(scalar.dtype, view.scale.dtype)
        scalar = scalar.astype(dtype) * view.scale.astype(dtype)
    return view._replace(scale=scalar, factor=product)


def _same_bits(equation: Any, labels: list[Label]) -> Label:
    """Bits of one number as those of one other; of several, they lie along a new last dimension."""
    ranks = len(_jaxpr.shapes_in(equation)[0]), len(_jaxpr.shapes_out(equation)[0])
    label = labels[0]
    require(isinstance(label, Axis))
    assert isinstance(label, Axis)
    require(label.dim < min(ranks))
    return label


RULE = Rule(examples=examples, entrywise=True)

register(
    """
    abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
    cos cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
    igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mulhi ne
    nextafter not one_minus_square or polygamma population_count pow random_gamma_grad
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient tan tanh xor zeta
    """,
    RULE,
)
# Re + 1j * Im of two real parameters, as `lax.complex` makes it.
register("add", RULE._replace(complex_parts=(1, 1), linear=True))
register("sub", RULE._replace(complex_parts=(1, -1), linear=True))
register("mul", RULE._replace(scale=_multiple, linear=True))
register("div", RULE._replace(scale=_multiple, linear="first"))
register("add_any", RULE._replace(linear=True))
register("neg", RULE._replace(scale=_negative, linear=True))
# What changes the representation of entries, or nothing at all, leaves a view a view.
register(
    "convert_element_type",
    RULE._replace(view=_same_view, origin=_same_place, linear=True),
)
register(
    """
    copy copy_p name reduce_precision sharding_constraint layout_constraint pvary pcast mesh_cast
    reshard
    """,
    RULE._replace(view=_same_view, linear=True),
)
register("device_put", Rule(examples=lambda equation, labels, known: labels, passes=True))
# Keys are whole examples here: the dimensions of key data come last.
register("threefry2x32", Rule(examples=examples))
# Coefficients are numbers: they may not be spread over the shape of the argument.
register("polynomial", Rule(examples=examples))
register("bitcast_convert_type", Rule(examples=one(_same_bits)))

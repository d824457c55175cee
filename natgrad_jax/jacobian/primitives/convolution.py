"""Convolutions with a parameter as their kernel: patches of the inputs are what it multiplies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import uses
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.uses import MisfitError
from natgrad_jax.jacobian.uses import Record
from natgrad_jax.jacobian.uses import Use


def _examples(equation: Any, labels: list[Label]) -> Label:
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    require(labels[1] is None and _jaxpr.parameter(equation, "batch_group_count") == 1)
    label = axis(labels)
    require(label.dim == numbers.lhs_spec[0])
    return label._replace(dim=numbers.out_spec[0])


def _use(equation: Any, operands: list[Any], at: int, label: Axis) -> Use:
    """`conv_general_dilated` with the parameter as its kernel: patches are what enters."""
    if at != 1 or _jaxpr.parameter(equation, "batch_group_count") != 1:
        raise MisfitError("a convolution whose kernel is not the parameter")
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    groups = _jaxpr.parameter(equation, "feature_group_count")
    view, a_label = operands[1].view, operands[0].label
    out_channels = views.size(view.dims[rhs[0]])
    split = views.split_dim(view.dims[rhs[0]], (groups, out_channels // groups))
    if split is None:
        raise MisfitError("channels that its groups do not divide")
    window = [views.size(view.dims[d]) for d in rhs[2:]]
    # Kernel dimensions without a piece have size one: nothing to gather along.
    out_sizes = [_jaxpr.shapes_out(equation)[0][d] for d in out[2:]]
    geometry = [
        _jaxpr.parameter(equation, key)
        for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    ]

    def left(a: jax.Array) -> jax.Array:
        images = _channels_last(a, lhs)
        taps = _patches(images, window, out_sizes, *geometry)  # (taps, batch, spatial, channels)
        count, channels = taps.shape[0], taps.shape[-1]
        x = taps.reshape(*taps.shape[:-1], groups, channels // groups)
        x = jnp.moveaxis(x, 0, -1)  # (batch, *spatial, groups, channels per group, taps)
        x = uses.spread(x, _first(a_label))
        n = x.shape[0]
        x = x.reshape(n, -1, groups, channels // groups * count)
        return jnp.moveaxis(x, 2, 1)

    def right(_: Record, g: jax.Array) -> jax.Array:
        z = _channels_last(g, out)
        z = z.reshape(*z.shape[:-1], groups, out_channels // groups)
        z = uses.spread(z, _first(label))
        return jnp.moveaxis(z.reshape(z.shape[0], -1, groups, out_channels // groups), 2, 1)

    p = views.joined(view, rhs[1:])
    record = operands[0].array
    return Use("conv_general_dilated", left, right, split[0], p, split[1], record, own=(out[1],))


def _first(label: Axis) -> Axis:
    """The label of images with examples in front."""
    return label if label.dim == -1 else label._replace(dim=0)


def _channels_last(x: jax.Array, spec: Any) -> jax.Array:
    """(batch, *spatial, channels) from a layout (batch, channels, *spatial) of dimensions."""
    return x.transpose((spec[0], *spec[2:], spec[1]))


def _patches(
    images: jax.Array, window: Any, sizes: Any, strides: Any, padding: Any, lhs: Any, rhs: Any
) -> jax.Array:
    """What each tap of a kernel meets: (taps, batch, *spatial, channels), by strided slices.

    A convolution with identity kernels gives the same, at the price of a grouped convolution.
    """
    config = [(0, 0, 0), *((*p, d - 1) for p, d in zip(padding, lhs, strict=True)), (0, 0, 0)]
    padded = jax.lax.pad(images, jnp.zeros((), images.dtype), config)
    taps = []
    for tap in np.ndindex(*window):
        start = [0, *(t * d for t, d in zip(tap, rhs, strict=True)), 0]
        stop = [
            padded.shape[0],
            *(b + (n - 1) * s + 1 for b, n, s in zip(start[1:-1], sizes, strides, strict=True)),
            padded.shape[-1],
        ]
        taps.append(jax.lax.slice(padded, start, stop, [1, *strides, 1]))
    return jnp.stack(taps)


register("conv_general_dilated", Rule(examples=one(_examples), use=_use))

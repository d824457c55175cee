"""Geodesic acceleration: the second-order correction of a Gauss-Newton step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax._linearization import bend
from natgrad_jax._linearization import linear_maps
from natgrad_jax.metrics import Metric

Tree = Any

#: The longest acceleration beside the direction; a longer one tells that the series fails.
LONGEST = 0.75


class Accelerated(NamedTuple):
    """A direction with its acceleration.

    Attributes:
      direction: d + a / 2, where a is short beside d; d otherwise.
      share: ||a|| / ||d||, in units of the damping scale.
      predicted_decrease: g^T d - d^T F d / 2, what the quadratic model predicts for the step -d,
        without the acceleration.
    """

    direction: Tree
    share: jax.Array
    predicted_decrease: jax.Array


def check(caller: str, metric: Metric) -> None:
    """Raises unless the metric has residuals."""
    if metric.name != "gauss_newton":
        raise ValueError(
            f"{caller}: geodesic acceleration needs residuals, that is a gauss_newton metric, got"
            f" {metric.name}"
        )


def accelerated(
    metric: Metric,
    params: Tree,
    batch: Tree,
    g: Tree,
    d: Tree,
    scale: Tree | None,
    solve: Callable[[Tree], Tree],
) -> Accelerated:
    """Adds a / 2 for a = (F + lambda diag(s))^-1 J^T W r''.

    Transtrum and Sethna, 2012, Improvements to the Levenberg-Marquardt algorithm for nonlinear
    least-squares minimization. The step is -d: r'', twice along d, is
    even, so that the signs of d and a agree.
    """
    dtype = _trees.work_dtype(params)
    function = lambda p: metric.outputs(p, batch)
    outputs, push, pull = linear_maps(metric.name, function, params)
    product = metric.output_metric(outputs, batch, None).product
    curved = bend(metric.name, function, params, d)
    rhs = _trees.cast(pull(_trees.cast_like(product(curved), outputs)), dtype)
    unit, size = _trees.normalised(rhs, dtype)
    a = _trees.scale(solve(unit), size)
    scaled = lambda x: x if scale is None else jax.tree.map(lambda s, y: jnp.sqrt(s) * y, scale, x)
    lengths = [jnp.sqrt(_trees.vdot(x, x, dtype)) for x in (scaled(a), scaled(d))]
    positive = lengths[1] > 0
    share = jnp.where(positive, lengths[0] / jnp.where(positive, lengths[1], 1), 0)
    half = jnp.where(share <= LONGEST, jnp.asarray(0.5, dtype), 0)
    # `where`, not a factor of 0: an acceleration that is not finite has no product with 0.
    better = jax.tree.map(lambda x, y: jnp.where(half > 0, x + half * y, x), d, a)
    pushed = push(_trees.cast_like(d, params))
    square = _trees.vdot(_trees.cast(pushed, dtype), _trees.cast(product(pushed), dtype), dtype)
    return Accelerated(better, share, _trees.vdot(g, d, dtype) - 0.5 * square)

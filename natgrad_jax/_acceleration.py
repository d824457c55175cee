"""Geodesic acceleration: the second-order correction of a Gauss-Newton step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax._linearization import bend
from natgrad_jax._linearization import linear_maps
from natgrad_jax.metrics import Metric

Tree = Any

#: The longest acceleration beside the direction; a longer one tells that the series fails.
_LONGEST = 0.75


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
    d: Tree,
    dtype: jnp.dtype,
    solve: Callable[[Tree], Tree],
) -> tuple[Tree, jax.Array]:
    """d + a / 2, where a is short beside d, and ||a|| / ||d||, for a = (F + lambda I)^-1 J^T W r''.

    Transtrum and Sethna, 2012, Improvements to the Levenberg-Marquardt algorithm for nonlinear
    least-squares minimization. The step is -d: r'', twice along d, is
    even, so that the signs of d and a agree.
    """
    function = lambda p: metric.outputs(p, batch)
    outputs, _, pull = linear_maps(metric.name, function, params)
    curved = bend(metric.name, function, params, d)
    weighted = metric.output_metric(outputs, batch, None).product(curved)
    rhs = _trees.cast(pull(_trees.cast_like(weighted, outputs)), dtype)
    unit, size = _trees.normalised(rhs, dtype)
    a = _trees.scale(solve(unit), size)
    lengths = [jnp.sqrt(_trees.vdot(x, x, dtype)) for x in (a, d)]
    positive = lengths[1] > 0
    share = jnp.where(positive, lengths[0] / jnp.where(positive, lengths[1], 1), 0)
    half = jnp.where(share <= _LONGEST, jnp.asarray(0.5, dtype), 0)
    # `where`, not a factor of 0: an acceleration that is not finite has no product with 0.
    better = jax.tree.map(lambda x, y: jnp.where(half > 0, x + half * y, x), d, a)
    return better, share

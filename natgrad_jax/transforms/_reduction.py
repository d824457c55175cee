"""How well the quadratic model of the objective foretells a step, and the damping that follows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.curvature import squared_length
from natgrad_jax.metrics import Metric

Tree = Any


@functools.partial(jax.jit, static_argnums=0)
def predicted(
    metric: Metric,
    grads: Tree,
    step: Tree,
    params: Tree,
    batch: Tree,
    full_params: Tree | None,
) -> jax.Array:
    """-(g^T u + u^T F u / 2): by how much the undamped model says that a step u lowers L."""
    dtype = _trees.work_dtype(params)
    if not jax.tree.leaves(params):
        return jnp.zeros((), dtype)
    metric = _boundary.fill_masked(metric, params, full_params)
    # Measured on a step of order one, so that squares neither overflow nor underflow.
    unit, size = _trees.normalised(_trees.cast(step, dtype), dtype)
    slope = _trees.vdot(_trees.cast(grads, dtype), unit, dtype)
    return -size * (slope + 0.5 * size * squared_length(metric, params, batch, unit))


def ratio(actual: jax.Array, predicted: jax.Array, value: jax.Array) -> jax.Array:
    """actual / predicted, 1 where both are rounding of the objective; not finite: -infinity.

    Conn, Gould and Toint, 2000, section 17.4.2.
    """
    noise = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)
    above, below = actual + noise, predicted.astype(value.dtype) + noise
    usable = jnp.isfinite(above) & (below > 0) & jnp.isfinite(below)
    found = jnp.where(usable, above / jnp.where(usable, below, 1), -jnp.inf)
    return jnp.where((above == 0) & (below == 0), 1, found)

"""How far a step moves the model's distribution: the quadratic KL, d^T F d / 2."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _records
from natgrad_jax import _thinning
from natgrad_jax import _trees
from natgrad_jax.curvature import squared_length
from natgrad_jax.metrics import Metric

Tree = Any


class KLInfo(NamedTuple):
    """Diagnostics of a step scaled by its KL divergence. float32.

    Attributes:
      kl: half the squared length d^T F d of the incoming step, in nats per row.
      factor: what the step was multiplied by.
    """

    kl: jax.Array
    factor: jax.Array

    def __repr__(self) -> str:
        return _records.line(self)


class KLState(NamedTuple):
    """State of `scale_to_kl` and `clip_by_kl`: the diagnostics of the last update."""

    info: KLInfo


def empty_state() -> KLState:
    """The state before any step."""
    return KLState(KLInfo(jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def rescaled(
    metric: Metric,
    at_most: bool,
    examples: int | None,
    updates: Tree,
    params: Tree,
    batch: Tree,
    kl: jax.Array,
    full_params: Tree | None,
) -> tuple[Tree, KLState]:
    """Scales a step to a quadratic KL divergence, or down to it.

    A step of no length (d^T F d <= 0, or not finite) is left alone. It is measured at so many
    `examples` of the batch, or at all of them.
    """
    if not jax.tree.leaves(params):
        return updates, empty_state()
    metric = _boundary.fill_masked(metric, params, full_params)
    dtype = _trees.work_dtype(params)
    # Measured on a step of order one, so that squares neither overflow nor underflow.
    unit, size = _trees.normalised(_trees.cast(updates, dtype), dtype)
    batch = _thinning.thinned(metric, params, batch, examples)
    squared = squared_length(metric, params, batch, unit)
    measurable = (squared > 0) & jnp.isfinite(squared)
    root = jnp.sqrt(2 * jnp.asarray(kl).astype(dtype) / jnp.where(measurable, squared, 1))
    factor = root / size
    factor = jnp.minimum(factor, 1) if at_most else factor
    factor = jnp.where(measurable, factor, 1)
    scaled = jax.tree.map(lambda d: d * (factor * size), unit)
    info = KLInfo((0.5 * squared * size * size).astype(jnp.float32), factor.astype(jnp.float32))
    return _trees.cast_like(scaled, updates), KLState(info)

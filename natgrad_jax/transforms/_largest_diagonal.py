"""Damping in the units of the problem: by the largest diagonal of F seen lately."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _sharding
from natgrad_jax import _trees
from natgrad_jax import curvature as _curvature
from natgrad_jax.metrics import Metric

Tree = Any

#: What a diagonal seen earlier still counts, one step later. More never forgets: a parameter whose
#: column was large once (an amplitude that passed 1e-50) then stays damped for ever.
_KEPT = 0.5


class Seen(NamedTuple):
    """The diagonal of F here and lately.

    Attributes:
      largest: max(diag F, half of the largest before), the state of the next step.
      scale: the same, positive everywhere.
      size: theta^T diag(F) theta, the squared size of what the outputs are made of. Beside it
        rounding of the outputs is eps.
    """

    largest: Tree
    scale: Tree
    size: jax.Array


def seen(metric: Metric, params: Tree, batch: Tree, full_params: Tree | None, before: Tree) -> Seen:
    """Looks at F; `before` is what was largest until now, zeros at first."""
    core = functools.partial(_seen, metric)
    like = Seen(before, before, jnp.zeros((), _trees.work_dtype(params)))
    return _sharding.run(core, (params, batch, full_params, before), like)


@functools.partial(jax.jit, static_argnums=0)
def _seen(
    metric: Metric, params: Tree, batch: Tree, full_params: Tree | None, before: Tree
) -> Seen:
    metric = _boundary.fill_masked(metric, params, full_params)
    if metric.needs_key:  # the exact one, as for distances
        metric = metric._replace(output_metric=metric.distance_metric, needs_key=False)
    here = _curvature.curvature(metric, params, batch, None)
    dtype = here.dtype
    finite = lambda x: jnp.where(jnp.isfinite(x), jnp.abs(x), 0).astype(dtype)
    now = jax.tree.map(finite, _curvature.diagonal(here))
    largest = jax.tree.map(lambda old, new: jnp.maximum(_KEPT * old, new), before, now)
    moved = jax.tree.map(lambda p, d: p.astype(dtype) * jnp.sqrt(d), params, now)
    # Of any other size a diagonal is information, however small beside the others: one amplitude
    # that vanishes must not make constants of the rest.
    tiny = jnp.finfo(dtype).tiny
    scale = jax.tree.map(lambda d: jnp.where(d > tiny, d, 1), largest)
    return Seen(largest, scale, _trees.vdot(moved, moved, dtype))

"""Whether output rows depend on their own example alone, measured at the batch at hand."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import examples
from natgrad_jax.examples import Group
from natgrad_jax.jacobian import rounding_unit
from natgrad_jax.metrics import Metric

Tree = Any

#: Claims that were checked: a training loop asks at every step.
_checked: dict[Any, None] = {}


def check_claim(caller: str, metric: Metric, params: Tree, batch: Tree) -> None:
    """Warns when `independent=True` is seen to be wrong, once for each metric and shape of batch.

    Called eagerly only: it costs an evaluation of the model, and two at single examples a group.
    """
    leaves = jax.tree.leaves((params, batch))
    if not metric.independent or any(isinstance(x, jax.core.Tracer) for x in leaves):
        return
    key = metric, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    if key in _checked:
        return
    if len(_checked) > 100:
        _checked.clear()
    _checked[key] = None
    difference = alone(metric, params, batch)
    # Outputs of another shape, an infinite difference, are an error where rows are computed.
    if difference != jnp.inf and not difference <= tolerance(metric, params, batch):
        warnings.warn(
            f"{caller}: independent=True at {metric.name}, but examples evaluated alone give other"
            f" outputs than within the batch (relative difference {float(difference):.1e}): rows of"
            " R are not those of the model. Leave `independent` out; see natgrad_jax.verify.",
            stacklevel=3,
        )


@functools.partial(jax.jit, static_argnums=0)
def alone(metric: Metric, params: Tree, batch: Tree) -> jax.Array:
    """The largest relative difference between outputs of an example alone and within the batch."""
    together = jax.tree.leaves(metric.outputs(params, batch))
    parts = []
    for group, m in _looked_at(metric, batch):
        single = jax.tree.leaves(metric.outputs(params, _example(batch, group, m)))
        for i, rows in _outputs_of(metric, batch, group, together):
            z, own = together[i], single[i]
            if own.shape != (rows, *z.shape[1:]):
                return jnp.asarray(jnp.inf, jnp.float32)
            parts.append(_difference(own, z[m * rows : (m + 1) * rows], z))
    return _largest(parts)


@functools.partial(jax.jit, static_argnums=0)
def influence(metric: Metric, params: Tree, batch: Tree) -> jax.Array:
    """The largest relative change of outputs of other examples when one example changes."""
    before = jax.tree.leaves(metric.outputs(params, batch))
    parts = []
    for group, m in _looked_at(metric, batch):
        after = jax.tree.leaves(metric.outputs(params, _changed(batch, group, m)))
        for i, rows in _outputs_of(metric, batch, group, before):
            z = before[i]
            others = jnp.arange(z.shape[0]) // rows != m
            mask = others.reshape(-1, *(1 for _ in z.shape[1:]))
            parts.append(_difference(jnp.where(mask, after[i], 0), jnp.where(mask, z, 0), z))
    return _largest(parts)


def _looked_at(metric: Metric, batch: Tree) -> list[tuple[Group, int]]:
    """The first and the last example of each group."""
    pairs = []
    for group in metric.groups(batch):
        if group.size:
            pairs += [(group, m) for m in sorted({0, group.size - 1})]
    return pairs


def _outputs_of(
    metric: Metric, batch: Tree, group: Group, outputs: list[jax.Array]
) -> list[tuple[int, int]]:
    """The output leaves of a group, and their rows for each example."""
    found = []
    for i, z in enumerate(outputs):
        own, rows = examples.rows_per_example(metric.name, z.shape[0], metric.groups(batch))
        if own == group:
            found.append((i, rows))
    return found


def _example(batch: Tree, group: Group, m: int) -> Tree:
    """The batch with one example of a group alone."""
    cut = lambda x, axis: x[(slice(None),) * (axis % x.ndim) + (slice(m, m + 1),)]
    return _mapped(batch, group, cut)


def _changed(batch: Tree, group: Group, m: int) -> Tree:
    """The batch with example m replaced by its neighbour."""
    order = jnp.arange(group.size).at[m].set(m - 1 if m else min(1, group.size - 1))
    return _mapped(batch, group, lambda x, axis: jnp.take(x, order, axis=axis))


def _mapped(batch: Tree, group: Group, change: Callable[[jax.Array, int], jax.Array]) -> Tree:
    """The batch with its leaves that hold examples of a group changed."""
    leaves, structure = jax.tree.flatten(batch)
    pairs = zip(leaves, group.axes, strict=True)
    changed = [x if axis is None else change(x, axis) for x, axis in pairs]
    return jax.tree.unflatten(structure, changed)


def _difference(one: jax.Array, two: jax.Array, scale: jax.Array) -> jax.Array:
    size = jnp.max(jnp.abs(scale), initial=0)
    largest = jnp.max(jnp.abs(one - two), initial=0)
    return jnp.where(size > 0, largest / jnp.where(size > 0, size, 1), 0).astype(jnp.float32)


def _largest(parts: list[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(parts)) if parts else jnp.zeros((), jnp.float32)


def tolerance(metric: Metric, params: Tree, batch: Tree) -> float:
    """What rounding may make of a relative difference of the model's outputs or derivatives.

    Batches of other sizes are summed in another order.
    """
    return rounding_unit(metric.outputs, params, batch) ** 0.5

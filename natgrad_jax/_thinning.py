"""Some of the examples of a batch, for estimates that need no more."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import batch_size
from natgrad_jax.jacobian import dense
from natgrad_jax.jacobian import plan
from natgrad_jax.metrics import Metric

Tree = Any


def thinned(metric: Metric, params: Tree, batch: Tree, most: int | None) -> Tree:
    """`most` examples of the batch, the same places every time.

    Places are drawn once and for all: evenly spaced ones could fall in step with a batch that has a
    period (augmented copies, tokens of a sequence). The batch itself where the metric would be
    another one for fewer: where rows have weights, the model knows the size of its batch or the
    places in it (as with batch normalisation), or examples form several groups.
    """
    groups = () if metric.groups is None else metric.groups(batch)
    if most is None or metric.weighted or len(groups) != 1:
        return batch
    size = groups[0].size
    if size is None or size <= most:
        return batch
    places = np.sort(np.random.default_rng(0).permutation(size)[:most])
    leaves, structure = jax.tree.flatten(batch)
    few = [
        x if axis is None else jnp.take(x, places, axis=axis, unique_indices=True)
        for x, axis in zip(leaves, groups[0].axes, strict=True)
    ]
    fewer = jax.tree.unflatten(structure, few)
    model = plan.flatten(metric.name, metric.outputs, params, batch, groups)
    rows = [rows for _, rows in dense.wanted_outputs(model, 0)]
    free = batch_size.is_free(model, rows) and _accepts(metric, params, fewer)
    return fewer if free else batch


def _accepts(metric: Metric, params: Tree, batch: Tree) -> bool:
    """Whether what stands beside the model (scales of a likelihood) takes this batch, too."""
    measure = metric.distance_metric or metric.output_metric
    if measure is None:
        return False

    def measured(params: Tree, batch: Tree) -> Tree:
        outputs = metric.outputs(params, batch)
        key = jax.random.key(0) if metric.distance_metric is None and metric.needs_key else None
        return measure(outputs, batch, key).product(outputs)

    try:
        jax.eval_shape(measured, params, batch)
    except Exception:  # numbers for each position in the batch, or an assertion of the model's
        return False
    return True

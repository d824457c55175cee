"""Parameters that a metric does not see: no output of its model depends on them."""

import warnings
from typing import Any

import jax

from natgrad_jax.jacobian import unused_inputs
from natgrad_jax.metrics import Metric

Tree = Any

#: What was said already: a training loop asks at every step, and a program is traced again.
_said: dict[Any, None] = {}


def unused(metric: Metric, params: Tree, batch: Tree) -> list[str]:
    """The paths of parameters that no output depends on, from shapes alone.

    Those that reach one through `stop_gradient` are none of them: they were frozen on purpose.
    """
    if metric.outputs is None:
        return []
    leaves, structure = jax.tree.flatten(params)
    function = lambda leaves: metric.outputs(jax.tree.unflatten(structure, leaves), batch)
    numbers = unused_inputs(function, leaves)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [paths[i] for i in numbers if leaves[i].size]


def warn(metric: Metric, name: Metric, params: Tree, batch: Tree) -> None:
    """Names parameters that the metric does not see, once for each metric and set of them.

    Args:
      metric: the metric as a function of the visible parameters.
      name: the metric as its maker returned it, which what was said is remembered by.
      params: parameters, or their shapes.
      batch: the batch, or its shapes.
    """
    paths = unused(metric, params, batch)
    key = name, tuple(paths)
    # Where none at all is seen the model is a constant, and F zero as a whole.
    some = 0 < len(paths) < sum(leaf.size > 0 for leaf in jax.tree.leaves(params))
    if not some or key in _said:
        return
    if len(_said) > 100:
        _said.clear()
    _said[key] = None
    names = ", ".join(path or "params" for path in paths)
    warnings.warn(
        f"{metric.name}: no output depends on the parameters {names}: F is zero there, and their"
        " gradient is only divided by the damping. Give them an optimizer of their own,"
        " with optax.partition, or let every metric see what it trains; see natgrad_jax.explain.",
        stacklevel=2,
    )

"""Checks at public boundaries: what shapes, types and structure tell, said at once."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgrad_jax.metrics import Metric

Tree = Any


def check_metric(caller: str, metric: object) -> None:
    """Raises unless `metric` was made by one of the metric constructors."""
    if not isinstance(metric, Metric):
        raise TypeError(
            f"{caller}: metric must come from exact_fisher, sampled_fisher, empirical_fisher,"
            f" gauss_newton, hessian or euclidean, got {metric!r}"
        )


def check_number(caller: str, name: str, value: Any, *, schedule: bool = False) -> None:
    """Raises unless `value` is one real number that is not negative, or a schedule where allowed.

    Values of arrays are not looked at: they may be traced, and belong to `info`.
    """
    if schedule and callable(value):
        return
    if callable(value):
        raise TypeError(
            f"{caller}: {name} must be a number, got a function ({value!r}); give a schedule"
            " by optax.inject_hyperparams around the transformation, where there is none call"
            " schedule(step)"
        )
    numeric = isinstance(value, int | float) or hasattr(value, "dtype")
    if not numeric or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        wanted = "a number or a schedule" if schedule else "a number"
        raise TypeError(f"{caller}: {name} must be {wanted}, got {value!r}")
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise TypeError(f"{caller}: {name} must be real, got {value!r}")
    if jnp.shape(value) != ():
        raise ValueError(f"{caller}: {name} must be a scalar, got shape {jnp.shape(value)}")
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"{caller}: {name} must not be negative, got {value}")


def check_count(caller: str, name: str, value: Any, *, optional: bool = False) -> None:
    """Raises unless `value` is a positive int, or None where that is allowed."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (whole and value >= 1) and not (optional and value is None):
        wanted = "None or a positive int" if optional else "a positive int"
        raise ValueError(
            f"{caller}: {name} must be {wanted}, got {value!r}; under inject_hyperparams name it"
            " in static_args"
        )


def check_params(caller: str, params: Tree) -> None:
    """Raises unless every leaf is a real floating point array."""
    if params is None:
        raise ValueError(f"{caller}: params is None; the metric is evaluated at the parameters")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"{caller}: {name} must be an array, got {type(leaf).__name__}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{caller}: {name} has dtype {leaf.dtype}; natural gradients need real floating"
                " point parameters (split complex ones into real and imaginary parts, and mask or"
                " partition integers away)"
            )


def check_batch(caller: str, batch: Tree) -> None:
    """Raises unless every leaf of the batch is an array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"{caller}: batch{jax.tree_util.keystr(path)} must be an array, got"
                f" {type(leaf).__name__}: {leaf!r}"
            )


#: Weights that were looked at: a training loop asks at every step.
_weighed: dict[Any, None] = {}


def check_weights(caller: str, metric: Metric, batch: Tree) -> None:
    """Raises where weights are seen to be negative, once for each metric and shape of batch.

    Called eagerly only: what is traced has no values.
    """
    leaves = jax.tree.leaves(batch)
    if metric.weights is None or any(isinstance(x, jax.core.Tracer) for x in leaves):
        return
    key = metric, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    if key in _weighed:
        return
    if len(_weighed) > 100:
        _weighed.clear()
    _weighed[key] = None
    weights = jax.tree.leaves(metric.weights(batch))
    found = [np.asarray(w) for w in weights if not isinstance(w, jax.core.Tracer)]
    least = min((float(np.min(w, initial=0)) for w in found), default=0.0)
    if least < 0:
        raise ValueError(
            f"{caller}: weights(batch) of {metric.name} must not be negative, got {least:.4g}: F"
            " would not be positive semi-definite"
        )


def check_real(caller: str, name: str, tree: Tree) -> None:
    """Raises unless every leaf is real: a cast would drop imaginary parts."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} must be real floating point, got"
                f" {jnp.result_type(leaf)}"
            )


def check_like_params(caller: str, name: str, tree: Tree, params: Tree) -> None:
    """Raises unless `tree` is real, with the structure and the shapes of `params`."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(params)
    if structure != expected:  # type: ignore[operator]
        raise ValueError(
            f"{caller}: {name} must be a tree like params, {expected}, got {structure}"
        )
    for (path, leaf), like in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, the"
                f" parameter has {jnp.shape(like)}"
            )
    check_real(caller, name, tree)


def fill_masked(metric: Metric, params: Tree, full_params: Tree | None) -> Metric:
    """The metric as a function of the visible parameters alone.

    `optax.masked` and `optax.partition` put `MaskedNode` in place of hidden leaves; the model gets
    those from `full_params`, where they are constants.
    """
    if metric.outputs is None or not masked(params):
        return metric
    outputs = lambda visible, batch: metric.outputs(
        filled(metric.name, visible, full_params), batch
    )
    return metric._replace(outputs=outputs)


def filled(caller: str, visible: Tree, full_params: Tree | None) -> Tree:
    """The parameters with hidden leaves from `full_params`."""
    if not masked(visible):
        return visible
    if full_params is None:
        raise ValueError(
            f"{caller}: some parameters are hidden (optax.MaskedNode), but all of them are needed:"
            " pass full_params=params to update"
        )
    take = lambda v, full: full if _hidden(v) else v
    return jax.tree.map(take, visible, full_params, is_leaf=_hidden)


def visible(tree: Tree, params: Tree) -> Tree:
    """A tree like all parameters, or like the visible ones, with hidden leaves as in `params`.

    Where it fits neither it is left as it is, for a check to say so.
    """
    whole = jax.tree.structure(jax.tree.map(lambda x: 0, params, is_leaf=_hidden))
    if not masked(params) or jax.tree.structure(tree) != whole:  # type: ignore[operator]
        return tree
    return jax.tree.map(lambda p, x: p if _hidden(p) else x, params, tree, is_leaf=_hidden)


def _hidden(x: object) -> bool:
    return isinstance(x, optax.MaskedNode)


def masked(params: Tree) -> bool:
    """Whether `optax.masked` or `optax.partition` hide some leaves."""
    return any(map(_hidden, jax.tree.leaves(params, is_leaf=_hidden)))

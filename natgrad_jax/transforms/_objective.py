"""The objective that a transformation looks at: optax's `value_fn`, bound to the batch."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees

Tree = Any
Objective = Callable[[Tree, Tree, Tree | None], jax.Array]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def bind(caller: str, value_fn: Callable[..., Any] | None) -> Objective:
    """(params, batch, full_params) -> the objective, a scalar in at least float32.

    `value_fn` gets the batch by name if its signature has `batch`, else as second argument if it
    has one without default (or takes any number), else parameters alone. Hidden parameters are
    filled in.

    Raises:
      TypeError: `value_fn` is missing or no function.
      ValueError: it returns no real scalar (when it is called).
    """
    if not callable(value_fn):
        raise TypeError(
            f"{caller}: update() needs the keyword argument `value_fn`, the objective as a function"
            f" of (params, batch) or of params: update(grads, state, params, batch=batch,"
            f" value_fn=loss), got {value_fn!r}"
        )
    call = _with_batch(value_fn)

    def objective(params: Tree, batch: Tree, full_params: Tree | None) -> jax.Array:
        return as_value(caller, call(_boundary.filled(caller, params, full_params), batch))

    return objective


def as_value(caller: str, value: Any) -> jax.Array:
    """A value of the objective in at least float32."""
    if not (hasattr(value, "dtype") or isinstance(value, int | float)):
        raise TypeError(
            f"{caller}: the objective (value_fn) must return one real scalar, without auxiliary"
            f" output, got {type(value).__name__}"
        )
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"{caller}: the objective must be a real scalar, got {jnp.result_type(value)} of shape"
            f" {jnp.shape(value)}"
        )
    value = jnp.asarray(value)
    return value.astype(_trees.work_dtype(value))


def _with_batch(value_fn: Callable[..., Any]) -> Callable[[Tree, Tree], Any]:
    alone = lambda params, batch: value_fn(params)
    try:
        parameters = inspect.signature(value_fn).parameters
    except ValueError:  # a builtin without signature
        return alone
    if "batch" in parameters:
        return lambda params, batch: value_fn(params, batch=batch)
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        return value_fn
    if len(positional) > 1 and positional[1].default is inspect.Parameter.empty:
        return value_fn
    return alone

"""The objective that a transformation looks at: optax's `value_fn`, bound to the batch."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.transforms import _told

Tree = Any
Objective = Callable[[Tree, Tree, Tree | None], jax.Array]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def bind(caller: str, value_fn: Callable[..., Any] | None, *, has_aux: bool) -> Objective:
    """(params, batch, full_params) -> the objective, a scalar in at least float32.

    `value_fn` gets the batch by name if its signature has `batch`, else as second argument if it
    has one without default (or takes any number), else parameters alone. Hidden parameters are
    filled in. With `has_aux` it returns a pair, whose second is not looked at; what one of ours
    hands on (`inside`) returns the value alone.

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
    has_aux = has_aux and not isinstance(value_fn, _told.Objective)

    def objective(params: Tree, batch: Tree, full_params: Tree | None) -> jax.Array:
        value = call(_boundary.filled(caller, params, full_params), batch)
        return as_value(caller, _without_aux(caller, value) if has_aux else value)

    return objective


def inside(
    caller: str,
    value_fn: Callable[..., Any],
    batch: Tree,
    full_params: Tree | None,
    told: _told.Told,
    *,
    has_aux: bool,
) -> _told.Objective:
    """`value_fn` for the transformations inside, which carries what is told to ours among them.

    It returns the value alone, and takes `batch` by name, as optax's line searches pass it on,
    whatever the signature of the original; further keywords go on to that.
    """
    call = _with_batch(value_fn)
    has_aux = has_aux and not isinstance(value_fn, _told.Objective)

    def function(params: Tree, batch: Tree = batch, **keywords: Any) -> Any:
        value = call(_boundary.filled(caller, params, full_params), batch, **keywords)
        return _checked(caller, _without_aux(caller, value) if has_aux else value)

    names = [n for n, p in _parameters(value_fn).items() if p.kind not in _VARIADIC]
    told = _told.merged(_told.told(value_fn), told)
    return _told.Objective(function, told, names[1:])


def _without_aux(caller: str, value: Any) -> Any:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"{caller}: with has_aux=True the objective (value_fn) must return a pair (value,"
            f" auxiliary output), got {type(value).__name__}"
        )
    return value[0]


def as_value(caller: str, value: Any) -> jax.Array:
    """A value of the objective in at least float32."""
    value = jnp.asarray(_checked(caller, value))
    return value.astype(_trees.work_dtype(value))


def _checked(caller: str, value: Any) -> Any:
    if not (hasattr(value, "dtype") or isinstance(value, int | float)):
        raise TypeError(
            f"{caller}: the objective (value_fn) must return one real scalar, without auxiliary"
            f" output, got {type(value).__name__}; where it returns a pair of both, pass"
            f" has_aux=True to {caller}"
        )
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"{caller}: the objective must be a real scalar, got {jnp.result_type(value)} of shape"
            f" {jnp.shape(value)}"
        )
    return value


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # a builtin without signature
        return {}


def _with_batch(value_fn: Callable[..., Any]) -> Callable[..., Any]:
    parameters = _parameters(value_fn)
    if "batch" in parameters:
        return lambda params, batch, **keywords: value_fn(params, batch=batch, **keywords)
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        return value_fn
    if len(positional) > 1 and positional[1].default is inspect.Parameter.empty:
        return value_fn
    return lambda params, batch, **keywords: value_fn(params, **keywords)

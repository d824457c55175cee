"""Steepest descent for other norms, what the natural gradient generalises."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _boundary
from natgrad_jax import _sharding
from natgrad_jax import _trees

Tree = Any


def scale_by_steepest_descent(norm: str) -> optax.GradientTransformationExtraArgs:
    r"""The steepest direction of unit length in a norm, with the sign of the gradient.

    .. math::
        d = -\arg\min_{\|d\| = 1} g^T d

    For "l2" this is :math:`g / \|g\|_2`, gradient descent; for "l1" it is the sign of the largest
    entry of g at its place and zero elsewhere, coordinate descent (the first of equals). Newton's
    method, for the norm :math:`d^T H d`, is :func:`scale_by_natural_gradient` with the metric
    :func:`hessian`.

    Args:
      norm: "l1" or "l2", over all parameters together.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` without state. A zero gradient gives a zero step.
      Steps have unit length: let the learning rate decay.

    Raises:
      ValueError: an unknown norm.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(-4.0)}
      >>> step = lambda norm: ng.scale_by_steepest_descent(norm).update(g, optax.EmptyState())[0]
      >>> step("l2")["b"].item(), step("l1")["a"].tolist(), step("l1")["b"].item()
      (-0.800000011920929, [0.0, 0.0], -1.0)

    References:
      Boyd and Vandenberghe, 2004, Convex optimization, section 9.4.
    """
    if norm not in _RULES:
        raise ValueError(f"scale_by_steepest_descent: unknown norm {norm!r}; take 'l1' or 'l2'")

    def update_fn(
        updates: Tree, state: optax.EmptyState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, optax.EmptyState]:
        del params, extra_args
        _boundary.check_real("scale_by_steepest_descent: update()", "updates", updates)
        direction = _sharding.run(functools.partial(_steepest, norm), (updates,), updates)
        return _sharding.keep(direction, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


@functools.partial(jax.jit, static_argnums=0)
def _steepest(norm: str, updates: Tree) -> Tree:
    dtype = _trees.work_dtype(updates)
    unit, _ = _trees.normalised(_trees.cast(updates, dtype), dtype)
    return _trees.cast_like(_RULES[norm](unit, dtype), updates)


def _unit_length(g: Tree, dtype: jnp.dtype) -> Tree:
    length = jnp.sqrt(_trees.vdot(g, g, dtype))
    inverse = jnp.where(length == 0, 0, 1 / jnp.where(length == 0, 1, length))
    return _trees.scale(g, inverse)


def _largest_entry(g: Tree, dtype: jnp.dtype) -> Tree:
    if _trees.size(g) == 0:
        return g
    flat = _trees.ravel(g)
    magnitude = jnp.where(jnp.isnan(flat), jnp.inf, jnp.abs(flat))
    place = jnp.arange(flat.shape[0]) == jnp.argmax(magnitude)
    return _trees.unravel(jnp.where(place, jnp.sign(flat), jnp.zeros((), dtype)), g)


_RULES = {"l1": _largest_entry, "l2": _unit_length}

"""How well the quadratic model of the objective predicts a step, and the damping that follows."""

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


def rounding(value: jax.Array, size: jax.Array) -> jax.Array:
    """How much of a change of the objective is rounding.

    10 eps of the objective, and what rounding of the outputs makes of it: outputs made of
    parameters of squared size S have an error of eps S^(1/2), in a loss of squares
    eps (2 L S)^(1/2) + eps^2 S / 2. Where residuals are small beside what they are a difference of,
    that is the larger part.
    """
    eps = jnp.asarray(10 * jnp.finfo(value.dtype).eps, value.dtype)
    loss = jnp.abs(value)
    return eps * loss + eps * jnp.sqrt(2 * loss) * jnp.sqrt(size) + floor(value, size)


def floor(value: jax.Array, size: jax.Array) -> jax.Array:
    """The part of `rounding` that stays where the objective vanishes."""
    eps = jnp.asarray(10 * jnp.finfo(value.dtype).eps, value.dtype)
    return 0.5 * (eps * jnp.sqrt(size)) ** 2


def negligible(value: jax.Array, size: jax.Array) -> jax.Array:
    """A predicted decrease that moves parameters by no more than rounding: eps^(5/4) L.

    A fit that is so far from its optimum is off by eps^(5/8), 2e-10 in float64, of its standard
    errors: far less than the objective itself could show.
    """
    eps = jnp.finfo(value.dtype).eps
    return jnp.asarray(eps**1.25, value.dtype) * jnp.abs(value) + floor(value, size)


def ratio(
    actual: jax.Array, predicted: jax.Array, noise: jax.Array, is_quiet: jax.Array
) -> jax.Array:
    """actual / predicted, 1 where both are rounding of the objective; not finite: -infinity.

    Conn, Gould and Toint, 2000, section 17.4.2.
    """
    above, below = actual + noise, predicted + noise
    usable = jnp.isfinite(above) & (below > 0) & jnp.isfinite(below)
    found = jnp.where(usable, above / jnp.where(usable, below, 1), -jnp.inf)
    return jnp.where(is_quiet, 1, found)


def quiet(actual: jax.Array, predicted: jax.Array, noise: jax.Array, *, slack: float) -> jax.Array:
    """Whether both changes are rounding, the actual one up to `slack` times what is known of it."""
    return (jnp.abs(actual) <= slack * noise) & (jnp.abs(predicted) <= noise)


def seen_alone(grads: Tree, step: Tree, params: Tree) -> tuple[jax.Array, jax.Array]:
    """What a step says by itself.

    Returns:
      Whether every entry is within rounding of its parameter; whether the step points uphill.
    """
    dtype = _trees.work_dtype(params)
    within = lambda u, p: jnp.all(
        jnp.abs(u) <= (jnp.finfo(p.dtype).eps * jnp.abs(p)).astype(u.dtype)
    )
    still = jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(within, step, params))))
    slope = _trees.vdot(_trees.cast(grads, dtype), _trees.cast(step, dtype), dtype)
    return still, slope > 0

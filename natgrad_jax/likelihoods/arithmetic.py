"""Arithmetic that keeps its digits in output space: logarithms, small differences, masses."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

#: Terms of a series that converges as 16^-k (see `log1p_gap`) in float32 and float64.
_TERMS = {4: 6, 8: 13}


def with_scores(value: Callable[..., jax.Array], scores: Callable[..., tuple]) -> Callable:
    """`value(z, y, c)` whose derivative in the tuple z is given by hand, by `scores(z, y, c)`.

    Scores are written without the cancellation that differentiating `value` would bring. In targets
    y and constants c the derivative is that of `value`; second derivatives are those of `scores`.
    """

    @jax.custom_jvp
    def scored(z: tuple, y: jax.Array, c: Any) -> jax.Array:
        return value(z, y, c)

    def jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        z, y, c = primals
        out = value(z, y, c)
        still = lambda t: isinstance(t, SymbolicZero) or t.dtype == jax.dtypes.float0
        pairs = zip(scores(z, y, c), tangents[0], strict=True)
        parts = [s * t for s, t in pairs if not still(t)]
        if not all(still(t) for t in jax.tree.leaves(tangents[1:])):
            filled = jax.tree.map(_instantiated, tangents[1:])
            parts.append(jax.jvp(lambda y, c: value(z, y, c), (y, c), filled)[1])
        return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)

    scored.defjvp(jvp, symbolic_zeros=True)
    return scored


def _instantiated(tangent: Any) -> jax.Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if isinstance(tangent, SymbolicZero) else tangent


def times(weight: jax.Array, value: jax.Array) -> jax.Array:
    """weight * value with 0 * inf = 0; its derivative in weight is wrong at 0."""
    return weight * jnp.where(weight == 0, 0, value)


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)); its derivative does not cancel where it is near 1."""
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    out = sigmoid(x)
    return out, out * sigmoid(-x) * t


@jax.custom_jvp
def log_sigmoid(x: jax.Array) -> jax.Array:
    """log sigmoid(x), with sigmoid(-x) as its derivative."""
    return jax.nn.log_sigmoid(x)


@log_sigmoid.defjvp
def _log_sigmoid_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    return log_sigmoid(x), sigmoid(-x) * t


@jax.custom_jvp
def log1p_gap(u: jax.Array) -> jax.Array:
    """u - log(1 + u) >= 0 for u > -1, to relative precision also near 0."""
    near = (u > -0.4) & (u < 0.6)
    small = jnp.where(near, u, 0)
    # log(1 + u) = 2 atanh(v), v = u / (2 + u), and u - 2 v = u v.
    v = small / (2 + small)
    series = jnp.zeros_like(u)
    for k in reversed(range(_TERMS[u.dtype.itemsize])):
        series = series * v * v + 1 / (2 * k + 3)
    return jnp.where(near, small * v - 2 * v * v * v * series, u - jnp.log1p(u))


@log1p_gap.defjvp
def _log1p_gap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (u,), (t,) = primals, tangents
    return log1p_gap(u), u / (1 + u) * t


@jax.custom_jvp
def expm1_gap(w: jax.Array) -> jax.Array:
    """exp(w) - 1 - w >= 0, to relative precision also near 0."""
    near = jnp.abs(w) < 1
    small = jnp.where(near, w, 0)
    series = jnp.zeros_like(w)
    for k in reversed(range(2, 12 if w.dtype.itemsize == 4 else 20)):
        series = series * small + 1 / math.factorial(k)
    return jnp.where(near, small * small * series, jnp.expm1(w) - w)


@expm1_gap.defjvp
def _expm1_gap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (w,), (t,) = primals, tangents
    return expm1_gap(w), jnp.expm1(w) * t


def top(values: jax.Array) -> jax.Array:
    """True at the largest entry along the last axis, at one of them."""
    return jax.nn.one_hot(jnp.argmax(values, axis=-1), values.shape[-1], dtype=bool)


@jax.custom_jvp
def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities; -inf where logits are, also in rows of nothing else."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(peak == -jnp.inf, 0, peak)
    rest = jnp.where(top(logits), 0, jnp.exp(shifted))  # the largest gives 1: log1p keeps the rest
    return shifted - jnp.log1p(jnp.sum(rest, axis=-1, keepdims=True))


@log_softmax.defjvp
def _log_softmax_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (z,), (t,) = primals, tangents
    out = log_softmax(z)
    return out, t - jnp.sum(jnp.exp(out) * t, axis=-1, keepdims=True)


def others(masses: jax.Array) -> jax.Array:
    """For every entry the sum of all others along the last axis, without cancellation."""
    largest = top(masses)
    rest = jnp.sum(jnp.where(largest, 0, masses), axis=-1, keepdims=True)
    total = rest + jnp.sum(jnp.where(largest, masses, 0), axis=-1, keepdims=True)
    return jnp.where(largest, rest, total - masses)


def subtract_mass(p: jax.Array, y: jax.Array) -> jax.Array:
    """(I - p 1^T) y along the last axis.

    The entry of a class of more than half the mass is minus the sum of the others: y - p sum(y)
    would cancel there, and its rounding exceeds the whole Fisher matrix of a confident prediction.
    """
    direct = y - p * jnp.sum(y, axis=-1, keepdims=True)
    dominant = p > 0.5
    rest = jnp.where(dominant, 0, direct)
    return jnp.where(dominant, -jnp.sum(rest, axis=-1, keepdims=True), direct)


def relative_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """p log(p / q) - p + q >= 0 of masses given by their logarithms, zero mass included.

    The last two terms cancel in a sum over all classes. With them every term is of second order
    near p = q, so that small divergences keep their digits.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.where(p > 0, log_q - log_p, 0)
    near = (p > 0) & (jnp.abs(gap) < 1)
    small = jnp.where(near, gap, 0)  # the branch not taken must stay finite for the gradient
    return jnp.where(near, p * expm1_gap(small), q - p - p * gap)

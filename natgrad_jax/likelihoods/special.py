r"""The gamma function without what cancels: functions of s = log x, to relative precision.

.. math::
    \log\Gamma(x) = (x - 1/2) \log x - x + \log(2 \pi) / 2 + S(x)

For large x the logarithms of an information or a score cancel to a term of order 1 / x, which is
what these functions hold. Series in 1 / x (Abramowitz and Stegun, 1964, 6.1.40 and 6.4.11) are
taken at x + 8; each of the eight shifts adds a term of its own sign.
"""

import functools
import math

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods.arithmetic import expm1_gap
from natgrad_jax.likelihoods.arithmetic import log1p_gap

#: How often series are shifted.
SHIFTS = 8
#: log(2 pi) / 2.
HALF_LOG = 0.5 * math.log(2 * math.pi)
#: Bernoulli numbers B_2, B_4, ...
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)
_STIRLING = [b / (2 * k * (2 * k - 1)) for k, b in enumerate(_BERNOULLI, start=1)]
_DIGAMMA = [b / (2 * k) for k, b in enumerate(_BERNOULLI, start=1)]


def argument(s: jax.Array) -> jax.Array:
    """exp(s), within what can be divided by."""
    return jnp.exp(jnp.clip(s, -80, 80))


def shifts(x: jax.Array, number: int = SHIFTS, step: int = 1) -> jax.Array:
    """x, x + 1, x + 2, ... along a new last axis."""
    return x[..., None] + step * jnp.arange(number, dtype=x.dtype).reshape((1,) * x.ndim + (-1,))


def _series(coefficients: list[float], inverse: jax.Array) -> jax.Array:
    """sum_k c_k / x^(2 k), k = 0, 1, ..."""
    square = inverse * inverse
    fold = lambda total, c: total * square + c
    return functools.reduce(fold, reversed(coefficients), jnp.zeros_like(inverse))


@jax.custom_jvp
def stirling(s: jax.Array) -> jax.Array:
    """S(x) > 0, x = exp(s): 1 / (12 x) for large x."""
    x = argument(s)
    small = jnp.minimum(x, SHIFTS)
    direct = jax.scipy.special.gammaln(small) - (small - 0.5) * jnp.log(small) + small
    far = 1 / jnp.maximum(x, SHIFTS)
    return jnp.where(x < SHIFTS, direct - HALF_LOG, far * _series(_STIRLING, far))


@stirling.defjvp
def _stirling_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (s,), (t,) = primals, tangents
    return stirling(s), (0.5 - digamma_gap(s)) * t


@jax.custom_jvp
def digamma_gap(s: jax.Array) -> jax.Array:
    """x (log x - digamma(x)), x = exp(s): from 1 for small x to 1/2 for large x."""
    x = argument(s)
    far = 1 / (x + SHIFTS)
    total = (x * far) * (0.5 + far * _series(_DIGAMMA, far))
    return total + jnp.sum(x[..., None] * log1p_gap(1 / shifts(x)), axis=-1)


@digamma_gap.defjvp
def _digamma_gap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (s,), (t,) = primals, tangents
    gap = digamma_gap(s)
    return gap, (gap - trigamma_gap(s)) * t


def trigamma_gap(s: jax.Array) -> jax.Array:
    """x^2 trigamma(x) - x, x = exp(s): from 1 for small x to 1/2 for large x."""
    x = argument(s)
    far = 1 / (x + SHIFTS)
    slopes = [2 * k * c for k, c in enumerate(_DIGAMMA, start=1)]
    total = (x * far) ** 2 * (0.5 + far * _series(slopes, far))
    ratio = x[..., None] / shifts(x)
    return total + jnp.sum(ratio * ratio / (shifts(x) + 1), axis=-1)


def digamma_rise(s: jax.Array, y: jax.Array) -> jax.Array:
    """x (digamma(x + y) - digamma(x) - log(1 + y / x)) >= 0, x = exp(s), y >= 0."""
    x = argument(s)
    shifted = x < SHIFTS
    base = jnp.where(shifted, x + SHIFTS, x)
    near, far = 1 / base, 1 / (base + y)
    tail = lambda inverse: inverse * inverse * _series(_DIGAMMA, inverse)
    total = x * (0.5 * y * near * far + tail(near) - tail(far))
    small = jnp.where(shifted, x, 1)
    steps = log1p_gap(1 / shifts(small)) - log1p_gap(1 / (shifts(small) + y[..., None]))
    return total + jnp.where(shifted, jnp.sum(small[..., None] * steps, axis=-1), 0)


def gammaln_bregman(p: jax.Array, q: jax.Array) -> jax.Array:
    """log Gamma(y) - log Gamma(x) - (y - x) digamma(x) >= 0, x = exp(p), y = exp(q)."""
    y = argument(q)
    return shape_divergence(p, q) + y * expm1_gap(p - q)


def shape_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """`gammaln_bregman` less y log(y / x) - y + x: KL of gamma variates of one mean.

    All terms are of second order in q - p; they add up with their own signs where x, y are small.
    """
    x, gap = argument(p), q - p
    h = x * jnp.expm1(gap)
    entropy = lambda log_ratio, y: y * expm1_gap(-log_ratio)  # y log(y / x) - y + x
    # Where both are large the series holds at x itself, and the entropies are equal.
    large = jnp.minimum(x, x + h) >= SHIFTS
    far = jnp.where(large, x, x + SHIFTS)
    u = h / far
    shifted = jnp.sum(log1p_gap(h[..., None] / shifts(x)), axis=-1)
    shifted = shifted + entropy(jnp.log1p(u), far + h) - entropy(gap, x + h)
    rest = 0.5 * log1p_gap(u) + _stirling_bregman(far, u)
    return rest + jnp.where(large, 0, shifted)


def _stirling_bregman(x: jax.Array, u: jax.Array) -> jax.Array:
    """S(x + x u) - S(x) - x u S'(x) for x >= 8, of second order in u."""
    inverse = 1 / x
    total = inverse * _STIRLING[0] * u * u / (1 + u)
    for k, c in enumerate(_STIRLING[1:], start=1):
        power = -(2 * k + 1)
        # (1 + u)^power - 1 - power u = (e^w - 1 - w) - power (u - log(1 + u)), w = power log(1 + u)
        change = expm1_gap(power * jnp.log1p(u)) - power * log1p_gap(u)
        total = total + c * inverse ** (2 * k + 1) * change
    return total

"""Expectations over counts of a negative binomial distribution, by a sum and a quadrature."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.likelihoods import special

#: Counts that are summed, and nodes of the integral over the others.
_SUMMED, _NODES = 32, 64


def mean_over_counts(
    density: Callable[[jax.Array], jax.Array], z: jax.Array, s: jax.Array
) -> jax.Array:
    r"""sum_y f(y) of a smooth f that is a density of counts times a square.

    Counts y < Y = 32 are summed. The others follow from an integral and its end corrections,

    .. math::
        \sum_{y \ge Y} f(y) = \int_{Y - 1/2}^\infty f \, dy
        + \frac{f'}{24} - \frac{7 f'''}{5760} + \dots \quad \text{at } Y - 1/2,

    with derivatives from differences. The integral runs over :math:`t = 2 \sqrt r \,
    \mathrm{asinh} \sqrt{y / r}`, in which the distribution has unit width whatever its mean exp(z)
    and r = exp(s), by Gauss and Legendre's rule over where it has mass.
    """
    spread = jnp.maximum(special.argument(s), 1)
    root = jnp.sqrt(spread)
    at = lambda y: 2 * root * jnp.arcsinh(jnp.sqrt(y / spread))
    begin = at(jnp.full_like(z, _SUMMED - 0.5))
    middle = at(special.argument(z))
    low = jnp.maximum(begin, middle - 9 - 40 / root)
    high = jnp.maximum(low, middle + 9 - jnp.minimum(s, 0))

    width = high - low

    def add(total: jax.Array, rule: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        point, weight, count, of_count = rule
        sinh = jnp.sinh(0.5 * (low + 0.5 * width * (1 + point)) / root)
        y = jnp.where(
            of_count, count, jnp.minimum(spread * sinh * sinh, 1e18)
        )  # squares are finite
        slope = 0.5 * width * jnp.sqrt(y * (1 + y / spread))
        return total + jnp.where(of_count, weight, weight * slope) * density(y), None

    return jax.lax.scan(add, jnp.zeros_like(z), _rule(z.dtype))[0]


def _rule(dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Nodes of the integral and counts in one list, so that the density is compiled once."""
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    of_counts = np.concatenate([np.ones(_SUMMED), np.zeros(2)])
    # Derivatives halfway between the last counts that are summed and those that are not.
    first, third = np.array([1, -27, 27, -1]) / 24, np.array([-1, 3, -3, 1])
    of_counts[-4:] += first / 24 - 7 * third / 5760
    nothing = np.zeros(len(of_counts))
    return (
        jnp.asarray(np.concatenate([points, nothing]), dtype),
        jnp.asarray(np.concatenate([weights, of_counts]), dtype),
        jnp.asarray(np.concatenate([0 * points, np.arange(len(of_counts))]), dtype),
        jnp.asarray(np.concatenate([0 * points, 1 + nothing]) > 0),
    )

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
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    spread = jnp.maximum(special.argument(s), 1)
    root = jnp.sqrt(spread)
    at = lambda y: 2 * root * jnp.arcsinh(jnp.sqrt(y / spread))
    begin = at(jnp.full_like(z, _SUMMED - 0.5))
    middle = at(special.argument(jnp.minimum(z, 70)))
    low = jnp.maximum(begin, middle - 9 - 40 / root)
    high = jnp.maximum(low, middle + 9 - jnp.minimum(s, 0))

    def node(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        point, weight = pair
        t = low + 0.5 * (high - low) * (1 + point)
        sinh = jnp.sinh(0.5 * t / root)
        y = spread * sinh * sinh
        slope = jnp.sqrt(y * (1 + y / spread))
        return total + weight * 0.5 * (high - low) * slope * density(y), None

    def count(total: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
        return total + density(jnp.broadcast_to(y, z.shape)), None

    counts = jnp.arange(_SUMMED, dtype=z.dtype)
    nodes = jnp.asarray(points, z.dtype), jnp.asarray(weights, z.dtype)
    total, _ = jax.lax.scan(node, jnp.zeros_like(z), nodes)
    total, _ = jax.lax.scan(count, total, counts)
    f = [density(jnp.full_like(z, _SUMMED + k)) for k in (-2, -1, 0, 1)]
    first = (27 * (f[2] - f[1]) - (f[3] - f[0])) / 24
    third = f[3] - f[0] - 3 * (f[2] - f[1])
    return total + first / 24 - 7 * third / 5760

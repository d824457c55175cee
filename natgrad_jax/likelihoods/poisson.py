"""Counts."""

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import arithmetic
from natgrad_jax.likelihoods.closed_form import ClosedForm


class Poisson(ClosedForm):
    r"""Counts, with the log rate z as outputs: :math:`p(y) = \exp(y z - e^z) / y!`.

    :math:`M = e^z`. Outputs, targets (whole numbers) and samples (int32) are (N, ...). A log rate
    of -inf is count zero with certainty. An exposure is an offset of the model: add its logarithm
    to the outputs. Draws need JAX's default (threefry) keys.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> ng.Poisson().fisher_product(jnp.array([-jnp.inf, 0.0]), jnp.ones((2,))).tolist()
      [0.0, 1.0]
    """

    def _log_prob(self, z: jax.Array, y: jax.Array, c: None) -> jax.Array:
        del c
        return arithmetic.times(y, z) - jnp.exp(z) - jax.scipy.special.gammaln(y + 1)

    def _kl(self, p: jax.Array, q: jax.Array, c: None) -> jax.Array:
        del c
        return arithmetic.relative_entropy(p, q)

    def _sample(self, key: jax.Array, z: jax.Array, c: None) -> jax.Array:
        del c
        return jax.random.poisson(key, jnp.exp(z), dtype=jnp.int32)

    def _information(self, z: jax.Array, c: None) -> jax.Array:
        del c
        return jnp.exp(z)

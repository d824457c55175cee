"""A coin, and a number of tosses of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.arithmetic import log_sigmoid
from natgrad_jax.likelihoods.arithmetic import relative_entropy
from natgrad_jax.likelihoods.arithmetic import sigmoid
from natgrad_jax.likelihoods.arithmetic import times
from natgrad_jax.likelihoods.closed_form import ClosedForm


class Bernoulli(ClosedForm):
    r"""A coin, with the logit z as outputs: :math:`p(1) = \sigma(z) = 1 / (1 + \exp(-z))`.

    :math:`M = \sigma(z) \sigma(-z)`. Outputs, targets (booleans or numbers in [0, 1]) and samples
    (0.0 or 1.0) are (N, ...). Fractional targets, probabilities, make log p minus the
    cross-entropy. Logits of -inf and +inf are certainty.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> z = jnp.array([-jnp.inf, 0.0, 1e4])
      >>> ng.Bernoulli().fisher_product(z, jnp.ones((3,))).tolist()
      [0.0, 0.25, 0.0]
    """

    def _log_prob(self, z: jax.Array, y: jax.Array, c: None) -> jax.Array:
        del c
        return times(y, log_sigmoid(z)) + times(1 - y, log_sigmoid(-z))

    def _kl(self, p: jax.Array, q: jax.Array, c: None) -> jax.Array:
        del c
        return _coin_kl(p, q)

    def _sample(self, key: jax.Array, z: jax.Array, c: None) -> jax.Array:
        del c
        return jax.random.bernoulli(key, sigmoid(z)).astype(z.dtype)

    def _information(self, z: jax.Array, c: None) -> jax.Array:
        del c
        return sigmoid(z) * sigmoid(-z)  # 1 - sigmoid(z) would cancel


class Binomial(ClosedForm):
    r"""The number of ones among n tosses of a coin, with its logit z as outputs.

    .. math::
        \log p(y) = y \log \sigma(z) + (n - y) \log \sigma(-z) + \log \binom{n}{y}, \qquad
        M = n \, \sigma(z) \sigma(-z)

    Outputs, targets (whole numbers from 0 to n) and samples (int32) are (N, ...).

    Args:
      n: the number of trials: a number, or an array that broadcasts to the outputs, (N,) or
        (N, ..., 1) for a number a row. A row without trials says nothing.

    Raises:
      ValueError: n is negative or, in use, does not broadcast to the outputs.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> binomial = ng.Binomial(jnp.array([0, 4, 100]))
      >>> binomial.fisher_product(jnp.zeros((3,)), jnp.ones((3,))).tolist()
      [0.0, 1.0, 25.0]
    """

    def __init__(self, n: jax.typing.ArrayLike):
        if not isinstance(n, jax.core.Tracer) and not np.all(np.asarray(n) >= 0):
            raise ValueError(f"Binomial: n must not be negative, got {n}")
        self.n = n

    def _constant(self, call: str, z: jax.Array) -> jax.Array:
        return reading.constant(call, "n", self.n, z)

    def _log_prob(self, z: jax.Array, y: jax.Array, n: jax.Array) -> jax.Array:
        ways = jax.scipy.special.gammaln
        number = ways(n + 1) - ways(y + 1) - ways(n - y + 1)
        return times(y, log_sigmoid(z)) + times(n - y, log_sigmoid(-z)) + number

    def _kl(self, p: jax.Array, q: jax.Array, n: jax.Array) -> jax.Array:
        return times(n, _coin_kl(p, q))

    def _sample(self, key: jax.Array, z: jax.Array, n: jax.Array) -> jax.Array:
        # The rarer outcome is counted: its probability is known to relative precision.
        rare = jax.random.binomial(key, n, sigmoid(-jnp.abs(z)), dtype=z.dtype)
        return jnp.where(z > 0, n - rare, rare).astype(jnp.int32)

    def _information(self, z: jax.Array, n: jax.Array) -> jax.Array:
        return n * sigmoid(z) * sigmoid(-z)


def _coin_kl(p: Any, q: Any) -> jax.Array:
    heads = relative_entropy(log_sigmoid(p), log_sigmoid(q))
    return heads + relative_entropy(log_sigmoid(-p), log_sigmoid(-q))

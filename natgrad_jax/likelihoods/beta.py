"""Shares: numbers between 0 and 1."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods import special
from natgrad_jax.likelihoods.arithmetic import log_sigmoid
from natgrad_jax.likelihoods.arithmetic import relative_entropy
from natgrad_jax.likelihoods.arithmetic import sigmoid
from natgrad_jax.likelihoods.arithmetic import times
from natgrad_jax.likelihoods.arithmetic import with_scores
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike
from natgrad_jax.likelihoods.closed_form import pair_factor
from natgrad_jax.likelihoods.closed_form import pair_product


class Beta(ClosedForm):
    r"""Shares of mean :math:`\mu` and variance :math:`\mu (1 - \mu) / (1 + \phi)`.

    .. math::
        p(y) = \frac{y^{a - 1} (1 - y)^{b - 1}}{B(a, b)}, \qquad
        a = \mu \phi, \; b = (1 - \mu) \phi, \; \mu = \sigma(z)

    Outputs are the logit z of the mean, with a fixed precision :math:`\phi`, or the pair (logit of
    the mean, log precision). With :math:`t(x) = x^2 \psi'(x) - x` the Fisher matrix is

    .. math::
        M_{zz} = \phi \mu (1 - \mu) + (1 - \mu)^2 t(a) + \mu^2 t(b), \quad
        M_{zs} = (1 - \mu) t(a) - \mu t(b), \quad M_{ss} = t(a) + t(b) - t(\phi)

    in z and :math:`s = \log\phi`. Each output, targets (above 0, below 1) and samples are (N, ...).

    Args:
      precision: None where the model gives it, else :math:`\phi`: a positive number, or an array
        that broadcasts to the outputs, (N,) for one a row.

    Raises:
      ValueError: the precision is not positive or, in use, does not broadcast to the outputs.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> uniform = ng.Beta(precision=2.0)
      >>> uniform.log_prob(jnp.zeros((2,)), jnp.array([0.1, 0.7])).round(5).tolist()
      [0.0, 0.0]

    References:
      Ferrari and Cribari-Neto, 2004, Beta regression for modelling rates and proportions.
    """

    def __init__(self, precision: jax.typing.ArrayLike | None = None):
        if precision is not None:
            reading.check_positive("Beta", "precision", precision)
        self.precision = precision

    def _read(self, call: str, outputs: Any) -> Any:
        if self.precision is None:
            return reading.several(call, outputs, ("logit_mean", "log_precision"))
        return super()._read(call, outputs)

    def _constant(self, call: str, z: Any) -> Any:
        if self.precision is None:
            return None
        return jnp.log(reading.constant(call, "precision", self.precision, z))

    def _log_prob(self, z: Any, y: jax.Array, c: Any) -> jax.Array:
        return _log_prob((z[0], z[1]), y, ()) if c is None else _log_prob_of_mean((z,), y, (c,))

    def _kl(self, p: Any, q: Any, c: Any) -> jax.Array:
        (z_p, s_p), (z_q, s_q) = ((p, c), (q, c)) if c is not None else (p, q)
        ends = lambda z, s: (log_sigmoid(z) + s, log_sigmoid(-z) + s)
        pairs = zip(ends(z_p, s_p), ends(z_q, s_q), strict=True)
        parts = [special.gammaln_bregman(a, b) for a, b in pairs]
        return parts[0] + parts[1] - special.gammaln_bregman(s_p, s_q)

    def _sample(self, key: jax.Array, z: Any, c: Any) -> jax.Array:
        z, s = (z[0], z[1]) if c is None else (z, c)
        one, two = jax.random.split(key)
        # By logarithms: for small a and b both gamma variates are below any floating point number.
        log_a = jax.random.loggamma(one, special.argument(log_sigmoid(z) + s), dtype=z.dtype)
        log_b = jax.random.loggamma(two, special.argument(log_sigmoid(-z) + s), dtype=z.dtype)
        # A share that rounds to 0 or 1 has no density: the nearest that has.
        info = jnp.finfo(z.dtype)
        return jnp.clip(sigmoid(log_a - log_b), info.tiny, 1 - info.epsneg)

    def _information(self, z: Any, c: Any) -> Any:
        z, s = (z[0], z[1]) if c is None else (z, c)
        up, down = sigmoid(z), sigmoid(-z)
        gap_a = special.trigamma_gap(log_sigmoid(z) + s)
        gap_b = special.trigamma_gap(log_sigmoid(-z) + s)
        spread = special.argument(s + log_sigmoid(z) + log_sigmoid(-z))
        mean = spread + down * down * gap_a + up * up * gap_b
        mixed = down * gap_a - up * gap_b
        # t(a) - t(a + b) > 0, and t is between 1/2 and 1.
        return mean, mixed, gap_a + gap_b - special.trigamma_gap(s)

    def _fisher(self, z: Any, v: Any, c: Any) -> Any:
        matrix = self._information(z, c)
        return alike(z, *pair_product(matrix, v)) if c is None else matrix[0] * v

    def _factor(self, z: Any, u: Any, c: Any) -> Any:
        matrix = self._information(z, c)
        return alike(z, *pair_factor(matrix, u)) if c is None else jnp.sqrt(matrix[0]) * u


def _logs(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.log(y), jnp.log1p(-y)


def _value(z: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    """By Stirling's series: -phi KL[mean || y], and what does not grow with phi."""
    log_y, log_rest = _logs(y)
    log_up, log_down = log_sigmoid(z), log_sigmoid(-z)
    spread = 0.5 * (s + log_up + log_down) - special.HALF_LOG + special.stirling(s)
    spread = spread - special.stirling(log_up + s) - special.stirling(log_down + s)
    distance = relative_entropy(log_up, log_y) + relative_entropy(log_down, log_rest)
    return spread - times(special.argument(s), distance) - log_y - log_rest


def _scores(z: jax.Array, s: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_y, log_rest = _logs(y)
    log_up, log_down = log_sigmoid(z), log_sigmoid(-z)
    up, down = sigmoid(z), sigmoid(-z)
    gap_a, gap_b = special.digamma_gap(log_up + s), special.digamma_gap(log_down + s)
    spread = special.argument(s + log_up + log_down)
    in_mean = spread * ((log_y - log_rest) - z) + down * gap_a - up * gap_b
    distance = relative_entropy(log_up, log_y) + relative_entropy(log_down, log_rest)
    return in_mean, gap_a + gap_b - special.digamma_gap(s) - special.argument(s) * distance


_log_prob = with_scores(
    lambda z, y, c: _value(z[0], z[1], y), lambda z, y, c: _scores(z[0], z[1], y)
)
_log_prob_of_mean = with_scores(
    lambda z, y, c: _value(z[0], c[0], y), lambda z, y, c: _scores(z[0], c[0], y)[:1]
)

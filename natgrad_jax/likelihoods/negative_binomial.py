"""Counts that scatter more than Poisson's."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods import special
from natgrad_jax.likelihoods.arithmetic import log1p_gap
from natgrad_jax.likelihoods.arithmetic import log_sigmoid
from natgrad_jax.likelihoods.arithmetic import sigmoid
from natgrad_jax.likelihoods.arithmetic import times
from natgrad_jax.likelihoods.arithmetic import with_scores
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike
from natgrad_jax.likelihoods.count_mean import mean_over_counts


class NegativeBinomial(ClosedForm):
    r"""Counts of mean :math:`\mu`, variance :math:`\mu + \alpha \mu^2`, dispersion :math:`\alpha`.

    .. math::
        p(y) = \frac{\Gamma(y + r)}{\Gamma(r) \, y!} \Big(\frac{r}{r + \mu}\Big)^r
        \Big(\frac{\mu}{r + \mu}\Big)^y, \qquad r = 1 / \alpha

    Outputs are the log mean, with a fixed dispersion, or the pair (log mean, log dispersion). Both
    are orthogonal, with information :math:`\mu / (1 + \alpha \mu)` and
    :math:`E[(\partial \log p / \partial \log\alpha)^2]`. Each output, targets (whole numbers) and
    samples (int32) are (N, ...). Draws need JAX's default (threefry) keys.

    Args:
      dispersion: None where the model gives it, else :math:`\alpha`: a positive number, or an array
        that broadcasts to the outputs, (N,) for one a row. Towards 0 counts are Poisson's.

    Raises:
      ValueError: the dispersion is not positive or, in use, does not broadcast to the outputs.
      TypeError: the KL divergence is asked for where dispersions are predicted: it has no closed
        form.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> counts = ng.NegativeBinomial(dispersion=1.0)
      >>> counts.fisher_product(jnp.zeros((1,)), jnp.ones((1,))).tolist()
      [0.5]

    Notes:
      The expectation over counts has no closed form: counts below 32 are summed, the others
      integrated with 64 nodes, about 100 densities for each row. Its relative error is below 1e-7
      for dispersions from 1e-6 to 1e3 and means from 1e-3 to 1e5, rounding apart.

    References:
      Hilbe, 2011, Negative binomial regression; Lawless, 1987, Negative binomial and mixed Poisson
      regression.
    """

    def __init__(self, dispersion: jax.typing.ArrayLike | None = None):
        if dispersion is not None:
            reading.check_positive("NegativeBinomial", "dispersion", dispersion)
        self.dispersion = dispersion

    def _read(self, call: str, outputs: Any) -> Any:
        if self.dispersion is None:
            return reading.several(call, outputs, ("log_mean", "log_dispersion"))
        return super()._read(call, outputs)

    def _constant(self, call: str, z: Any) -> Any:
        """log r."""
        if self.dispersion is None:
            return None
        return -jnp.log(reading.constant(call, "dispersion", self.dispersion, z))

    def _log_prob(self, z: Any, y: jax.Array, c: Any) -> jax.Array:
        return _log_prob(tuple(z), y, ()) if c is None else _log_prob_of_mean((z,), y, (c,))

    def kl(self, outputs_p: Any, outputs_q: Any) -> jax.Array:
        """KL divergence of a fixed dispersion, (N,)."""
        if self.dispersion is None:
            raise reading.NoDivergenceError(self, "it has no closed form for two dispersions")
        return super().kl(outputs_p, outputs_q)

    def _kl(self, p: Any, q: Any, c: Any) -> jax.Array:
        return _deviance(p, q, c)

    def _sample(self, key: jax.Array, z: Any, c: Any) -> jax.Array:
        z, s = (z[0], -z[1]) if c is None else (z, c)
        rate, count = jax.random.split(key)
        # A Poisson count of gamma rate; by its logarithm, which may be far below any number.
        log_rate = jax.random.loggamma(rate, special.argument(s), dtype=s.dtype) - s + z
        return jax.random.poisson(count, jnp.exp(log_rate), dtype=jnp.int32)

    def _information(self, z: Any, c: Any) -> Any:
        if c is not None:
            return _of_mean(z, c)
        s = -z[1]
        # Beyond exp(60) there is no more to count, and squares stay finite.
        m, r = jnp.clip(z[0], -60, 60), jnp.clip(s, -60, 60)
        density = lambda y: (jnp.exp(0.5 * _value(m, r, y)) * _scores(m, r, y)[1]) ** 2
        return alike(z, _of_mean(z[0], s), mean_over_counts(density, m, r))


def _of_mean(z: jax.Array, s: jax.Array) -> jax.Array:
    """mu r / (r + mu)."""
    return jnp.exp(z + log_sigmoid(s - z))


def _deviance(log_y: jax.Array, z: jax.Array, s: jax.Array) -> jax.Array:
    """y log(y / mu) - (y + r) log((y + r) / (mu + r)) >= 0, z = log mu and s = log r."""
    z = jnp.maximum(z, -1e30)  # -inf stands for count zero with certainty
    gap = log_y - z
    y, r = jnp.exp(jnp.minimum(log_y, 80)), special.argument(s)
    near = jnp.abs(gap) < 1
    change = jnp.expm1(jnp.where(near, gap, 0))
    w, delta = change * sigmoid(s - log_y), change * sigmoid(z - s)
    square = special.argument(z) * change * change * sigmoid(s - log_y) * sigmoid(s - z)
    close = square - y * log1p_gap(w) + r * log1p_gap(delta)
    return jnp.where(near, close, _far_deviance(jnp.where(near, -jnp.inf, log_y), z, s))


def _far_deviance(log_y: jax.Array, z: jax.Array, s: jax.Array) -> jax.Array:
    """The same as y log(1 + w) - r log(1 + delta), for y away from mu."""
    gap, total = log_y - z, jnp.logaddexp(z, s)
    above = gap > 0
    up, down = jnp.where(above, gap, 0), jnp.where(above, 0, gap)
    ratio = jnp.minimum(log_y - total, 60)
    delta = jnp.where(above, -jnp.exp(ratio) * jnp.expm1(-up), jnp.expm1(down) * sigmoid(z - s))
    plain = (delta > -0.5) & (ratio < 60)
    log_delta = jnp.log1p(jnp.where(plain, delta, 0))
    log_delta = jnp.where(plain, log_delta, jnp.logaddexp(log_y, s) - total)
    w = jnp.expm1(jnp.minimum(gap, 40)) * sigmoid(s - log_y)
    plain = (w > -0.5) & (gap < 40)
    log_w = jnp.where(plain, jnp.log1p(jnp.where(plain, w, 0)), gap - log_delta)
    return times(jnp.exp(log_y), log_w) - special.argument(s) * log_delta


def _value(z: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    """By Stirling's series, so that large counts keep their digits."""
    positive = jnp.where(y > 0, y, 1)
    log_y = jnp.log(positive)
    total = jnp.log(positive + special.argument(s))
    spread = 0.5 * (log_sigmoid(s - log_y) - log_y) - special.HALF_LOG
    spread = spread + special.stirling(total) - special.stirling(s) - special.stirling(log_y)
    return jnp.where(y > 0, spread, 0) - _deviance(jnp.where(y > 0, log_y, -jnp.inf), z, s)


def _scores(z: jax.Array, s: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In log mean and log dispersion, the latter without what cancels for large r."""
    in_mean = y * sigmoid(s - z) - _of_mean(z, s)
    r, total = special.argument(s), jnp.logaddexp(z, s)
    # delta = (y - mu) / (r + mu); far from 0 by logarithms, it may overflow or round to -1.
    delta = y * jnp.exp(-jnp.maximum(total, -80)) - jnp.exp(z - total)
    far = in_mean - r * (jnp.log(r + y) - total)
    near = jnp.abs(delta) < 0.5
    gap = jnp.where(near, r * log1p_gap(jnp.where(near, delta, 0)), far)
    return in_mean, gap - special.digamma_rise(s, y)


_log_prob = with_scores(
    lambda z, y, c: _value(z[0], -z[1], y), lambda z, y, c: _scores(z[0], -z[1], y)
)
_log_prob_of_mean = with_scores(
    lambda z, y, c: _value(z[0], c[0], y), lambda z, y, c: _scores(z[0], c[0], y)[:1]
)

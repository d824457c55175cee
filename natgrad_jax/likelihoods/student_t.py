"""Numbers with outliers."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods import special
from natgrad_jax.likelihoods.arithmetic import log1p_gap
from natgrad_jax.likelihoods.arithmetic import with_scores
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike
from natgrad_jax.likelihoods.closed_form import pair_factor
from natgrad_jax.likelihoods.closed_form import pair_product

#: From here on the information on the degrees of freedom is a series, taken after so many steps.
_LARGE, _STEPS = 24, 12


class StudentT(ClosedForm):
    r"""Student's t distribution, :math:`y = m + e^s t_\nu`: a Gaussian with heavy tails.

    .. math::
        \log p(y) = - \frac{\nu + 1}{2} \log(1 + r^2 / \nu) - s + \text{const}(\nu), \qquad
        r = (y - m) e^{-s}

    Outputs are the pair (location m, log scale s), with fixed degrees of freedom :math:`\nu`, or
    the triple (location, log scale, log degrees of freedom). The Fisher matrix is

    .. math::
        M_{mm} = \frac{\nu + 1}{\nu + 3} e^{-2 s}, \qquad M_{ss} = \frac{2 \nu}{\nu + 3},

    and in :math:`\log\nu`, which is orthogonal to m and not to s, it is made of trigamma functions.
    Each output, targets and samples are (N, ...).

    Args:
      df: None where the model gives them, else :math:`\nu`: a positive number, or an array that
        broadcasts to the outputs, (N,) for one a row.

    Raises:
      ValueError: df is not positive or, in use, does not broadcast to the outputs.
      TypeError: the KL divergence is asked for, which has no closed form.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> outputs, ones = (jnp.zeros((1,)), jnp.zeros((1,))), (jnp.ones((1,)), jnp.ones((1,)))
      >>> [product.tolist() for product in ng.StudentT(df=1.0).fisher_product(outputs, ones)]
      [[0.5], [0.5]]

    Notes:
      What measures distances by d^T F d (`clip_by_kl`, `max_kl`) needs no KL; `kl_divergence`,
      `trpo` and the line search on the KL do.

    References:
      Lange, Little and Taylor, 1989, Robust statistical modeling using the t distribution.
    """

    def __init__(self, df: jax.typing.ArrayLike | None = None):
        if df is not None:
            reading.check_positive("StudentT", "df", df)
        self.df = df

    def _read(self, call: str, outputs: Any) -> Any:
        names = ("location", "log_scale", "log_df")
        return reading.several(call, outputs, names if self.df is None else names[:2])

    def _constant(self, call: str, z: Any) -> Any:
        if self.df is None:
            return None
        return jnp.log(reading.constant(call, "df", self.df, z[0]))

    def _log_prob(self, z: Any, y: jax.Array, c: Any) -> jax.Array:
        if c is None:
            return _log_prob(tuple(z), y, ())
        return _log_prob_of_scale(tuple(z), y, (c,))

    def _sample(self, key: jax.Array, z: Any, c: Any) -> jax.Array:
        s = z[2] if c is None else c
        normal, mixing = jax.random.split(key)
        noise = jax.random.normal(normal, z[0].shape, z[0].dtype)
        # chi^2 / df by its logarithm: it is below any floating point number for small df.
        log_ratio = jax.random.loggamma(mixing, 0.5 * special.argument(s), dtype=s.dtype) - (
            s - math.log(2)
        )
        return z[0] + noise * jnp.exp(z[1] - 0.5 * log_ratio)

    def _information(self, z: Any, c: Any) -> Any:
        """Of the location, and of log scale and log df as a matrix."""
        nu = special.argument(z[2] if c is None else c)
        rest = 1 / (nu + 3)
        of_scale = 2 * nu * rest, -2 * nu * rest / (nu + 1), _of_df(nu)
        return (nu + 1) * rest * jnp.exp(-2 * z[1]), of_scale

    def _fisher(self, z: Any, v: Any, c: Any) -> Any:
        location, matrix = self._information(z, c)
        if c is not None:
            return alike(z, location * v[0], matrix[0] * v[1])
        return alike(z, location * v[0], *pair_product(matrix, v[1:]))

    def _factor(self, z: Any, u: Any, c: Any) -> Any:
        location, matrix = self._information(z, c)
        if c is not None:
            return alike(z, jnp.sqrt(location) * u[0], jnp.sqrt(matrix[0]) * u[1])
        return alike(z, jnp.sqrt(location) * u[0], *pair_factor(matrix, u[1:]))


def _of_df(nu: jax.Array) -> jax.Array:
    r"""The information on log df, I = nu^2 [eta(nu) - g(nu)].

    eta(nu) = [trigamma(nu / 2) - trigamma((nu + 1) / 2)] / 4 = sum_j (-1)^j / (nu + j)^2 and
    g(nu) = (nu + 5) / (2 nu (nu + 1) (nu + 3)) cancel to order nu^-4. Their difference at nu + 2
    differs by a positive rational function, and at large nu is a series (Euler, Boole).
    """
    small = nu < _LARGE
    far = jnp.where(small, nu + 2 * _STEPS, nu)
    i = 1 / far
    series = jnp.zeros_like(nu)
    for coefficient in (-1036.5, 77.5, -8.5, 1.5):
        series = series * i * i + coefficient
    leading = (7 + i * (2 - i * (4 + 3 * i))) / (2 * (1 + i) * (1 + 3 * i))
    total = (nu * i) ** 2 * i * i * (leading + i * i * i * series)
    bounded = jnp.minimum(nu, _LARGE)
    w = special.shifts(bounded, _STEPS, 2)
    rational = (30 + w * (66 + 28 * w)) / ((w + 1) ** 2 * (w + 2) * (w + 3) * (w + 5))
    steps = jnp.sum((bounded[..., None] / w) ** 2 * rational, axis=-1)
    return total + jnp.where(small, steps, 0)


def _squares(residual: jax.Array, log_scale: jax.Array) -> tuple[jax.Array, ...]:
    """For u = residual / scale of any size: functions of u^2, and the slope in the residual.

    Returns:
      u^2 / (1 + u^2), 1 / (1 + u^2), log(1 + u^2), this less the first, and
      (u / scale) / (1 + u^2).
    """
    u = residual * jnp.exp(-log_scale)
    big = jnp.abs(u) > 1
    small, inverse = jnp.where(big, 0, u), 1 / jnp.where(big, u, 1)
    square, rest = small * small, inverse * inverse
    share = jnp.where(big, 1 / (1 + rest), square / (1 + square))
    other = jnp.where(big, rest / (1 + rest), 1 / (1 + square))
    far = jnp.where(big, residual, 1)
    log = jnp.where(
        big, jnp.log1p(rest) + 2 * (jnp.log(jnp.abs(far)) - log_scale), jnp.log1p(square)
    )
    gap = jnp.where(big, log - share, log1p_gap(-jnp.where(big, 0, share)))
    near = jnp.where(big, 0, small / (1 + square) * jnp.exp(-jnp.where(big, 0, log_scale)))
    return share, other, log, gap, jnp.where(big, share / far, near)


def _value(z: tuple, log_df: jax.Array, y: jax.Array) -> jax.Array:
    nu = special.argument(log_df)
    log_half = log_df - math.log(2)
    log_next = jnp.log(0.5 * nu + 0.5)
    # log Gamma((nu + 1) / 2) - log Gamma(nu / 2) - log(pi nu) / 2, by Stirling's series.
    rise = -0.5 * nu * log1p_gap(1 / nu) + special.stirling(log_next) - special.stirling(log_half)
    log = _squares(y - z[0], z[1] + 0.5 * log_df)[2]
    return rise - special.HALF_LOG - z[1] - 0.5 * (nu + 1) * log


def _scores(z: tuple, log_df: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    nu = special.argument(log_df)
    share, other, _, gap, slope = _squares(y - z[0], z[1] + 0.5 * log_df)
    in_scale = nu * share - other
    in_df = special.digamma_rise(log_df - math.log(2), jnp.full_like(nu, 0.5))
    in_df = in_df + 0.5 * share - 0.5 * nu * (log1p_gap(1 / nu) + gap)
    return (nu + 1) * slope, in_scale, in_df


_log_prob = with_scores(lambda z, y, c: _value(z, z[2], y), lambda z, y, c: _scores(z, z[2], y))
_log_prob_of_scale = with_scores(
    lambda z, y, c: _value(z, c[0], y), lambda z, y, c: _scores(z, c[0], y)[:2]
)

"""Positive numbers with a relative scatter of their own."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods import special
from natgrad_jax.likelihoods.arithmetic import expm1_gap
from natgrad_jax.likelihoods.arithmetic import times
from natgrad_jax.likelihoods.arithmetic import with_scores
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike


class Gamma(ClosedForm):
    r"""Positive numbers of mean :math:`\mu` and variance :math:`\mu^2 / k`, k being the shape.

    .. math::
        p(y) = \frac{(k / \mu)^k}{\Gamma(k)} y^{k - 1} e^{-k y / \mu}, \qquad
        M = \mathrm{diag}(k, \; k^2 \psi'(k) - k)

    in :math:`(\log\mu, \log k)`, which are orthogonal. Outputs are the log mean, with a fixed
    shape, or the pair (log mean, log shape); links are the model's business: a model with the
    inverse link, :math:`1 / \mu = \eta`, returns ``-jnp.log(eta)``. Each output, targets (positive
    numbers) and samples are (N, ...).

    Args:
      shape: None where the model gives it, else k: a positive number, or an array that broadcasts
        to the outputs, (N,) for one a row. 1 / k is what GLM software calls dispersion or scale.

    Raises:
      ValueError: the shape is not positive or, in use, does not broadcast to the outputs.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> ng.Gamma(shape=3.0).fisher_product(jnp.zeros((1,)), jnp.ones((1,))).tolist()
      [3.0]

    References:
      McCullagh and Nelder, 1989, Generalized linear models, chapter 8.
    """

    def __init__(self, shape: jax.typing.ArrayLike | None = None):
        if shape is not None:
            reading.check_positive("Gamma", "shape", shape)
        self.shape = shape

    def _read(self, call: str, outputs: Any) -> Any:
        if self.shape is None:
            return reading.several(call, outputs, ("log_mean", "log_shape"))
        return super()._read(call, outputs)

    def _constant(self, call: str, z: Any) -> Any:
        if self.shape is None:
            return None
        return jnp.log(reading.constant(call, "shape", self.shape, z))

    def _log_prob(self, z: Any, y: jax.Array, c: Any) -> jax.Array:
        if c is None:
            return _log_prob((z[0], z[1]), y, ())
        return _log_prob_of_mean((z,), y, (c,))

    def _kl(self, p: Any, q: Any, c: Any) -> jax.Array:
        if c is not None:
            return special.argument(c) * expm1_gap(p - q)
        # The part of the means, and that of the shapes at one mean.
        return special.argument(q[1]) * expm1_gap(p[0] - q[0]) + special.shape_divergence(
            p[1], q[1]
        )

    def _sample(self, key: jax.Array, z: Any, c: Any) -> jax.Array:
        m, s = (z[0], z[1]) if c is None else (z, c)
        # By its logarithm: for a small shape draws are below any floating point number.
        return jnp.exp(jax.random.loggamma(key, special.argument(s), dtype=s.dtype) - s + m)

    def _information(self, z: Any, c: Any) -> Any:
        if c is not None:
            return special.argument(c)
        return alike(z, special.argument(z[1]), special.trigamma_gap(z[1]))


def _value(m: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    k = special.argument(s)
    positive = jnp.where(y == 0, 1, y)
    w = jnp.log(positive) - m
    spread = 0.5 * s - special.stirling(s) - special.HALF_LOG
    # The density at zero is 0, infinite or, for k = 1, finite.
    at_zero = times(k - 1, jnp.log(y)) + k * (1 - m) + spread
    return jnp.where(y == 0, at_zero, spread - k * expm1_gap(w) - jnp.log(positive))


def _scores(m: jax.Array, s: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    w = jnp.log(y) - m
    k = special.argument(s)
    return k * jnp.expm1(w), special.digamma_gap(s) - k * expm1_gap(w)


_log_prob = with_scores(
    lambda z, y, c: _value(z[0], z[1], y), lambda z, y, c: _scores(z[0], z[1], y)
)
_log_prob_of_mean = with_scores(
    lambda z, y, c: _value(z[0], c[0], y), lambda z, y, c: _scores(z[0], c[0], y)[:1]
)

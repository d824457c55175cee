"""Gaussians of independent positions."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.arithmetic import expm1_gap
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike

_HALF_LOG = 0.5 * math.log(2 * math.pi)


class Normal(ClosedForm):
    r"""A Gaussian of known scale, with the mean z as outputs: :math:`y = z + scale \cdot noise`.

    :math:`M = 1 / scale^2`. Outputs, targets and samples are (N, ...). With scale 1 minus log p is
    *half* the squared error, up to a constant.

    Args:
      scale: standard deviation in the units of the targets: a positive number, or an array that
        broadcasts to the outputs. One a row is (N,), or (N, 1) for outputs (N, T); it fits batches
        of one size only.

    Raises:
      ValueError: the scale is not positive or, in use, does not broadcast to the outputs.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> normal = ng.Normal(scale=jnp.array([0.5, 2.0]))
      >>> normal.fisher_product(jnp.zeros((1, 2)), jnp.ones((1, 2))).tolist()
      [[4.0, 0.25]]
    """

    def __init__(self, scale: jax.typing.ArrayLike = 1.0):
        reading.check_positive("Normal", "scale", scale)
        self.scale = scale

    def _constant(self, call: str, z: jax.Array) -> jax.Array:
        return reading.constant(call, "scale", self.scale, z)

    def _log_prob(self, z: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
        return -0.5 * ((y - z) / scale) ** 2 - jnp.log(scale) - _HALF_LOG

    def _kl(self, p: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
        return 0.5 * ((p - q) / scale) ** 2

    def _sample(self, key: jax.Array, z: jax.Array, scale: jax.Array) -> jax.Array:
        return z + scale * jax.random.normal(key, z.shape, z.dtype)

    def _information(self, z: jax.Array, scale: jax.Array) -> jax.Array:
        return scale**-2


class DiagonalNormal(ClosedForm):
    r"""A Gaussian, with the pair z = (mean m, log scale s) as outputs: :math:`y = m + e^s noise`.

    :math:`M = diag(e^{-2 s}, 2)`: a log scale is known equally well everywhere. The mean, the log
    scale, targets and samples are (N, ...).

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> outputs, ones = (jnp.zeros((1,)), jnp.zeros((1,))), (jnp.ones((1,)), jnp.ones((1,)))
      >>> [product.tolist() for product in ng.DiagonalNormal().fisher_product(outputs, ones)]
      [[1.0], [2.0]]
    """

    def _read(self, call: str, outputs: Any) -> Any:
        return reading.several(call, outputs, ("mean", "log_scale"))

    def _log_prob(self, z: Any, y: jax.Array, c: None) -> jax.Array:
        del c
        return -0.5 * ((y - z[0]) * jnp.exp(-z[1])) ** 2 - z[1] - _HALF_LOG

    def _kl(self, p: Any, q: Any, c: None) -> jax.Array:
        del c
        ratio = 2 * (p[1] - q[1])  # log of the ratio of variances
        return 0.5 * (expm1_gap(ratio) + ((p[0] - q[0]) * jnp.exp(-q[1])) ** 2)

    def _sample(self, key: jax.Array, z: Any, c: None) -> jax.Array:
        del c
        return z[0] + jnp.exp(z[1]) * jax.random.normal(key, z[0].shape, z[0].dtype)

    def _information(self, z: Any, c: None) -> Any:
        del c
        return alike(z, jnp.exp(-2 * z[1]), jnp.full_like(z[1], 2))

"""A Gaussian vector with any covariance."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.arithmetic import expm1_gap
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike


class MultivariateNormal(ClosedForm):
    r"""A Gaussian vector, with (mean m, factor A) as outputs: :math:`y = m + L \cdot noise`.

    The Cholesky factor L of the covariance :math:`L L^T` is the lower triangle of A with the
    *exponential* of its diagonal, so that every A will do; what stands above the diagonal is
    ignored. With a change :math:`W = L^{-1} dL`,

    .. math::
        v^T M v = \|L^{-1} dm\|^2 + \sum_{i > j} W_{ij}^2 + 2 \sum_i W_{ii}^2 .

    The mean, targets and samples are (N, ..., D), A is (N, ..., D, D).

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> outputs = jnp.zeros((1, 2)), jnp.zeros((1, 2, 2))  # the standard normal distribution
      >>> normal = ng.MultivariateNormal()
      >>> normal.fisher_product(outputs, (jnp.ones((1, 2)), jnp.ones((1, 2, 2))))[1].tolist()
      [[[2.0, 0.0], [1.0, 2.0]]]

    Notes:
      Two triangular solves a product, O(D^3) for the factor.
    """

    def _read(self, call: str, outputs: Any) -> Any:
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            got = jax.tree.structure(outputs)
            raise TypeError(f"{call}: outputs must be a pair (mean, factor), got {got}")
        mean, factor = reading.promote(call, outputs)
        if mean.ndim < 2 or factor.shape != (*mean.shape, mean.shape[-1]):
            raise ValueError(
                f"{call}: mean (N, ..., D) needs a factor (N, ..., D, D), got {mean.shape} and"
                f" {factor.shape}"
            )
        return alike(outputs, mean, factor)

    def _log_prob(self, z: Any, y: jax.Array, c: None) -> jax.Array:
        del c
        noise = _solve(_cholesky(z[1]), (y - z[0])[..., None])[..., 0]
        constant = 0.5 * math.log(2 * math.pi) * z[0].shape[-1]
        return -0.5 * jnp.sum(noise**2, axis=-1) - jnp.sum(_diagonal(z[1]), axis=-1) - constant

    def _kl(self, p: Any, q: Any, c: None) -> jax.Array:
        del c
        lower_p, lower_q = _cholesky(p[1]), _cholesky(q[1])
        ratios = 2 * (_diagonal(p[1]) - _diagonal(q[1]))
        # L_q^-1 L_p - I below the diagonal; on it stand the roots of the ratios.
        change = jnp.tril(_solve(lower_q, lower_p - lower_q), -1)
        shift = _solve(lower_q, (p[0] - q[0])[..., None])[..., 0]
        squares = jnp.sum(change**2, axis=(-2, -1)) + jnp.sum(shift**2, axis=-1)
        return 0.5 * (squares + jnp.sum(expm1_gap(ratios), axis=-1))

    def _sample(self, key: jax.Array, z: Any, c: None) -> jax.Array:
        del c
        return z[0] + _times(_cholesky(z[1]), jax.random.normal(key, z[0].shape, z[0].dtype))

    def _fisher(self, z: Any, v: Any, c: None) -> Any:
        del c
        lower = _cholesky(z[1])
        mean = _solve(lower, v[0][..., None])
        change = _solve(lower, _chain(lower, v[1]))
        change = change + _on_diagonal(change)
        factor = _chain(lower, _solve(lower, jnp.tril(change), transposed=True))
        return alike(z, _solve(lower, mean, transposed=True)[..., 0], factor)

    def _factor(self, z: Any, u: Any, c: None) -> Any:
        del c
        lower = _cholesky(z[1])
        mean = _solve(lower, u[0][..., None], transposed=True)[..., 0]
        change = jnp.tril(u[1], -1) + math.sqrt(2) * _on_diagonal(u[1])
        return alike(z, mean, _chain(lower, _solve(lower, change, transposed=True)))


def _diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _on_diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.tril(jnp.triu(matrix))


def _cholesky(factor: jax.Array) -> jax.Array:
    """L of A."""
    size = factor.shape[-1]
    eye = jnp.eye(size, dtype=factor.dtype).reshape((1,) * (factor.ndim - 2) + (size, size))
    return jnp.tril(factor, -1) + eye * jnp.exp(_on_diagonal(factor))


def _chain(lower: jax.Array, change: jax.Array) -> jax.Array:
    """The change of L by one of A; the map is symmetric, so that it also takes cotangents back."""
    return jnp.tril(change, -1) + _on_diagonal(lower) * _on_diagonal(change)


def _solve(lower: jax.Array, rhs: jax.Array, *, transposed: bool = False) -> jax.Array:
    return jax.lax.linalg.triangular_solve(
        lower, rhs, left_side=True, lower=True, transpose_a=transposed
    )


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...j->...i", matrix, vector, precision=jax.lax.Precision.HIGHEST)

"""Losses of residuals that outliers do not rule, as scipy.optimize.least_squares defines them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.metrics import output_metrics
from natgrad_jax.metrics.output_metrics import OutputMetric

Tree = Any


def _soft_l1(z: jax.Array) -> jax.Array:
    # 2 (sqrt(1 + z) - 1), without its cancellation.
    return 2 * z / (jnp.sqrt(1 + z) + 1)


def _huber(z: jax.Array) -> jax.Array:
    outside = z > 1
    return jnp.where(outside, 2 * jnp.sqrt(jnp.where(outside, z, 1)) - 1, z)


#: rho of z = (r / scale)^2, each with rho(0) = 0 and rho'(0) = 1, and its derivative.
_LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "linear": (lambda z: z, jnp.ones_like),
    "soft_l1": (_soft_l1, lambda z: 1 / jnp.sqrt(1 + z)),
    "huber": (_huber, lambda z: 1 / jnp.sqrt(jnp.maximum(z, 1))),
    "cauchy": (jnp.log1p, lambda z: 1 / (1 + z)),
}


def robust_loss(
    residual: Tree,
    loss: str,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    weights: Tree | None = None,
) -> jax.Array:
    r"""The objective of the metric :func:`gauss_newton` with the same ``loss`` and ``scale``.

    .. math::
        L = \sum_i \frac{1}{N_i} \sum_n w_{in} \sum_k \frac{c^2}{2}
            \rho\!\left(\frac{r_{ink}^2}{c^2}\right)

    over residual leaves i, rows n and the residuals k of a row, with

    =========== ======================== =====================
    loss        :math:`\rho(z)`          weight :math:`\rho'`
    =========== ======================== =====================
    "linear"    z                        1
    "soft_l1"   2 (sqrt(1 + z) - 1)      1 / sqrt(1 + z)
    "huber"     z, 2 sqrt(z) - 1 (z > 1) 1, 1 / sqrt(z)
    "cauchy"    log(1 + z)               1 / (1 + z)
    =========== ======================== =====================

    Args:
      residual: a tree of residuals, leaves of shape (N_i, ...).
      loss: the name of :math:`\rho`.
      scale: c, in units of the residuals: scipy's ``f_scale``.
      weights: None, or what ``weights(batch)`` of the metric gives for rows: one array (N,) for
        all leaves or a tree like ``residual``. They are divided by their mean.

    Returns:
      A scalar in squared units of the residuals. scipy's ``cost`` is its sum in place of its mean.

    Raises:
      ValueError: ``loss`` is none of these, or ``scale`` is not positive.

    Examples:
      Small residuals count by their squares, outliers by their logarithm:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> residual = jnp.array([0.01, 100.0])
      >>> values = [ng.robust_loss(r[None], "cauchy") for r in residual]
      >>> bool(jnp.allclose(values[0], 0.01**2 / 2, rtol=1e-3)), bool(values[1] < 5)
      (True, True)

    References:
      Huber, 1964, Robust estimation of a location parameter; Triggs, McLauchlan, Hartley and
      Fitzgibbon, 2000, Bundle adjustment: a modern synthesis.
    """
    check("robust_loss", loss, scale)
    rho = _LOSSES[loss][0]
    leaves, structure = jax.tree.flatten(residual)
    same = jax.tree.structure(weights) == structure  # type: ignore[operator]
    given = jax.tree.leaves(weights) if same else [weights] * len(leaves)

    def mean(r: jax.Array, w: jax.Array | None) -> jax.Array:
        dtype = _trees.work_dtype(r)
        c = jnp.asarray(scale).astype(dtype)
        rows = jnp.sum(0.5 * c**2 * rho((r.astype(dtype) / c) ** 2).reshape(r.shape[0], -1), axis=1)
        if w is None:
            return jnp.mean(rows)
        w = jnp.asarray(w).astype(dtype)
        total = jnp.sum(w)
        return jnp.dot(w, rows, precision="highest") / jnp.where(total > 0, total, 1)

    parts = [mean(r, w) for r, w in zip(leaves, given, strict=True)]
    return functools.reduce(jnp.add, parts)


def check(caller: str, loss: str, scale: jax.typing.ArrayLike) -> None:
    """Raises unless the loss is known and the scale positive."""
    if loss not in _LOSSES:
        raise ValueError(f"{caller}: loss must be one of {list(_LOSSES)}, got {loss!r}")
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"{caller}: scale must be positive, got {scale}")


def output_metric(
    loss: str, scale: jax.typing.ArrayLike, outputs: Tree, row_weights: Tree
) -> OutputMetric:
    """M = diag(rho') in every row."""
    derivative = _LOSSES[loss][1]

    def weight(r: jax.Array) -> jax.Array:
        dtype = _trees.work_dtype(r)
        return derivative((r.astype(dtype) / jnp.asarray(scale).astype(dtype)) ** 2)

    entries = jax.tree.map(weight, outputs)
    roots = jax.tree.map(jnp.sqrt, entries)
    plain = output_metrics.row_metric(outputs, row_weights)
    times = lambda c, v: jax.tree.map(lambda a, x: a * x, c, v)
    return plain._replace(
        product=lambda v: times(entries, plain.product(v)),
        factor_product=lambda u: times(roots, plain.factor_product(u)),
    )

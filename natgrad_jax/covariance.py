"""Covariance of an estimate: the inverse of the Fisher matrix, with the digits that data have."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _boundary
from natgrad_jax import _independence
from natgrad_jax import _trees
from natgrad_jax import curvature as _curvature
from natgrad_jax.curvature import curvature
from natgrad_jax.metrics import Metric

Tree = Any

_HIGHEST = jax.lax.Precision.HIGHEST

#: A warning names so many parameters.
_NAMED = 8


class CovarianceInfo(NamedTuple):
    """What :func:`asymptotic_covariance` found.

    Attributes:
      rank: the numerical rank of F in units of its own diagonal; P where all parameters are
        determined. int32.
      noise_variance: the variance of the noise that the covariance is in units of, given or
        estimated; 1 where the likelihood holds the noise.
      determined: a tree of booleans like the parameters: False where the variance means nothing,
        because a combination of parameters that this one belongs to moves no output.
    """

    rank: jax.Array
    noise_variance: jax.Array
    determined: Tree


def asymptotic_covariance(
    metric: Metric,
    params: Tree,
    batch: Tree,
    num_examples: int,
    *,
    noise_variance: jax.typing.ArrayLike | str | None = None,
    return_info: bool = False,
    key: jax.Array | None = None,
) -> Any:
    r"""The covariance of the maximum-likelihood or least-squares estimate, to leading order.

    .. math::
        \mathrm{Cov}[\hat\theta] \approx \frac{1}{N} F(\hat\theta)^{-1}
        \qquad\text{or}\qquad
        \frac{\sigma^2}{N} F(\hat\theta)^{-1} = \sigma^2 (J^T J)^{-1}
        \quad\text{for residuals}

    the Cramer-Rao bound. Roots of its diagonal are standard errors.

    Args:
      metric: a Fisher metric, the mean over rows, or :func:`gauss_newton`.
      params: the estimate, P numbers.
      batch: the data, as the metric's model takes it.
      num_examples: N, how many rows the estimate was made from: the sum of weights that are
        frequencies, and the number of nonzero weights that mask.
      noise_variance: for :func:`gauss_newton`, whose residuals say nothing of the noise: its
        variance :math:`\sigma^2` in squared units of the residuals (1.0 for residuals divided by
        their known errors, ``absolute_sigma=True`` of scipy's ``curve_fit``), or "estimated" for
        :math:`s^2 = \mathrm{RSS} / (N k - P)` with k residuals a row (``absolute_sigma=False``),
        the residual sum of squares being that of ``batch``. None for every other metric.
      return_info: whether to return ``(covariance, info)`` with a :class:`CovarianceInfo`.
      key: random key, for a metric that samples.

    Returns:
      (P, P), leaves raveled in tree order. Where F is singular it is the pseudo-inverse, and a
      warning names the parameters that are not determined, whose variance means nothing. (Not
      inside `jax.jit`, where ``return_info`` tells.)

    Raises:
      TypeError, ValueError: the metric samples and there is no key; a Gauss-Newton metric comes
        without ``noise_variance`` or another one with it; residuals in groups of several sizes or
        with a robust loss, whose covariance is no multiple of the inverse of F; N k is not above P
        where the noise is estimated.

    Examples:
      The mean of N numbers with standard deviation 2 has variance 4 / N:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda mean, x: mean + 0 * x, ng.Normal(scale=2.0))
      >>> covariance = ng.asymptotic_covariance(metric, jnp.array(0.0), jnp.zeros((100,)), 100)
      >>> covariance.round(4).tolist()
      [[0.04]]

      and that of numbers whose spread is estimated, s^2 / N:

      >>> x = jnp.array([1.0, 2.0, 3.0, 6.0])
      >>> covariance = ng.asymptotic_covariance(
      ...     ng.gauss_newton(lambda mean, x: mean - x), x.mean(), x, 4, noise_variance="estimated")
      >>> bool(jnp.allclose(covariance, x.var(ddof=1) / 4))
      True

    Notes:
      Parameters in units as different as 1 and 1e-9 keep all of their digits: rows R of F = R^T R
      are divided by the norms of their columns and factorised orthogonally, F itself is never
      formed. What counts as singular is singular in these units: a singular value within
      eps (P + sqrt(M)) of the largest. O(M P) memory, O(M P^2) work. A metric without rows
      (:func:`hessian`) is scaled by its diagonal.

    References:
      Rao, 1945; Cramer, 1946; Golub and Van Loan, 2013, section 5.3 (column scaling).
    """
    caller = "asymptotic_covariance"
    _boundary.check_metric(caller, metric)
    _boundary.check_params(caller, params)
    _boundary.check_batch(caller, batch)
    _check_noise(caller, metric, noise_variance)
    _independence.check_claim(caller, metric, params, batch)
    estimated = isinstance(noise_variance, str)
    given = 1.0 if estimated or noise_variance is None else noise_variance
    if estimated:
        _check_freedom(caller, metric, params, batch, num_examples)
    found, info = _covariance(metric, estimated, params, batch, num_examples, given, key)
    _warn(caller, info)
    return (found, info) if return_info else found


def _check_noise(caller: str, metric: Metric, noise_variance: Any) -> None:
    if metric.name != "gauss_newton":
        if noise_variance is not None:
            raise ValueError(
                f"{caller}: the metric {metric.name} holds the noise in its likelihood; give"
                f" noise_variance=None, got {noise_variance!r}"
            )
        return
    if metric.robust:
        raise ValueError(
            f"{caller}: the covariance of an estimate with a robust loss is no multiple of the"
            " inverse of F; give a gauss_newton metric with loss='linear', or resample the data"
        )
    if noise_variance is None:
        raise ValueError(
            f"{caller}: residuals do not tell the variance of their noise: give noise_variance=1.0"
            ' where they are divided by known errors, noise_variance="estimated" for RSS / (N - P),'
            " or a number"
        )
    if isinstance(noise_variance, str):
        if noise_variance != "estimated":
            raise ValueError(
                f'{caller}: noise_variance must be a number or "estimated", got {noise_variance!r}'
            )
        return
    _boundary.check_number(caller, "noise_variance", noise_variance)


def _check_freedom(
    caller: str, metric: Metric, params: Tree, batch: Tree, num_examples: Any
) -> None:
    """Raises where fewer residuals than parameters leave nothing to estimate noise from."""
    leaves = jax.tree.leaves(jax.eval_shape(metric.outputs, params, batch))
    size = _trees.size(params)
    if isinstance(num_examples, int | np.integer) and leaves:
        count = num_examples * _per_row(leaves)
        if count <= size:
            raise ValueError(
                f"{caller}: {count} residuals leave no degree of freedom beside {size} parameters"
                " to estimate the noise from; give noise_variance as a number"
            )


def _per_row(leaves: list[Any]) -> int:
    """How many residuals a row has: those of all leaves, which have as many rows."""
    return sum(leaf.size // max(leaf.shape[0], 1) for leaf in leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _covariance(
    metric: Metric,
    estimated: bool,
    params: Tree,
    batch: Tree,
    num_examples: jax.typing.ArrayLike,
    noise_variance: jax.typing.ArrayLike,
    key: jax.Array | None,
) -> tuple[jax.Array, CovarianceInfo]:
    here = curvature(metric, params, batch, key)
    size, count = _trees.size(params), jnp.asarray(num_examples).astype(here.dtype)
    noise = jnp.asarray(noise_variance).astype(here.dtype)
    if metric.name == "gauss_newton":
        squares, per_row = _mean_square(metric, params, batch)
        if estimated:
            noise = (squares * count / (count * per_row - size)).astype(here.dtype)
    if size == 0:
        inverse, null = jnp.zeros((0, 0), here.dtype), jnp.zeros((0, 0), here.dtype)
    elif here.jacobian is None:
        inverse, null = _from_matrix(_curvature.dense_matrix(here), here.definite)
    else:
        inverse, null = _from_rows(here.jacobian().matrix())
    involved = jnp.sum(null**2, axis=1) > jnp.sqrt(jnp.finfo(here.dtype).eps)
    rank = size - jnp.sum(jnp.any(null != 0, axis=0), dtype=jnp.int32)
    determined = _trees.unravel(~involved, params)
    return inverse * (noise / count), CovarianceInfo(rank, noise, determined)


def _mean_square(metric: Metric, params: Tree, batch: Tree) -> tuple[jax.Array, int]:
    """The weighted mean over rows of squared residuals, and how many a row has."""
    outputs = metric.outputs(params, batch)
    leaves = jax.tree.leaves(outputs)
    rows = {leaf.shape[0] for leaf in leaves}
    if len(rows) > 1:
        raise ValueError(
            "asymptotic_covariance: residuals come in groups of several sizes,"
            f" {sorted(rows)}, each averaged by itself: their covariance is no multiple of the"
            " inverse of F; give them as one array, or in groups of one size"
        )
    dtype = _trees.work_dtype(params)
    weighted = metric.output_metric(outputs, batch, None).product(outputs)
    return _trees.vdot(_trees.cast(outputs, dtype), _trees.cast(weighted, dtype), dtype), _per_row(
        leaves
    )


def _from_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(R^T R)^+ (P, P) of R (M, P), and its null vectors in scaled units, padded with zeros."""
    scales = _column_norms(rows)
    scaled = rows / scales[None, :]
    count, size = scaled.shape
    if count > size:
        scaled = jnp.linalg.qr(scaled, mode="r")
    elif count < size:
        scaled = jnp.concatenate([scaled, jnp.zeros((size - count, size), rows.dtype)])
    _, values, right = jnp.linalg.svd(scaled)
    cut = jnp.finfo(rows.dtype).eps * (size + count**0.5) * values[0]
    return _inverse(scales, right.T, values, cut, power=-2)


def _from_matrix(matrix: jax.Array, definite: bool) -> tuple[jax.Array, jax.Array]:
    """The same of F itself, whose negative eigenvalues keep their sign where it may have them."""
    entries = jnp.abs(jnp.diagonal(matrix))
    scales = jnp.sqrt(jnp.where(entries > 0, entries, 1))
    values, vectors = jnp.linalg.eigh(matrix / scales[:, None] / scales[None, :])
    sizes = values if definite else jnp.abs(values)
    cut = jnp.finfo(matrix.dtype).eps * matrix.shape[0] * jnp.max(sizes)
    values = jnp.where(sizes > cut, values, 0)
    return _inverse(scales, vectors, values, jnp.zeros((), matrix.dtype), power=-1)


def _column_norms(rows: jax.Array) -> jax.Array:
    """Norms of columns, without overflow or underflow of squares; 1 for columns of zeros."""
    largest = jnp.max(jnp.abs(rows), axis=0, initial=0)
    safe = jnp.where(largest > 0, largest, 1)
    norms = jnp.linalg.norm(rows / safe[None, :], axis=0) * safe
    return jnp.where(largest > 0, norms, 1)


def _inverse(
    scales: jax.Array, vectors: jax.Array, values: jax.Array, cut: jax.Array, *, power: int
) -> tuple[jax.Array, jax.Array]:
    """C^-1 V diag(values^power) V^T C^-1 over values above the cut in size, C = diag(scales).

    Where some are below, this is one generalised inverse of many: the pseudo-inverse comes of it by
    the orthogonal projection on the range of F on both sides.
    """
    kept = jnp.abs(values) > cut
    null = jnp.where(kept[None, :], 0, vectors)
    inverted = jnp.where(kept, jnp.where(kept, values, 1) ** power, 0)
    unscaled = vectors / scales[:, None]
    general = jnp.matmul(unscaled * inverted[None, :], unscaled.T, precision=_HIGHEST)

    def projected() -> jax.Array:
        basis = null / scales[:, None]
        norms = jnp.linalg.norm(basis, axis=0)
        left, sizes, _ = jnp.linalg.svd(basis / jnp.where(norms > 0, norms, 1)[None, :])
        missing = sizes > jnp.finfo(values.dtype).eps * len(values) * sizes[0]
        inside = jnp.where(missing[None, :], 0, left)
        project = jnp.matmul(inside, inside.T, precision=_HIGHEST)
        return functools.reduce(
            functools.partial(jnp.matmul, precision=_HIGHEST), (project, general, project)
        )

    return jax.lax.cond(jnp.all(kept), lambda: general, projected), null


def _warn(caller: str, info: CovarianceInfo) -> None:
    """Names the parameters that are not determined, where values can be seen."""
    leaves = jax.tree_util.tree_leaves_with_path(info.determined)
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
        return
    names = []
    for path, leaf in leaves:
        label = f"params{jax.tree_util.keystr(path)}"
        for index in np.argwhere(~np.asarray(leaf)):
            names.append(label + (f"[{', '.join(map(str, index))}]" if len(index) else ""))
    if not names:
        return
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    warnings.warn(
        f"{caller}: the data do not determine {', '.join(names[:_NAMED])}{more}: the matrix has"
        f" rank {int(info.rank)} of {sum(leaf.size for _, leaf in leaves)} in units of its"
        " diagonal; the variances of these parameters mean nothing",
        stacklevel=3,
    )

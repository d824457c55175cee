"""The Fisher matrix and its relatives, as pure functions of (metric, params, batch).

They agree with one another: the same key draws the same samples in all of them. Each is compiled
once for each metric object, so build a metric once and keep it.
"""

import functools
from typing import Any

import jax

from natgrad_jax import _boundary
from natgrad_jax import _independence
from natgrad_jax import _trees
from natgrad_jax import curvature as _curvature
from natgrad_jax.curvature import curvature
from natgrad_jax.metrics import Metric

Tree = Any


def fisher_matrix(
    metric: Metric, params: Tree, batch: Tree, *, key: jax.Array | None = None
) -> jax.Array:
    r"""The Fisher matrix, as the sum of outer products of its rows.

    .. math::
        F = \sum_r w_r J_r^T M_r J_r = R^T R

    Args:
      metric: the metric F.
      params: parameters, a pytree of real arrays with P numbers.
      batch: pytree of arrays, as the metric's model takes it.
      key: random key, for a metric that samples.

    Returns:
      (P, P), leaves raveled in tree order. For `hessian` the Hessian.

    Raises:
      ValueError: the metric samples and there is no key.

    Examples:
      A mean and a log-scale are orthogonal, with information 1 / scale^2 and 2:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> model = lambda p, x: (p["mean"] + 0 * x, p["log_scale"] + 0 * x)
      >>> params = {"log_scale": jnp.log(0.5), "mean": jnp.array(3.0)}
      >>> metric = ng.exact_fisher(model, ng.DiagonalNormal())
      >>> ng.fisher_matrix(metric, params, jnp.zeros((5,))).round(4).tolist()
      [[2.0, 0.0], [0.0, 4.0]]

    Notes:
      O(M P + P^2) memory for M rows; O(P^2) where the metric has none.
    """
    _check("fisher_matrix", params, batch, metric)
    return _dense(metric, params, batch, key)


def fisher_vector_product(
    metric: Metric, params: Tree, batch: Tree, tangent: Tree, *, key: jax.Array | None = None
) -> Tree:
    r"""The product F v, by one Jacobian product and one transposed one.

    .. math::
        F v = J^T W M J v

    Args:
      metric: the metric F.
      params: parameters, a pytree of real arrays.
      batch: pytree of arrays, as the metric's model takes it.
      tangent: v, a tree like ``params``.
      key: random key, for a metric that samples.

    Returns:
      A tree like ``tangent``, with its dtypes.

    Raises:
      ValueError: ``tangent`` is not like ``params``; the metric samples and there is no key.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Bernoulli())
      >>> x, p, v = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.zeros((2,)), jnp.array([1.0, -1.0])
      >>> product = ng.fisher_vector_product(metric, p, x, v)
      >>> bool(jnp.allclose(product, ng.fisher_matrix(metric, p, x) @ v))
      True

    Notes:
      About 1.7 gradients, O(P) memory. Examples may mix: J is that of the whole batch. Where the
      model has no forward mode (`jax.custom_vjp`, mutable references) J v is the transpose of the
      backward pass; where that cannot be transposed either (a backward pass that iterates), it
      takes one backward pass for each output, with a warning.
    """
    _check("fisher_vector_product", params, batch, metric)
    _boundary.check_like_params("fisher_vector_product", "tangent", tangent, params)
    return _product(metric, params, batch, tangent, key)


def fisher_quadratic_form(
    metric: Metric, params: Tree, batch: Tree, tangent: Tree, *, key: jax.Array | None = None
) -> jax.Array:
    r"""The squared length d^T F d, by one Jacobian product.

    Half of it is the KL divergence that a step d moves the model's distribution, to second order.

    Args:
      metric: the metric F.
      params: parameters, a pytree of real arrays.
      batch: pytree of arrays, as the metric's model takes it.
      tangent: d, a tree like ``params``.
      key: random key, for a metric that samples.

    Returns:
      A scalar in nats (times 2) per row.

    Raises:
      ValueError: ``tangent`` is not like ``params``; the metric samples and there is no key.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal())
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> float(ng.fisher_quadratic_form(metric, jnp.zeros((2,)), x, jnp.array([1.0, 0.0])))
      5.0
    """
    _check("fisher_quadratic_form", params, batch, metric)
    _boundary.check_like_params("fisher_quadratic_form", "tangent", tangent, params)
    return _quadratic_form(metric, params, batch, tangent, key)


def fisher_diagonal(
    metric: Metric, params: Tree, batch: Tree, *, key: jax.Array | None = None
) -> Tree:
    r"""The diagonal of the Fisher matrix.

    Args:
      metric: the metric F.
      params: parameters, a pytree of real arrays.
      batch: pytree of arrays, as the metric's model takes it.
      key: random key, for a metric that samples.

    Returns:
      A tree like ``params``, in at least float32.

    Raises:
      ValueError: the metric samples and there is no key.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal())
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> ng.fisher_diagonal(metric, jnp.zeros((2,)), x).round(4).tolist()
      [5.0, 10.0]

    Notes:
      The square of the mean gradient is *not* this diagonal.
    """
    _check("fisher_diagonal", params, batch, metric)
    return _diagonal(metric, params, batch, key)


def gram_matrix(
    metric: Metric, params: Tree, batch: Tree, *, key: jax.Array | None = None
) -> jax.Array:
    r"""The Gram matrix of the rows, R R^T, the Fisher matrix seen from sample space.

    Its nonzero eigenvalues are those of F. Rows are ordered leaf after leaf of the outputs,
    row-major within a leaf (a sampled Fisher has one row for each example and sample).

    Args:
      metric: a metric that has rows (not `hessian` or `euclidean`).
      params: parameters, a pytree of real arrays.
      batch: pytree of arrays, as the metric's model takes it.
      key: random key, for a metric that samples.

    Returns:
      (M, M), row weights included: its trace is that of F.

    Raises:
      ValueError: the metric has no rows, or samples and there is no key.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> x = jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
      >>> bool(jnp.allclose(ng.gram_matrix(metric, jnp.zeros((3,)), x), x @ x.T / 2))
      True
    """
    _check("gram_matrix", params, batch, metric)
    if metric.output_metric is None:
        raise ValueError(f"gram_matrix: the metric {metric.name} has no rows")
    return _gram(metric, params, batch, key)


def _check(caller: str, params: Tree, batch: Tree, metric: Metric | None = None) -> None:
    if metric is not None:
        _boundary.check_metric(caller, metric)
    _boundary.check_params(caller, params)
    _boundary.check_batch(caller, batch)
    if metric is not None:
        _independence.check_claim(caller, metric, params, batch)
        _boundary.check_weights(caller, metric, batch)


@functools.partial(jax.jit, static_argnums=0)
def _dense(metric: Metric, params: Tree, batch: Tree, key: jax.Array | None) -> jax.Array:
    return _curvature.dense_matrix(curvature(metric, params, batch, key))


@functools.partial(jax.jit, static_argnums=0)
def _product(metric: Metric, params: Tree, batch: Tree, tangent: Tree, key) -> Tree:
    if not jax.tree.leaves(params):
        return tangent
    here = curvature(metric, params, batch, key)
    return _trees.cast_like(here.linearize()(_trees.cast(tangent, here.dtype)), tangent)


@functools.partial(jax.jit, static_argnums=0)
def _quadratic_form(metric: Metric, params: Tree, batch: Tree, tangent: Tree, key) -> jax.Array:
    curvature(metric, params, batch, key)
    own = metric._replace(distance_metric=metric.output_metric)
    return _curvature.squared_length(own, params, batch, tangent, key)


@functools.partial(jax.jit, static_argnums=0)
def _diagonal(metric: Metric, params: Tree, batch: Tree, key: jax.Array | None) -> Tree:
    return _curvature.diagonal(curvature(metric, params, batch, key))


@functools.partial(jax.jit, static_argnums=0)
def _gram(metric: Metric, params: Tree, batch: Tree, key: jax.Array | None) -> jax.Array:
    return curvature(metric, params, batch, key).jacobian().gram()

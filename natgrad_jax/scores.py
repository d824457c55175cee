"""Per-example scores, and their norms without forming them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax.jacobian import Jacobian
from natgrad_jax.jacobian import jacobian
from natgrad_jax.metrics import output_metrics

Tree = Any
LogProb = Callable[[Tree, Tree], jax.Array]


def score(log_prob: LogProb, params: Tree, batch: Tree, *, batch_axes: Tree = 0) -> Tree:
    r"""Per-example scores.

    .. math::
        s_n = \nabla_\theta \log p(x_n | \theta)

    Args:
      log_prob: function (params, batch) -> log-probabilities (N,).
      params: parameters, a pytree of real arrays.
      batch: pytree of arrays that hold N examples.
      batch_axes: along which axis of each batch leaf examples lie, as ``in_axes`` of ``jax.vmap``.

    Returns:
      A tree like ``params`` with a leading axis N.

    Raises:
      ValueError: batch leaves disagree on N, or none holds examples.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> log_prob = lambda mean, x: -0.5 * (x - mean) ** 2
      >>> ng.score(log_prob, jnp.array(1.0), jnp.array([0.0, 1.0, 3.0])).tolist()
      [-1.0, 0.0, 2.0]

    Notes:
      N x P numbers. Their Euclidean norms alone are far cheaper: :func:`score_norms`.
    """
    group = _checked("score", params, batch, batch_axes)
    return _score(log_prob, group, params, batch)


def score_norms(log_prob: LogProb, params: Tree, batch: Tree, *, batch_axes: Tree = 0) -> jax.Array:
    r"""Euclidean norms of per-example scores, without forming the scores.

    .. math::
        \|s_n\|^2 = \sum_{\text{leaves}} \sum_{t t'} (a_{nt} \cdot a_{nt'}) (g_{nt} \cdot g_{nt'})

    with what enters every linear use, :math:`a_{nt}`, and the cotangent of what leaves it,
    :math:`g_{nt}`, at positions t.

    Args:
      log_prob: function (params, batch) -> log-probabilities (N,).
      params: parameters, a pytree of real arrays.
      batch: pytree of arrays that hold N examples.
      batch_axes: along which axis of each batch leaf examples lie, as ``in_axes`` of ``jax.vmap``.

    Returns:
      (N,), in at least float32.

    Raises:
      ValueError: batch leaves disagree on N, or none holds examples.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> log_prob = lambda w, x: -0.5 * jnp.sum((x @ w) ** 2, axis=-1)
      >>> w, x = jnp.ones((2, 3)), jnp.array([[1.0, 2.0], [0.0, -1.0]])
      >>> scores = ng.score(log_prob, w, x).reshape(2, 6)
      >>> bool(jnp.allclose(ng.score_norms(log_prob, w, x), jnp.linalg.norm(scores, axis=1)))
      True

    Notes:
      About one gradient of the whole batch. Per-example clipping and importance sampling need no
      more.

    References:
      Goodfellow, 2015, Efficient per-example gradient computations.
    """
    group = _checked("score_norms", params, batch, batch_axes)
    return _norms(log_prob, group, params, batch)


def _checked(caller: str, params: Tree, batch: Tree, batch_axes: Tree) -> examples.Group:
    _boundary.check_params(caller, params)
    _boundary.check_batch(caller, batch)
    (group,) = examples.example_groups(caller, batch, batch_axes)
    if group.size is None:
        raise ValueError(
            f"{caller}: no leaf of the batch holds examples; give batch and batch_axes"
        )
    return group


def _rows(
    caller: str, log_prob: LogProb, group: examples.Group, params: Tree, batch: Tree
) -> Jacobian:
    values = log_prob(params, batch)
    if getattr(values, "ndim", None) != 1:
        raise ValueError(
            f"{caller}: log_prob(params, batch) must return one number for each example, an array"
            f" of shape (N,), got {jax.tree.map(jnp.shape, values)}"
        )
    examples.check_outputs(caller, values, (group,))
    ones = jnp.ones(values.shape, _trees.work_dtype(values))
    metric = output_metrics.row_metric(values, ones)
    return jacobian(caller, log_prob, params, batch, metric, (group,))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(log_prob: LogProb, group: examples.Group, params: Tree, batch: Tree) -> Tree:
    if not jax.tree.leaves(params):
        return params
    rows = _rows("score", log_prob, group, params, batch).matrix()
    each = jax.vmap(lambda row: _trees.unravel(row, params))(rows)
    return _trees.cast_like(each, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norms(log_prob: LogProb, group: examples.Group, params: Tree, batch: Tree) -> jax.Array:
    rows = _rows("score_norms", log_prob, group, params, batch)
    return jnp.sqrt(rows.squared_norms())

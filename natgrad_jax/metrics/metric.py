"""A Riemannian metric on parameters, as a record of functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from natgrad_jax import examples
from natgrad_jax.metrics.output_metrics import OutputMetric

Tree = Any


class Metric(NamedTuple):
    """A Riemannian metric on parameters, as functions of (params, batch).

    Build one with `exact_fisher`, `sampled_fisher`, `empirical_fisher`, `gauss_newton`, `hessian`
    or `euclidean`. It is hashable, holds no arrays and passes through `optax.inject_hyperparams`.

    Attributes:
      name: the public function that made it.
      outputs: (params, batch) -> the tree that is differentiated; the loss for `hessian`; None for
        `euclidean`.
      output_metric: (outputs, batch, key) -> OutputMetric; None where F is no pull-back.
      distance_metric: like `output_metric`, but exact where model and likelihood allow it, and
        never in need of a key: with it distances are measured.
      groups: batch -> groups of examples.
      needs_key: whether F is estimated from samples.
      definite: whether F is positive semi-definite by construction.
      independent: True where the user claims that output row n depends on example n alone; None
        where that is read off the model.
      divergence: (outputs p, outputs q, batch) -> mean KL[p || q]; None without a likelihood.
      weighted: whether rows have weights of their own.
      weights: batch -> these, before they are divided by their sum.
      robust: whether the loss of residuals is another than half their square.
    """

    name: str
    outputs: Callable[[Tree, Tree], Tree] | None
    output_metric: Callable[[Tree, Tree, jax.Array | None], OutputMetric] | None
    distance_metric: Callable[[Tree, Tree, jax.Array | None], OutputMetric] | None
    groups: Callable[[Tree], tuple[examples.Group, ...]] | None
    needs_key: bool = False
    definite: bool = True
    independent: bool | None = None
    divergence: Callable[[Tree, Tree, Tree], jax.Array] | None = None
    weighted: bool = False
    weights: Callable[[Tree], Tree] | None = None
    robust: bool = False

"""The Fisher information matrix from targets drawn from the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.metrics import mean_kl
from natgrad_jax.metrics import sampling
from natgrad_jax.metrics import shared
from natgrad_jax.metrics.metric import Metric
from natgrad_jax.metrics.output_metrics import OutputMetric

Tree = Any


def sampled_fisher(
    model: Callable[[Tree, Tree], Tree],
    likelihood: Likelihood,
    *,
    num_samples: int = 1,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The Fisher information matrix estimated from targets drawn from the model.

    .. math::
        F = \sum_r w_r \frac{1}{S} \sum_s J_r^T g_{rs} g_{rs}^T J_r, \qquad
        g_{rs} = \nabla_z \log p(y_{rs} | z_r), \quad y_{rs} \sim p(y | z_r)

    It has one row for each example and sample whatever the number of outputs, and its mean over
    keys is the exact Fisher matrix.

    Args:
      model: function (params, batch) -> outputs, leaves of shape (N, ...).
      likelihood: a :class:`Likelihood` that matches the outputs.
      num_samples: samples S for each row.
      weights: as for :func:`exact_fisher`.
      batch_axes: as for :func:`exact_fisher`.
      independent: as for :func:`exact_fisher`.

    Returns:
      A :class:`Metric` that needs a key.

    Raises:
      TypeError: ``likelihood`` is no :class:`Likelihood`.
      ValueError: ``num_samples`` is not a positive integer; in use, the likelihood does not give
        one log-probability a row, or draws targets of another shape.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.sampled_fisher(lambda p, x: x * p, ng.Normal(), num_samples=3)
      >>> fisher = ng.fisher_matrix(metric, jnp.ones((1,)), jnp.ones((4, 1)), key=jax.random.key(0))
      >>> gram = ng.gram_matrix(metric, jnp.ones((1,)), jnp.ones((4, 1)), key=jax.random.key(0))
      >>> gram.shape, bool(jnp.allclose(jnp.trace(gram), fisher[0, 0]))
      ((12, 12), True)

    Notes:
      With fewer rows than parameters most of a gradient lies outside the row space, where it is
      only divided by the damping: bound the step (``max_kl``) or use a larger damping. Targets are
      drawn for all rows at once. Likelihoods of this package draw each row with
      ``fold_in(key, row)``, so that padding does not change what the others draw;
      :class:`Likelihood` says what holds for one's own.

      Distances (``max_kl``, :func:`scale_to_kl`, the quadratic model, predicted reductions) are
      measured with the exact Fisher matrix where the likelihood has one. Where it has none, as a
      :func:`from_distribution` without a KL, a sampled one measures them: its samples are drawn
      with a fixed key of their own, so that they do not depend on those of the direction. (Measured
      with its own samples a direction would seem short: it is what those samples allow.)

    References:
      Kunstner, Balles and Hennig, 2019, Limitations of the empirical Fisher approximation.
    """
    model = shared.checked("sampled_fisher", "model", model, weights)
    shared.check_likelihood("sampled_fisher", likelihood)
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"sampled_fisher: num_samples must be a positive int, got {num_samples!r}")
    name, groups = "sampled_fisher", shared.groups_of("sampled_fisher", batch_axes)

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        scores = sampling.output_scores(likelihood, outputs, key, num_samples)
        factor_product, coefficients = sampling.score_columns(
            jax.tree.map(jnp.sqrt, row_weights), scores
        )

        def product(tangents: Tree) -> Tree:
            transposed = jax.linear_transpose(factor_product, coefficients)
            cotangents = _trees.cast(tangents, _trees.work_dtype(outputs))
            return factor_product(transposed(cotangents)[0])

        return OutputMetric(product, factor_product, coefficients, row_weights)

    exact = shared.exact_output_metric(name, likelihood, weights, groups)

    def distance_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        if sampling.has_exact_fisher(likelihood, outputs):
            return exact(outputs, batch, key)
        return output_metric(outputs, batch, sampling.distance_key())

    kl = mean_kl.divergence(name, likelihood, weights, groups)
    made = Metric(name, model, output_metric, distance_metric, groups, needs_key=True)
    return made._replace(
        independent=independent, divergence=kl, weighted=weights is not None, weights=weights
    )

"""The second moment of scores at the data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import examples
from natgrad_jax.metrics import output_metrics
from natgrad_jax.metrics import shared
from natgrad_jax.metrics.metric import Metric
from natgrad_jax.metrics.output_metrics import OutputMetric

Tree = Any


def empirical_fisher(
    log_prob: Callable[[Tree, Tree], jax.Array],
    *,
    centered: bool = False,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The second moment of scores at the data: the *empirical* Fisher matrix.

    .. math::
        F = \sum_n w_n s_n s_n^T, \qquad s_n = \nabla_\theta \log p(x_n | \theta),

    or, centered, :math:`F = \sum_n w_n (s_n - \bar s)(s_n - \bar s)^T` with the weighted mean score
    :math:`\bar s`. It differs from the Fisher matrix, whose targets are the model's own. It is not
    the outer product of the mean gradient either.

    Args:
      log_prob: function (params, batch) -> log-probabilities (N,).
      centered: subtract the mean score. With :math:`\log\psi` of a real wave function this is
        stochastic reconfiguration, the quantum geometric tensor (:math:`\log|\psi|^2` gives four
        times it).
      weights: as for :func:`exact_fisher`.
      batch_axes: as for :func:`exact_fisher`.
      independent: as for :func:`exact_fisher`.

    Returns:
      A :class:`Metric`.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> log_prob = lambda mean, x: -0.5 * (x - mean) ** 2
      >>> metric = ng.empirical_fisher(log_prob)
      >>> x = jnp.array([1.0, -2.0])
      >>> ng.fisher_matrix(metric, jnp.zeros(()), x).round(4).tolist()   # the mean squared score
      [[2.5]]

    Notes:
      Gradients of the mean log-probability lie in its row space, where `woodbury` is exact at any
      damping. One row for each example.

    References:
      Kunstner, Balles and Hennig, 2019; Sorella, 1998, Green function Monte Carlo with stochastic
      reconfiguration.
    """
    log_prob = shared.checked("empirical_fisher", "log_prob", log_prob, weights)
    name, groups = "empirical_fisher", shared.groups_of("empirical_fisher", batch_axes)

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        del key
        if len(jax.tree.leaves(outputs)) != 1 or jax.tree.leaves(outputs)[0].ndim != 1:
            shapes = jax.tree.map(lambda x: x.shape, outputs)
            raise ValueError(
                f"{name}: log_prob(params, batch) must return one number for each example, an array"
                f" of shape (N,), got {shapes}"
            )
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        plain = output_metrics.row_metric(outputs, row_weights)
        if not centered:
            return plain
        (weight,) = jax.tree.leaves(row_weights)

        def product(tangents: Tree) -> Tree:
            mean = lambda v: jnp.dot(weight, v.astype(weight.dtype), precision="highest")
            return jax.tree.map(lambda v: weight * (v.astype(weight.dtype) - mean(v)), tangents)

        return plain._replace(product=product, removed=jnp.sqrt(weight))

    made = Metric(name, log_prob, output_metric, output_metric, groups, independent=independent)
    return made._replace(weighted=weights is not None, weights=weights)

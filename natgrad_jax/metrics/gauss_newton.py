"""The Gauss-Newton matrix of a least-squares loss."""

from collections.abc import Callable
from typing import Any

import jax

from natgrad_jax import examples
from natgrad_jax.metrics import output_metrics
from natgrad_jax.metrics import robust
from natgrad_jax.metrics import shared
from natgrad_jax.metrics.metric import Metric
from natgrad_jax.metrics.output_metrics import OutputMetric

Tree = Any


def gauss_newton(
    residual: Callable[[Tree, Tree], Tree],
    *,
    weights: Callable[[Tree], Tree] | None = None,
    loss: str = "linear",
    scale: jax.typing.ArrayLike = 1.0,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The Gauss-Newton matrix of a least-squares loss, or of a robust one.

    .. math::
        F = \sum_i \frac{1}{N_i} \sum_n J_{in}^T J_{in}, \qquad
        J_{in} = \partial r_{in} / \partial\theta,

    the metric of the loss :math:`\sum_i \frac{1}{2 N_i} \sum_n \|r_{in}\|^2` over residual
    leaves i. With another ``loss`` every single residual r has the weight
    :math:`\rho'(r^2 / c^2)`, for :func:`robust_loss`.

    Args:
      residual: function (params, batch) -> tree of residuals, leaves of shape (N_i, ...).
      weights: as for :func:`exact_fisher`; with several groups, the residual's tree of weights.
      loss: "linear", "soft_l1", "huber" or "cauchy", defined and named as in scipy's
        ``least_squares``. The second-order term :math:`2 \rho''(z) r r^T` of the loss is left out:
        it is negative, and F stays positive semi-definite (iteratively reweighted least squares).
        The objective and its gradient are those of :func:`robust_loss`.
      scale: c, the size of a residual from which on it counts as an outlier (``f_scale``).
      batch_axes: as for :func:`exact_fisher`. Here mapped batch leaves may come in several sizes
        (interior and boundary points): each residual leaf then has one of these sizes.
      independent: as for :func:`exact_fisher`, and checked likewise, at eager calls and by
        :func:`verify`.

    Returns:
      A :class:`Metric`.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> residual = lambda p, batch: {"pde": p[0] * batch["x"], "bc": p[1] * batch["y"]}
      >>> metric = ng.gauss_newton(residual)
      >>> batch = {"x": jnp.ones((4,)), "y": 2 * jnp.ones((3,))}
      >>> ng.fisher_diagonal(metric, jnp.ones((2,)), batch).round(4).tolist()
      [1.0, 4.0]

    References:
      Mueller and Zeinhofer, 2023, Achieving high accuracy with PINNs via energy natural gradients;
      Triggs, McLauchlan, Hartley and Fitzgibbon, 2000, Bundle adjustment (robust losses).
    """
    residual = shared.checked("gauss_newton", "residual", residual, weights)
    robust.check("gauss_newton", loss, scale)
    name, groups = "gauss_newton", shared.groups_of("gauss_newton", batch_axes, several=True)

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        del key
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        if loss == "linear":
            return output_metrics.row_metric(outputs, row_weights)
        return robust.output_metric(loss, scale, outputs, row_weights)

    made = Metric(name, residual, output_metric, output_metric, groups, independent=independent)
    made = made._replace(weighted=weights is not None, weights=weights)
    return made._replace(robust=loss != "linear")

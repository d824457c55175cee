"""The Hessian of a loss."""

from collections.abc import Callable
from typing import Any

import jax

from natgrad_jax.metrics import shared
from natgrad_jax.metrics.metric import Metric

Tree = Any


def hessian(loss: Callable[[Tree, Tree], jax.Array]) -> Metric:
    r"""The Hessian of a loss, which makes the natural gradient Newton's method.

    Args:
      loss: function (params, batch) -> scalar.

    Returns:
      A :class:`Metric`. It may be indefinite: eigenvalues keep their sign, and `cg` stops at
      negative curvature. It has no rows: solvers that need them raise.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.hessian(lambda p, batch: p[0] ** 2 - 3 * p[1] ** 2)
      >>> ng.fisher_diagonal(metric, jnp.ones((2,)), None).tolist()
      [2.0, -6.0]
    """
    loss = shared.checked("hessian", "loss", loss, None)
    return Metric("hessian", loss, None, None, None, definite=False)

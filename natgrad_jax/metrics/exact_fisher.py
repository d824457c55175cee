"""The Fisher information matrix, exactly."""

from collections.abc import Callable
from typing import Any

import jax

from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.metrics import mean_kl
from natgrad_jax.metrics import shared
from natgrad_jax.metrics.metric import Metric

Tree = Any


def exact_fisher(
    model: Callable[[Tree, Tree], Tree],
    likelihood: Likelihood,
    *,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The Fisher information matrix, its expectation over targets taken exactly.

    .. math::
        F = \sum_r w_r J_r^T M_r J_r, \qquad
        M_r = \mathbb{E}_{y \sim p(y | z_r)}[\nabla_z \log p \, \nabla_z \log p^T]

    with outputs :math:`z = f(\theta)` of the model, :math:`J_r = \partial z_r / \partial\theta` and
    row weights :math:`w_r`, by default 1 / (number of rows): F matches a loss that is the *mean*
    over examples of the negative log-likelihood. In natural parameters of an exponential family
    this is the generalised Gauss-Newton matrix.

    Args:
      model: function (params, batch) -> outputs, leaves of shape (N, ...) or (k N, ...) when each
        of N examples gives k rows, those of one example standing together.
      likelihood: a :class:`Likelihood` that matches the outputs.
      weights: None, or a function of the batch that gives one non-negative number for each row,
        (k N,), or each example, (N,). They are divided by their sum: only their ratios matter.
        Zero masks padding whose outputs are finite.
      batch_axes: along which axis of each batch leaf examples lie, as ``in_axes`` of ``jax.vmap``.
      independent: whether examples are independent is read off the model. Where the reader cannot
        show it, rows come from the whole batch, exactly and expensively, with a warning; True
        claims it instead: rows then are those of each example evaluated by itself. The claim is
        checked at the first and the last example: where a function of this package is called
        eagerly, once for each metric and shape of batch, with a warning where it is false, and by
        :func:`verify`; not inside `jax.jit`.

    Returns:
      A :class:`Metric`.

    Raises:
      TypeError: ``likelihood`` is no :class:`Likelihood`, or has no exact Fisher matrix.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal(scale=0.5))
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> fisher = ng.fisher_matrix(metric, jnp.zeros((2,)), x)
      >>> bool(jnp.allclose(fisher, x.T @ x / 2 / 0.5**2))
      True

    Notes:
      Solvers that work on rows use one row for each example *and output column*. With many output
      columns take :func:`cg`, or :func:`sampled_fisher`. :func:`explain` tells how the rows of each
      parameter are held, :func:`verify` whether they are right.

    References:
      Amari, 1998, Natural gradient works efficiently in learning; Martens, 2020, New insights and
      perspectives on the natural gradient method.
    """
    model = shared.checked("exact_fisher", "model", model, weights)
    shared.check_likelihood("exact_fisher", likelihood)
    if (
        type(likelihood).fisher_product is Likelihood.fisher_product
        and type(likelihood).kl is Likelihood.kl
    ):
        raise TypeError(
            f"exact_fisher: the exact Fisher matrix of {type(likelihood).__name__} needs its `kl`;"
            " implement kl(outputs_p, outputs_q), or use sampled_fisher"
        )
    name, groups = "exact_fisher", shared.groups_of("exact_fisher", batch_axes)
    exact = shared.exact_output_metric(name, likelihood, weights, groups)
    kl = mean_kl.divergence(name, likelihood, weights, groups)
    made = Metric(name, model, exact, exact, groups, independent=independent, divergence=kl)
    return made._replace(weighted=weights is not None, weights=weights)

"""Natural gradient descent, ready for `optax.apply_updates`."""

from typing import Any

import jax
import optax

from natgrad_jax import _boundary
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.transforms import _call
from natgrad_jax.transforms.clip_by_kl import clip_by_kl
from natgrad_jax.transforms.scale_by_natural_gradient import scale_by_natural_gradient
from natgrad_jax.transforms.scale_to_kl import kl_transformation

Tree = Any

#: With a solver that approximates F a step moves by so many nats per row at most, unless told
#: otherwise.
APPROXIMATE_MAX_KL = 0.1

#: That default measures steps at so many examples of a batch: all of them would cost a gradient.
MEASURED_EXAMPLES = 128


# No `from __future__ import annotations` here: optax recognises a learning rate by its annotation.
def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    metric: Metric,
    *,
    solver: Solver | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_scale: Tree | str | None = None,
    momentum: optax.ScalarOrSchedule | None = None,
    max_kl: jax.typing.ArrayLike | str | None = "auto",
    weight_decay: jax.typing.ArrayLike | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent.

    .. math::
        \theta_{k+1} = \theta_k - \eta \left[ (F + \lambda I)^{-1} g_k + w \theta_k \right]

    with learning rate :math:`\eta`, metric F, damping :math:`\lambda` and weight decay w: a chain
    of :func:`scale_by_natural_gradient` (with momentum), ``optax.add_decayed_weights``,
    ``optax.scale_by_learning_rate`` and :func:`clip_by_kl`, so that the limit ``max_kl`` holds for
    the step that is applied.

    Args:
      learning_rate: :math:`\eta`, a number or a schedule.
      metric: the metric F, such as ``exact_fisher(model, likelihood)``. It is a mean over rows, to
        match a loss that is the mean over examples of the negative log-likelihood.
      solver: as for :func:`scale_by_natural_gradient`; None chooses an exact one.
      damping: :math:`\lambda`, in units of F; a number or a schedule.
      damping_scale: s of a damping :math:`\lambda\, \mathrm{diag}(s)`, as for
        :func:`scale_by_natural_gradient`: a tree prefix of the parameters with positive numbers,
        or "diagonal" for the diagonal of F; None for one.
      momentum: SPRING momentum, a number or a schedule; None for none.
      max_kl: the largest KL divergence of a step, in nats per row; None for no limit. A number:
        for a schedule use ``optax.inject_hyperparams``. By default, "auto", there is none with an
        exact solver, and 0.1 with one that approximates F (`kfac`, `ekfac`, `diagonal`,
        `block_diagonal`) of a model with a likelihood (`exact_fisher`, `sampled_fisher`): with
        small damping the inverse of an approximation can be far too long along directions that it
        does not see, and training then diverges within a few steps. The default measures steps at
        128 examples of the batch, a number at all of them.
      weight_decay: decoupled weight decay w; None for none. A number likewise.
      key: seed or key of the samples of a sampling metric.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. ``update(grads, state, params, *, batch)`` needs
      the parameters and the keyword ``batch``. The first element of the state is a
      :class:`ScaleByNaturalGradientState`, its ``info`` holds diagnostics.

    Raises:
      TypeError, ValueError: as for :func:`scale_by_natural_gradient` and :func:`clip_by_kl`.

    Examples:
      Logistic regression; with learning rate 1 and damping 0 the step is iteratively reweighted
      least squares, and the gradient vanishes within a few:

      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> x = jnp.array([[1.0, -1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> batch, bernoulli = (x, jnp.array([0.0, 1.0, 0.0, 1.0])), ng.Bernoulli()
      >>> model = lambda p, batch: batch[0] @ p
      >>> loss = lambda p: -jnp.mean(bernoulli.log_prob(model(p, batch), batch[1]))
      >>> tx = ng.natural_gradient(1.0, ng.exact_fisher(model, bernoulli), damping=0.0)
      >>> params = jnp.zeros((2,))
      >>> state = tx.init(params)
      >>> for _ in range(6):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params, batch=batch)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.all(jnp.abs(jax.grad(loss)(params)) < 1e-5))
      True

    References:
      Amari, 1998, Natural gradient works efficiently in learning.
    """
    for label, number in (("max_kl", max_kl), ("weight_decay", weight_decay)):
        if callable(number):
            _boundary.check_number("natural_gradient", label, number)
    parts = [
        scale_by_natural_gradient(
            metric,
            solver=solver,
            damping=damping,
            damping_scale=damping_scale,
            momentum=momentum,
            key=key,
        )
    ]
    if weight_decay is not None:
        parts.append(_call.keep_dtypes(optax.add_decayed_weights(weight_decay)))
    parts.append(_call.keep_dtypes(optax.scale_by_learning_rate(learning_rate)))
    limit = _limit(max_kl, metric, solver)
    if limit is not None:
        parts.append(limit)
    return _call.named("natural_gradient", optax.chain(*parts))


def _limit(
    max_kl: jax.typing.ArrayLike | str | None, metric: Metric, solver: Solver | None
) -> optax.GradientTransformationExtraArgs | None:
    """What bounds the step; the default needs a likelihood, which makes lengths nats."""
    if max_kl is None:
        return None
    if not (isinstance(max_kl, str) and max_kl == "auto"):
        return clip_by_kl(metric, max_kl)  # type: ignore[arg-type]  # it refuses any other word
    if solver is None or not solver.approximates or metric.divergence is None:
        return None
    kl, some = APPROXIMATE_MAX_KL, MEASURED_EXAMPLES
    return kl_transformation("clip_by_kl", metric, kl, at_most=True, examples=some)

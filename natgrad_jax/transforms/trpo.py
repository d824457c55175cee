"""Trust region policy optimization: a natural gradient step of bounded KL divergence."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import cg
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.transforms import _call
from natgrad_jax.transforms.scale_by_kl_line_search import check_search
from natgrad_jax.transforms.scale_by_kl_line_search import measure
from natgrad_jax.transforms.scale_by_kl_line_search import scale_by_kl_line_search
from natgrad_jax.transforms.scale_by_natural_gradient import scale_by_natural_gradient
from natgrad_jax.transforms.scale_to_kl import scale_to_kl

Tree = Any


def trpo(
    model: Callable[[Tree, Tree], Tree] | Metric,
    likelihood: Likelihood | None = None,
    max_kl: jax.typing.ArrayLike = 0.01,
    *,
    solver: Solver | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    shrink: jax.typing.ArrayLike = 0.7,
    max_shrinks: jax.typing.ArrayLike = 15,
    key: int | jax.Array = 0,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trust region policy optimization.

    .. math::
        d = (F + \lambda I)^{-1} g, \qquad
        u = -\sqrt{\frac{2 c}{d^T F d}}\, d, \qquad
        \theta \leftarrow \theta + s^k u

    for the gradient g of the objective, the Fisher matrix F of the policy, damping
    :math:`\lambda` and radius c; k is the first number of shortenings by the factor s that keeps
    the true mean KL divergence within c and lowers the objective. A chain of
    :func:`scale_by_natural_gradient`, :func:`scale_to_kl`, ``optax.scale(-1.0)`` and
    :func:`scale_by_kl_line_search`. There is no learning rate.

    Args:
      model: the policy, a function (params, batch) -> outputs; or a metric from `exact_fisher` or
        `sampled_fisher`, which may have weights: 0 masks states after the end of an episode.
      likelihood: `Categorical()` for discrete actions, `DiagonalNormal()` for continuous ones, or
        any other with a KL; None beside a metric.
      max_kl: the radius c > 0, in nats per row (state).
      solver: None for conjugate gradients, 20 iterations at most.
      damping: :math:`\lambda`, in units of F; a number or a schedule.
      shrink: the factor s in (0, 1).
      max_shrinks: how often the step may be shortened before it is given up.
      key: seed or key of the samples of a sampling metric.
      has_aux: whether ``value_fn`` returns a pair of the objective and auxiliary output.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(grads, state, params, *, batch,
      value_fn, value=None)``. ``value_fn`` is what is minimised: of a policy the surrogate
      -mean(exp(log p - log p_old) advantage), with the gradient of the policy gradient; where the
      metric has weights, the mean weighted alike. The last element of the state has the line
      search's ``info``.

    Raises:
      TypeError, ValueError: as for the four parts.

    Examples:
      A bandit with three arms: the best one is found, and no update moves farther than the radius:

      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> rewards, one_state = jnp.array([0.0, 1.0, 0.5]), jnp.ones((1, 1))
      >>> policy = lambda p, batch: batch * p
      >>> loss = lambda p, batch: -jnp.sum(jax.nn.softmax(policy(p, batch)) * rewards)
      >>> tx, p = ng.trpo(policy, ng.Categorical(), max_kl=0.05), jnp.zeros((3,))
      >>> state = tx.init(p)
      >>> for _ in range(20):
      ...     grads = jax.grad(loss)(p, one_state)
      ...     updates, state = tx.update(grads, state, p, batch=one_state, value_fn=loss)
      ...     moved = optax.apply_updates(p, updates)
      ...     kl = ng.kl_divergence(policy, ng.Categorical(), p, moved, one_state)
      ...     p, inside = moved, bool(kl <= 0.05)
      ...     assert inside
      >>> bool(jax.nn.softmax(p)[1] > 0.95)
      True

      A value head beside the policy has no part in its distribution, so that F is zero there and a
      step in one tree with it goes wrong (a warning names such parameters). Give it an optimizer of
      its own:

      >>> net = lambda p, x: (x @ p["policy"], x @ p["value"])
      >>> tx = optax.partition(
      ...     {"policy": ng.trpo(lambda p, x: net(p, x)[0], ng.Categorical(), max_kl=0.01),
      ...      "value": optax.adam(1e-2)},
      ...     {"policy": "policy", "value": "value"})
      >>> p, x = {"policy": jnp.zeros((2, 3)), "value": jnp.zeros((2, 1))}, jnp.eye(2)
      >>> loss = lambda p, x: (-jnp.mean(jax.nn.softmax(net(p, x)[0])[:, 0])
      ...                      + jnp.mean((net(p, x)[1] - 1.0) ** 2))
      >>> updates, _ = tx.update(
      ...     jax.grad(loss)(p, x), tx.init(p), p, batch=x, value_fn=loss, full_params=p)
      >>> kl = ng.kl_divergence(lambda p, x: net(p, x)[0], ng.Categorical(), p,
      ...                       optax.apply_updates(p, updates), x)
      >>> bool(0.005 < kl <= 0.01)
      True

    Notes:
      The length of a step does not depend on the size of the gradient: where that is noise, so is
      a whole step. A gradient of exactly zero gives a step of exactly zero, not accepted. Wrap the
      step in `jax.jit`: called eagerly, the line search is compiled anew at every call. Under
      `optax.inject_hyperparams` name ``static_args=("model",)``, which it would take for a
      schedule.

    References:
      Schulman, Levine, Moritz, Jordan and Abbeel, 2015, Trust region policy optimization.
    """
    name = "trpo"
    metric = measure(name, model, likelihood)
    check_search(name, max_kl, shrink, max_shrinks)
    solve = cg(max_iterations=20) if solver is None else solver
    steps = optax.chain(
        scale_by_natural_gradient(metric, solver=solve, damping=damping, key=key),
        scale_to_kl(metric, max_kl),
        optax.scale(-1.0),
        scale_by_kl_line_search(
            metric, max_kl=max_kl, shrink=shrink, max_shrinks=max_shrinks, has_aux=has_aux
        ),
    )
    return _call.named(name, steps)

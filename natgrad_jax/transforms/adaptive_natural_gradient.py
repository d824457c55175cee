"""Natural gradient descent with nothing to tune."""

from typing import Any

import jax
import optax

from natgrad_jax import _boundary
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.transforms import _damped
from natgrad_jax.transforms._controlled import controlled
from natgrad_jax.transforms.scale_by_natural_gradient import scale_by_natural_gradient
from natgrad_jax.transforms.scale_by_quadratic_model import scale_by_quadratic_model

Tree = Any

#: Enough for the three inner products of the quadratic model, beside an approximate direction.
_MODEL_EXAMPLES = 256

#: The lowest damping of an approximate direction beside the first.
_LOWEST = 0.1


def adaptive_natural_gradient(
    metric: Metric,
    *,
    solver: Solver | None = None,
    initial_damping: jax.typing.ArrayLike = 1e-2,
    factor: jax.typing.ArrayLike = 2.0,
    every: jax.typing.ArrayLike = 1,
    min_damping: jax.typing.ArrayLike | None = None,
    max_damping: jax.typing.ArrayLike = 1e8,
    reject: jax.typing.ArrayLike = True,
    model_examples: int | None = None,
    key: int | jax.Array = 0,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent that finds its learning rate, momentum and damping by itself.

    .. math::
        d = (F + \lambda I)^{-1} g, \qquad
        \delta = \arg\min_{\delta = -\alpha d + \mu \delta_0}
        g^T \delta + \tfrac12 \delta^T (F + \lambda I) \delta

    with :func:`scale_by_natural_gradient`, :func:`scale_by_quadratic_model` and
    :func:`levenberg_marquardt`: learning rate :math:`\alpha` and momentum :math:`\mu` minimise the
    local quadratic model at every step, the damping :math:`\lambda` follows how well that model
    predicts the objective, and a step that makes the objective of its batch worse is not taken.

    Args:
      metric: the metric F. The quadratic model takes the exact Fisher matrix of its model and
        likelihood where it has them.
      solver: as for :func:`scale_by_natural_gradient`; None chooses an exact one.
      initial_damping: of the first step, in units of F.
      factor: as for :func:`levenberg_marquardt`, as are all that follow.
      every: steps from one change of the damping to the next.
      min_damping: the lowest damping; None for 10 eps of the working dtype, and for a tenth of the
        first with a solver that approximates F (see ``model_examples``): the quadratic model, which
        is exact, lets the damping fall until the approximation is of no use.
      max_damping: the largest damping.
      reject: whether steps that make the objective worse are replaced by zero.
      model_examples: of how many examples the quadratic model is made, as ``examples`` of
        :func:`scale_by_quadratic_model`. None for all with a solver that is exact, and for 256 with
        one that approximates F (:func:`kfac`, :func:`ekfac`, :func:`diagonal`,
        :func:`block_diagonal`): its direction is off by more than such a sample.
      key: seed or key of the samples of a sampling metric.
      has_aux: whether ``value_fn`` returns a pair of the objective and auxiliary output.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(grads, state, params, *, batch,
      value_fn, value=None)``; ``value_fn`` is the objective, a function of (params, batch) or of
      params alone, and ``grads`` its gradient. The state is a :class:`LevenbergMarquardtState`
      whose ``info`` tells damping, ratio and rejection.

    Raises:
      TypeError, ValueError: as for the three parts.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> x = jax.random.normal(jax.random.key(0), (50, 3))
      >>> y = (x @ jnp.array([2.0, -1.0, 0.5]) > 0).astype(jnp.float32)
      >>> model = lambda p, batch: jnp.tanh(batch[0] @ p["w"]) @ p["v"]
      >>> bernoulli = ng.Bernoulli()
      >>> loss = lambda p, batch: -jnp.mean(bernoulli.log_prob(model(p, batch), batch[1]))
      >>> tx = ng.adaptive_natural_gradient(ng.exact_fisher(model, bernoulli))
      >>> params = {"w": jnp.eye(3), "v": jnp.ones((3,))}
      >>> @jax.jit
      ... def step(params, state, batch):
      ...     value, grads = jax.value_and_grad(loss)(params, batch)
      ...     updates, state = tx.update(
      ...         grads, state, params, batch=batch, value=value, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for _ in range(15):
      ...     params, state = step(params, state, (x, y))
      >>> bool(loss(params, (x, y)) < 0.05)
      True

    Notes:
      Beside the solve, two Jacobian products and one evaluation of the objective a step. With
      ``kfac`` let factors and inverses rest for several steps. The model of a part of the batch
      follows Martens and Grosse, who take a quarter.

    References:
      Martens and Grosse, 2015, Optimizing neural networks with Kronecker-factored approximate
      curvature, section 6.
    """
    name = "adaptive_natural_gradient"
    _boundary.check_metric(name, metric)
    _boundary.check_count(name, "model_examples", model_examples, optional=True)
    settings = _damped.settings(
        name, initial_damping, factor, every, min_damping, max_damping, reject
    )
    if isinstance(solver, Solver) and solver.approximates:
        model_examples = _MODEL_EXAMPLES if model_examples is None else model_examples
        lowest = _LOWEST * initial_damping if min_damping is None else min_damping
        settings = settings._replace(lowest=lowest)
    inner = optax.chain(
        scale_by_natural_gradient(metric, solver=solver, key=key),
        scale_by_quadratic_model(metric, examples=model_examples),
        optax.scale(-1.0),
    )
    predicted_decrease = lambda state: state[1].info.predicted
    return controlled(
        name, inner, metric, settings, has_aux=has_aux, predicted_decrease=predicted_decrease
    )

"""Learning rate and momentum that minimise the local quadratic model of the objective."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _boundary
from natgrad_jax import _records
from natgrad_jax import _sharding
from natgrad_jax import _thinning
from natgrad_jax import _trees
from natgrad_jax.curvature import inner_products
from natgrad_jax.metrics import Metric
from natgrad_jax.transforms import _call
from natgrad_jax.transforms import _told

Tree = Any


class QuadraticModelInfo(NamedTuple):
    """Diagnostics of the last update.

    Attributes:
      rate: the learning rate alpha. float32.
      momentum: mu, 0 where the previous step adds nothing. float32.
      predicted: by how much the undamped model says that the step lowers the objective, in the
        working dtype.
    """

    rate: jax.Array
    momentum: jax.Array
    predicted: jax.Array

    def __repr__(self) -> str:
        return _records.line(self)


class ScaleByQuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    Attributes:
      count: updates made so far. int32.
      params: the parameters last seen.
      info: diagnostics of the last update.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    params: Tree
    info: QuadraticModelInfo


def scale_by_quadratic_model(
    metric: Metric, *, damping: optax.ScalarOrSchedule = 0.0, examples: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales a direction and adds momentum so that the local quadratic model is least.

    .. math::
        \min_{\alpha, \mu}\; g^T \delta + \tfrac12 \delta^T (F + \lambda I) \delta, \qquad
        \delta = -\alpha d + \mu \delta_0

    for the gradient g, the incoming direction d (of the gradient's sign), the previous step
    :math:`\delta_0` and the exact Fisher matrix F of the metric's model and likelihood where it has
    them, the metric itself otherwise. What comes out has the gradient's sign and the rate in it:
    :math:`-\delta`; let ``optax.scale(-1.0)`` follow. The previous step is read as the parameters
    minus those last seen, so that it is what was applied, whatever followed in the chain.

    Args:
      metric: the metric F.
      damping: :math:`\lambda`, a number or a schedule. ``update`` also takes ``damping=``, which
        goes before: :func:`levenberg_marquardt` drives it.
      examples: of how many examples of the batch F is taken, in places drawn once and for all;
        None for all. All are kept by metrics with weights, by :func:`hessian`, by residuals in
        several groups and by models that depend on the size of their batch (batch normalisation in
        training mode).

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(direction, state, params, *, batch,
      grad)``; ``grad`` is the gradient of the objective at the parameters. Where the model has no
      minimum along d (d^T (F + damping I) d <= 0), d is left alone. ``info`` in the state tells
      rate, momentum and the decrease predicted.

    Raises:
      TypeError: ``metric`` is no metric; ``grad`` is missing in `update`.
      ValueError: ``examples`` is no positive int. Under ``inject_hyperparams`` name it in
        ``static_args``.

    Examples:
      On a quadratic objective, direction and momentum of any length make conjugate gradients: two
      steps find the minimum of two parameters.

      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> scales = jnp.array([1.0, 10.0])
      >>> metric = ng.gauss_newton(lambda p, batch: (scales * p - 1.0)[None])
      >>> loss = lambda p: 0.5 * jnp.sum((scales * p - 1.0) ** 2)
      >>> tx = optax.chain(ng.scale_by_quadratic_model(metric), optax.scale(-1.0))
      >>> p = jnp.zeros((2,))
      >>> state = tx.init(p)
      >>> for _ in range(2):
      ...     grad = jax.grad(loss)(p)
      ...     updates, state = tx.update(grad, state, p, batch=None, grad=grad)
      ...     p = optax.apply_updates(p, updates)
      >>> bool(loss(p) < 1e-9)
      True

    Notes:
      Two Jacobian products a step, with no backward pass: more than a gradient's cost at all
      examples, a third of it at a quarter of them.

    References:
      Martens and Grosse, 2015, Optimizing neural networks with Kronecker-factored approximate
      curvature, sections 6.4 and 7.
    """
    name = "scale_by_quadratic_model"
    _boundary.check_metric(name, metric)
    _boundary.check_number(name, "damping", damping, schedule=True)
    _boundary.check_count(name, "examples", examples, optional=True)
    default_damping = damping

    def init_fn(params: Tree) -> ScaleByQuadraticModelState:
        _call.check_init(name, params)
        count = jnp.zeros((), jnp.int32)
        # Of its own, so that a step that donates its state does not take the parameters along.
        seen = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
        return _sharding.place_beside(
            ScaleByQuadraticModelState(count, seen, _empty(params)), params
        )

    def update_fn(
        updates: Tree,
        state: ScaleByQuadraticModelState,
        params: Tree | None = None,
        *misplaced: Any,
        batch: Tree = _call.MISSING,
        grad: Tree | None = None,
        damping: jax.typing.ArrayLike | None = None,
        full_params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, ScaleByQuadraticModelState]:
        value_fn = extra_args.get("value_fn")
        _call.check(name, updates, params, batch, misplaced)
        if grad is None:
            raise TypeError(
                f"{name}: update() needs the keyword argument `grad`, the gradient of the"
                " objective: update(direction, state, params, batch=batch, grad=grad)"
            )
        grad = _boundary.visible(grad, params)
        _boundary.check_like_params(f"{name}: update()", "grad", grad, params)
        full_params = _told.hidden(params, full_params, value_fn)
        damping = _told.merged(_told.Told(damping), _told.told(value_fn)).damping
        damping = default_damping if damping is None else damping
        damping = damping(state.count) if callable(damping) else damping
        core = functools.partial(_scaled, metric, examples)
        operands = (updates, grad, params, batch, damping, state, full_params)
        step, new = _sharding.run(core, operands, (updates, state))
        return _sharding.keep(step, updates), _call.keep_types(new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scaled(
    metric: Metric,
    most: int | None,
    direction: Tree,
    grad: Tree,
    params: Tree,
    batch: Tree,
    damping: jax.Array,
    state: ScaleByQuadraticModelState,
    full_params: Tree | None,
) -> tuple[Tree, ScaleByQuadraticModelState]:
    if not jax.tree.leaves(params):
        return direction, state
    metric = _boundary.fill_masked(metric, params, full_params)
    dtype = _trees.work_dtype(params)
    # Of order one each, so that squares neither overflow nor underflow.
    unit = lambda tree: _trees.normalised(_trees.cast(tree, dtype), dtype)
    d, d_size = unit(direction)
    previous, previous_size = unit(_moved(params, state))
    g, g_size = unit(grad)
    basis = [jax.tree.map(jnp.negative, d), previous]
    batch = _thinning.thinned(metric, params, batch, most)
    fisher = inner_products(metric, params, batch, basis)
    lengths = jnp.stack([jnp.stack([_trees.vdot(x, y, dtype) for y in basis]) for x in basis])
    slopes = jnp.stack([_trees.vdot(g, x, dtype) for x in basis])
    # In units of the gradient.
    best = _minimiser(fisher + jnp.asarray(damping).astype(dtype) * lengths, -slopes)
    alone = jnp.stack([d_size / g_size, jnp.zeros((), dtype)])
    best = jnp.where(jnp.isfinite(best[0]), best, alone)
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    predicted = -(dot(slopes, best) + 0.5 * dot(best, dot(fisher, best))) * g_size * g_size
    rate, momentum = best[0] * g_size, best[1] * g_size
    step = jax.tree.map(lambda x, y: rate * x - momentum * y, d, previous)
    info = QuadraticModelInfo(
        (rate / d_size).astype(jnp.float32),
        (momentum / previous_size).astype(jnp.float32),
        predicted,
    )
    new = ScaleByQuadraticModelState(optax.safe_increment(state.count), params, info)
    return _trees.cast_like(step, direction), new


def _moved(params: Tree, state: ScaleByQuadraticModelState) -> Tree:
    """The previous step, zero at first."""
    first = state.count == 0
    return jax.tree.map(
        lambda p, seen: jnp.where(first, jnp.zeros_like(p), p - seen), params, state.params
    )


def _minimiser(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    """The minimum of x^T A x / 2 - b^T x for A (2, 2); NaN for A_00 <= 0.

    The second vector counts only where it adds curvature of its own above rounding.
    """
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[1, 1]
    single = jnp.where(a > 0, rhs[0] / jnp.where(a > 0, a, 1), jnp.nan)
    rest = c - b * b / jnp.where(a > 0, a, 1)
    usable = (a > 0) & (rest > 100 * jnp.finfo(matrix.dtype).eps * jnp.abs(c))
    second = jnp.where(usable, (rhs[1] - b * single) / jnp.where(usable, rest, 1), 0)
    return jnp.stack([single - jnp.where(usable, b * second / jnp.where(a > 0, a, 1), 0), second])


def _empty(params: Tree) -> QuadraticModelInfo:
    real = lambda: jnp.zeros((), jnp.float32)
    return QuadraticModelInfo(real(), real(), jnp.zeros((), _trees.work_dtype(params)))

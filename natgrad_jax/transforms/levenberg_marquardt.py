"""Damping that follows how well the quadratic model foretells the objective."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _acceleration
from natgrad_jax import _boundary
from natgrad_jax import _records
from natgrad_jax import _sharding
from natgrad_jax import _trees
from natgrad_jax.metrics import Metric
from natgrad_jax.transforms import _call
from natgrad_jax.transforms import _damped
from natgrad_jax.transforms import _objective
from natgrad_jax.transforms import _reduction
from natgrad_jax.transforms import _told

Tree = Any


class LevenbergMarquardtInfo(NamedTuple):
    """Diagnostics of the last step. float32.

    Attributes:
      damping: the damping that the step was made with.
      ratio: actual over predicted decrease; -infinity where one is not finite or none is predicted.
      decrease: by how much the step proposed lowers the objective at this batch.
      predicted: by how much the quadratic model says so.
      rejected: whether the step was replaced by zero.
    """

    damping: jax.Array
    ratio: jax.Array
    decrease: jax.Array
    predicted: jax.Array
    rejected: jax.Array

    def __repr__(self) -> str:
        return _records.line(self)


class LevenbergMarquardtState(NamedTuple):
    """State of :func:`levenberg_marquardt`.

    Attributes:
      count: updates made so far. int32.
      damping: that of the next step, in the working dtype.
      rejected: whether the last step was rejected.
      inner: the state of the inner transformation.
      info: diagnostics of the last step.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    damping: jax.Array
    rejected: jax.Array
    inner: Any
    info: LevenbergMarquardtInfo


def levenberg_marquardt(
    inner: optax.GradientTransformation,
    metric: Metric,
    *,
    initial_damping: jax.typing.ArrayLike = 1e-2,
    factor: jax.typing.ArrayLike = 2.0,
    every: jax.typing.ArrayLike = 1,
    min_damping: jax.typing.ArrayLike | None = None,
    max_damping: jax.typing.ArrayLike = 1e8,
    reject: jax.typing.ArrayLike = True,
    geodesic_acceleration: bool = False,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Drives the damping of an inner transformation, and rejects steps that make things worse.

    .. math::
        \rho = \frac{L(\theta) - L(\theta + u)}{-(g^T u + \tfrac12 u^T F u)}, \qquad
        \lambda \leftarrow \begin{cases}
            \lambda / \omega & \rho > \tfrac34 \\
            \lambda \omega & \rho < \tfrac14
        \end{cases}

    for the step u of the inner transformation with damping :math:`\lambda`, the objective L at the
    same batch, its gradient g and the exact Fisher matrix F of the metric's model and likelihood
    where it has them (the metric itself otherwise). A step with L(theta + u) > L(theta), or not
    finite, is rejected: it becomes exactly zero, the inner state goes on, the damping grows, and
    `kfac` inverts all of its factors anew on the next step. Place it last in a chain.

    Args:
      inner: gives a step ready for ``apply_updates``, from a gradient: :func:`natural_gradient`, or
        a chain with :func:`scale_by_natural_gradient` and a rate.
      metric: the metric of the quadratic model, as a rule that of ``inner``.
      initial_damping: :math:`\lambda` of the first step, in units of F.
      factor: :math:`\omega > 1`.
      every: steps from one change of the damping to the next; a rejection changes it at once.
      min_damping: the lowest damping; None for 10 eps of the working dtype (1.2e-6 in float32,
        which turns to NaN at less).
      max_damping: the largest damping.
      reject: whether to reject; with False only the damping reacts.
      geodesic_acceleration: for :func:`gauss_newton` metrics, adds half the second-order correction
        :math:`a = -(F + \lambda I)^{-1} J^T r''_{uu}` to the step of
        :func:`scale_by_natural_gradient` (rate 1) where ||a|| is at most 0.75 of the step's length,
        by one jvp of a jvp (by differences of outputs where the model has no forward mode) and one
        more solve with the same factorisation.
      has_aux: whether ``value_fn`` returns a pair of the objective and auxiliary output.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(grads, state, params, *, batch,
      value_fn, value=None, grad=None)``; ``value_fn`` is the objective, a function of (params,
      batch) or of params alone. Every keyword reaches ``inner``. What this transformation adds, the
      damping above all, reaches those of this package alone, so that ``optax``'s line searches work
      inside. The state is a :class:`LevenbergMarquardtState`.

    Raises:
      TypeError: ``inner`` or ``metric`` is no such thing; ``value_fn`` is missing in `update`.
      ValueError: a number is out of range; nothing inside ``inner`` reads ``damping``, or
        ``geodesic_acceleration`` where that is wanted (at `init`).

    Examples:
      Rosenbrock's valley as least squares, from the usual start, without a rate:

      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> residual = lambda p, batch: jnp.stack([10.0 * (p[1] - p[0] ** 2), 1.0 - p[0]])
      >>> loss = lambda p, batch: 0.5 * jnp.mean(residual(p, batch) ** 2)
      >>> metric = ng.gauss_newton(residual)
      >>> tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric)
      >>> @jax.jit
      ... def step(p, state):
      ...     updates, state = tx.update(
      ...         jax.grad(loss)(p, None), state, p, batch=None, value_fn=loss)
      ...     return optax.apply_updates(p, updates), state
      >>> p = jnp.array([-1.2, 1.0])
      >>> state = tx.init(p)
      >>> for _ in range(40):
      ...     before = loss(p, None)
      ...     p, state = step(p, state)
      ...     assert loss(p, None) <= before
      >>> bool(jnp.allclose(p, 1.0, atol=1e-2))
      True

    Notes:
      One evaluation of the objective and one Jacobian product a step. The ratio is that of one
      batch: where batches are small and it is noisy, ``every=5, factor=1.5`` follow it slowly.

    References:
      Levenberg, 1944; Marquardt, 1963; More, 1978, The Levenberg-Marquardt algorithm; Martens and
      Grosse, 2015, section 6.5; Transtrum and Sethna, 2012 (geodesic acceleration).
    """
    name = "levenberg_marquardt"
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"{name}: inner must be an optax transformation, got {inner!r}")
    _boundary.check_metric(name, metric)
    settings = _damped.settings(
        name, initial_damping, factor, every, min_damping, max_damping, reject
    )
    if geodesic_acceleration:
        _acceleration.check(name, metric)
    told = _told.Told(geodesic_acceleration=geodesic_acceleration or None)
    return controlled(name, inner, metric, settings, told=told, has_aux=has_aux)


def controlled(
    name: str,
    inner: optax.GradientTransformation,
    metric: Metric,
    settings: _damped.Settings,
    *,
    has_aux: bool,
    told: _told.Told = _told.NOTHING,
    foretold: Callable[[Any], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The wrapper itself.

    `foretold` reads the predicted decrease off the inner state, where that has it; a Jacobian
    product is saved.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Tree) -> LevenbergMarquardtState:
        state = inner.init(params)
        _damped.check_sign(name, inner.update, state)
        wanted = ["damping"] + ["geodesic_acceleration"] * (told.geodesic_acceleration is not None)
        for keyword in wanted:
            _damped.check_reads(name, inner, state, params, keyword)
        return _sharding.place_beside(_start(settings, state, params), params)

    def update_fn(
        updates: Tree,
        state: LevenbergMarquardtState,
        params: Tree | None = None,
        *misplaced: Any,
        batch: Tree = _call.MISSING,
        value: jax.typing.ArrayLike | None = None,
        grad: Tree | None = None,
        value_fn: Callable[..., Any] | None = None,
        full_params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, LevenbergMarquardtState]:
        _call.check(name, updates, params, batch, misplaced)
        objective = _objective.bind(name, value_fn, has_aux=has_aux)
        full_params = _told.whole(params, full_params, value_fn)
        at = lambda p: objective(p, batch, full_params)
        if not jax.tree.leaves(params):
            return updates, state
        value = at(params) if value is None else _objective.as_value(name, value)
        grad = _boundary.visible(updates if grad is None else grad, params)
        now = told._replace(damping=state.damping, refresh=state.rejected, full_params=full_params)
        named, now = _told.split(inner.update, now)
        child = _objective.inside(name, value_fn, batch, full_params, now, has_aux=has_aux)
        extra = {**extra_args, **named, "value": value, "grad": grad, "value_fn": child}
        step, inner_state = inner.update(updates, state.inner, params, batch=batch, **extra)
        _damped.check_downhill(name, inner.update, grad, step)
        there = at(optax.apply_updates(params, step)).astype(value.dtype)
        if foretold is None:
            core = functools.partial(_reduction.predicted, metric)
            hidden = _told.hidden(params, full_params, value_fn)
            operands = (grad, step, params, batch, hidden)
            predicted = _sharding.run(core, operands, state.damping)
        else:
            predicted = foretold(inner_state)
        new = _judged(settings, state, value, there, predicted)
        step = jax.tree.map(lambda u: jnp.where(new.rejected, jnp.zeros_like(u), u), step)
        return _sharding.keep(step, updates), _call.keep_types(
            new._replace(inner=inner_state), state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _start(settings: _damped.Settings, inner: Any, params: Tree) -> LevenbergMarquardtState:
    zero = lambda: jnp.zeros((), jnp.float32)
    rejected = lambda: jnp.zeros((), jnp.bool_)
    damping = jnp.asarray(settings.initial).astype(_trees.work_dtype(params))
    damping = _damped.within(settings, damping)
    info = LevenbergMarquardtInfo(zero(), zero(), zero(), zero(), rejected())
    return LevenbergMarquardtState(jnp.zeros((), jnp.int32), damping, rejected(), inner, info)


def _judged(
    settings: _damped.Settings,
    state: LevenbergMarquardtState,
    value: jax.Array,
    there: jax.Array,
    predicted: jax.Array,
) -> LevenbergMarquardtState:
    decrease = value - there
    ratio = _reduction.ratio(decrease, predicted, value)
    # True for NaN, too.
    rejected = jnp.asarray(settings.reject).astype(jnp.bool_) & ~(there <= value)
    due = ((state.count + 1) % settings.every == 0) | rejected
    damping = _damped.adapted(settings, state.damping, ratio, rejected, due, state.rejected)
    real = lambda x: x.astype(jnp.float32)
    info = LevenbergMarquardtInfo(
        real(state.damping), real(ratio), real(decrease), real(predicted), rejected
    )
    count = optax.safe_increment(state.count)
    return LevenbergMarquardtState(count, damping, rejected, state.inner, info)

"""The loop that drives the damping of an inner transformation, step by step."""

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
from natgrad_jax.transforms import _largest_diagonal
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
      rejected: whether the step was replaced by zero because it made things worse.
      converged: whether nothing is left to gain: for three steps in a row what was predicted and
        what came of it was rounding of the objective, and the prediction is below eps^(5/4) of it
        (or this went on for thirty steps), or the steps themselves were rounding of the parameters.
        Such steps neither count as rejected nor raise the damping. They are taken, as the gradient
        may know more digits than the objective shows, unless they raise it by more than rounding.
    """

    damping: jax.Array
    ratio: jax.Array
    decrease: jax.Array
    predicted: jax.Array
    rejected: jax.Array
    converged: jax.Array

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
      rejections: steps rejected in a row. int32.
      quiet: steps in a row that were rounding. int32.
      largest: the largest diagonal of F seen lately; None without ``damping_scale``.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    damping: jax.Array
    rejected: jax.Array
    inner: Any
    info: LevenbergMarquardtInfo
    rejections: jax.Array
    quiet: jax.Array
    largest: Tree


#: Steps in a row that are rounding, at least, and those that are enough by themselves.
_QUIET, _LONG_QUIET = 3, 30

#: Without a scale it is not known what residuals are a difference of: rounding may be larger by so
#: much than 10 eps of the objective.
_SLACK = 1e3


class Plan(NamedTuple):
    """How a problem is solved, known from shapes.

    Attributes:
      may_scale: whether the state holds a scale.
      scaled: whether the damping is in its units.
      accelerated: whether steps are accelerated.
    """

    may_scale: bool
    scaled: bool
    accelerated: bool


def _unscaled(params: Tree, state: Any) -> Plan:
    del params, state
    return Plan(False, False, False)


def controlled(
    name: str,
    inner: optax.GradientTransformation,
    metric: Metric,
    settings: _damped.Settings,
    *,
    has_aux: bool,
    plan: Callable[[Tree, Any], Plan] = _unscaled,
    predicted_decrease: Callable[[Any], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The wrapper itself.

    `predicted_decrease` reads it off the inner state, where that has it; a Jacobian product is
    saved.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Tree) -> LevenbergMarquardtState:
        state = inner.init(params)
        _damped.check_sign(name, inner.update, state)
        planned = plan(params, state)
        for keyword in ("damping", *(["geodesic_acceleration"] if planned.accelerated else [])):
            _damped.check_reads(name, inner, state, params, keyword)
        return _sharding.place_beside(_start(settings, planned, state, params), params)

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
        planned = plan(params, state.inner)
        value = at(params) if value is None else _objective.as_value(name, value)
        grad = _boundary.visible(updates if grad is None else grad, params)
        seen = None
        if planned.scaled:
            hidden = _told.hidden(params, full_params, value_fn)
            seen = _largest_diagonal.seen(metric, params, batch, hidden, state.largest)
        told = _told.Told(
            damping=state.damping,
            refresh=state.rejected,
            full_params=full_params,
            geodesic_acceleration=planned.accelerated or None,
            damping_scale=None if seen is None else seen.scale,
        )
        named, told = _told.split(inner.update, told)
        child = _objective.inside(name, value_fn, batch, full_params, told, has_aux=has_aux)
        extra = {**extra_args, **named, "value": value, "grad": grad, "value_fn": child}
        step, inner_state = inner.update(updates, state.inner, params, batch=batch, **extra)
        _damped.check_downhill(name, inner.update, grad, step)
        there = at(optax.apply_updates(params, step)).astype(value.dtype)
        if predicted_decrease is None:
            core = functools.partial(_reduction.predicted, metric)
            hidden = _told.hidden(params, full_params, value_fn)
            operands = (grad, step, params, batch, hidden)
            predicted = _sharding.run(core, operands, state.damping)
        else:
            predicted = predicted_decrease(inner_state)
        like = state.rejected, state.rejected
        still, uphill = _sharding.run(_reduction.seen_alone, (grad, step, params), like)
        tried = _tried(planned, value, there, predicted, inner_state, seen, uphill)
        tried = tried._replace(still=still)
        new, kept = _judged(settings, planned, state, tried)
        step = jax.tree.map(lambda u: jnp.where(kept, u, jnp.zeros_like(u)), step)
        largest = state.largest if seen is None else seen.largest
        new = new._replace(inner=inner_state, largest=largest)
        return _sharding.keep(step, updates), _call.keep_types(new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Step(NamedTuple):
    """A step that was tried: the objective before and after it, and the predicted decrease.

    `bent` says that the model bends too much along it, `size` is that of `Seen`, `still` that every
    entry of the step is rounding beside its parameter.
    """

    value: jax.Array
    there: jax.Array
    predicted: jax.Array
    bent: jax.Array
    size: jax.Array
    still: jax.Array


def _tried(
    planned: Plan,
    value: jax.Array,
    there: jax.Array,
    predicted: jax.Array,
    inner_state: Any,
    seen: _largest_diagonal.Seen | None,
    uphill: jax.Array,
) -> _Step:
    """Reads off the inner state what the acceleration was like.

    The quadratic model knows nothing of an acceleration: what it predicts of the direction alone is
    what the accelerated step comes closer to, unless the sign of the step is wrong.
    """
    predicted, bent = predicted.astype(value.dtype), jnp.zeros((), jnp.bool_)
    found = _damped.readers(inner_state, "geodesic_acceleration") if planned.accelerated else []
    for state in found:
        bent |= ~(state.info.acceleration <= _acceleration.LONGEST)
    if len(found) == 1:
        alone = found[0].info.predicted_decrease.astype(value.dtype)
        usable = ~uphill & jnp.isfinite(alone) & (alone > float(jnp.finfo(jnp.float32).tiny))
        predicted = jnp.where(usable, alone, predicted)
    size = jnp.zeros((), value.dtype) if seen is None else seen.size.astype(value.dtype)
    return _Step(value, there, predicted, bent, size, jnp.zeros((), jnp.bool_))


def _start(
    settings: _damped.Settings, planned: Plan, inner: Any, params: Tree
) -> LevenbergMarquardtState:
    zero = lambda dtype: jnp.zeros((), dtype)
    real, count, flag = (lambda dtype=dtype: zero(dtype) for dtype in ("float32", "int32", "bool"))
    damping = _damped.first(settings, planned.scaled, _trees.work_dtype(params))
    info = LevenbergMarquardtInfo(real(), real(), real(), real(), flag(), flag())
    largest = _trees.zeros_like(params) if planned.may_scale else None
    return LevenbergMarquardtState(count(), damping, flag(), inner, info, count(), count(), largest)


def _judged(
    settings: _damped.Settings, planned: Plan, state: LevenbergMarquardtState, step: _Step
) -> tuple[LevenbergMarquardtState, jax.Array]:
    """The next state, and whether the step is taken."""
    value, predicted = step.value, step.predicted
    decrease = value - step.there
    noise = _reduction.rounding(value, step.size)
    slack = 1.0 if planned.scaled else _SLACK
    is_quiet = _reduction.quiet(decrease, predicted, noise, slack=slack) | step.still
    ratio = _reduction.ratio(decrease, predicted, noise, is_quiet)
    quiet = jnp.where(is_quiet, optax.safe_increment(state.quiet), 0)
    tiny = (predicted <= _reduction.negligible(value, step.size)) | step.still
    converged = ((quiet >= _QUIET) & tiny) | (quiet >= _LONG_QUIET)
    may_reject = jnp.asarray(settings.reject).astype(jnp.bool_)
    worse = ~(step.there <= value)  # True for NaN, too
    rejected = may_reject & worse & ~is_quiet
    trusted = jnp.where(step.bent & ~is_quiet, jnp.minimum(ratio, _damped.FAIR), ratio)
    due = ((state.count + 1) % settings.every == 0) | rejected
    damping = _damped.adapted(
        settings, state.damping, trusted, rejected, due, state.rejections, scaled=planned.scaled
    )
    real = lambda x: x.astype(jnp.float32)
    info = LevenbergMarquardtInfo(
        real(state.damping), real(ratio), real(decrease), real(predicted), rejected, converged
    )
    new = LevenbergMarquardtState(
        optax.safe_increment(state.count),
        damping,
        rejected,
        state.inner,
        info,
        jnp.where(rejected, optax.safe_increment(state.rejections), 0),
        quiet,
        state.largest,
    )
    out = ~(step.there <= value + jnp.where(is_quiet, noise, 0))
    return new, ~(may_reject & out)

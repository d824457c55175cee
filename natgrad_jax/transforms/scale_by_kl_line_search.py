"""A backtracking line search on the true KL divergence and on the objective."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _boundary
from natgrad_jax import _records
from natgrad_jax import _sharding
from natgrad_jax import _trees
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.metrics import Metric
from natgrad_jax.metrics import exact_fisher
from natgrad_jax.transforms import _call
from natgrad_jax.transforms import _objective
from natgrad_jax.transforms import _told
from natgrad_jax.transforms._objective import Objective

Tree = Any


class KLLineSearchInfo(NamedTuple):
    """Diagnostics of the last line search.

    Attributes:
      shrinks: how often the step was shortened. int32.
      kl_before: the mean KL divergence that the step as it came would have made, in nats per row.
      kl: that of the step given, 0 after a rejection.
      decrease: by how much the step given lowers the objective, 0 after a rejection.
      accepted: whether a step was found; otherwise the step given is exactly zero.
    """

    shrinks: jax.Array
    kl_before: jax.Array
    kl: jax.Array
    decrease: jax.Array
    accepted: jax.Array

    def __repr__(self) -> str:
        return _records.line(self)


class ScaleByKLLineSearchState(NamedTuple):
    """State of :func:`scale_by_kl_line_search`: the diagnostics of the last update."""

    info: KLLineSearchInfo


def scale_by_kl_line_search(
    model: Callable[[Tree, Tree], Tree] | Metric,
    likelihood: Likelihood | None = None,
    max_kl: jax.typing.ArrayLike = 0.01,
    *,
    shrink: jax.typing.ArrayLike = 0.7,
    max_shrinks: jax.typing.ArrayLike = 15,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens a step until it stays within a KL radius and lowers the objective.

    .. math::
        \theta + s^k u \quad\text{with the first } k = 0, 1, \dots, K \text{ for which}\quad
        \overline{\mathrm{KL}}[p_\theta \,\|\, p_{\theta + s^k u}] \le c
        \;\text{ and }\; L(\theta + s^k u) < L(\theta)

    for the step u, the factor s, the radius c, the objective L and the mean KL divergence over
    output rows: the true one, not its quadratic model. Where no k does, the step is exactly zero.
    Place it last in a chain: it takes and gives the step that is applied.

    Args:
      model: function (params, batch) -> outputs; or a metric from `exact_fisher` or
        `sampled_fisher`, which brings model and likelihood, and weights and batch axes if any.
      likelihood: a :class:`Likelihood` with a KL; None beside a metric.
      max_kl: the radius c > 0, in nats per row.
      shrink: the factor s in (0, 1).
      max_shrinks: K, how often the step may be shortened. By default to 0.005 of its length.
      has_aux: whether ``value_fn`` returns a pair of the objective and auxiliary output.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(updates, state, params, *, batch,
      value_fn, value=None)``. ``value_fn`` is the objective, a function of (params, batch) or of
      params alone; ``value`` saves its evaluation at ``params``. ``info`` in the state tells the
      number of shortenings, the KL before and after, and whether a step was accepted.

    Raises:
      TypeError: ``model`` or ``likelihood`` are no such thing; ``value_fn`` is missing in `update`.
      ValueError: a number is out of range; the metric has no likelihood.

    Examples:
      A step that is far too long is shortened into the radius:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> model, x = (lambda p, x: x @ p), jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> tx = ng.scale_by_kl_line_search(model, ng.Normal(), max_kl=0.1)
      >>> loss = lambda p, x: jnp.sum((p - 1.0) ** 2)
      >>> p = jnp.zeros((2,))
      >>> u, state = tx.update(jnp.array([5.0, 5.0]), tx.init(p), p, batch=x, value_fn=loss)
      >>> bool(loss(p + u, x) < loss(p, x)), bool(state.info.kl <= 0.1)
      (True, True)
      >>> u, state = tx.update(jnp.array([-1.0, -1.0]), state, p, batch=x, value_fn=loss)  # uphill
      >>> u.tolist(), bool(state.info.accepted)
      ([0.0, 0.0], False)

      `optax.inject_hyperparams` takes every bare function for a schedule; tell it:

      >>> import optax
      >>> make = optax.inject_hyperparams(ng.scale_by_kl_line_search, static_args=("model",))
      >>> float(make(model=model, likelihood=ng.Normal(), max_kl=0.1).init(p).hyperparams["max_kl"])
      0.10000000149011612

    Notes:
      Wrap the step in `jax.jit`: called eagerly, the search is compiled anew at every call.

    References:
      Schulman, Levine, Moritz, Jordan and Abbeel, 2015, Trust region policy optimization.
    """
    name = "scale_by_kl_line_search"
    metric = measure(name, model, likelihood)
    check_search(name, max_kl, shrink, max_shrinks)

    def init_fn(params: Tree) -> ScaleByKLLineSearchState:
        _call.check_init(name, params)
        return _sharding.place_beside(_empty(), params)

    def update_fn(
        updates: Tree,
        state: ScaleByKLLineSearchState,
        params: Tree | None = None,
        *misplaced: Any,
        batch: Tree = _call.MISSING,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[..., Any] | None = None,
        full_params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, ScaleByKLLineSearchState]:
        del extra_args
        _call.check(name, updates, params, batch, misplaced)
        objective = _objective.bind(name, value_fn, has_aux=has_aux)
        full_params = _told.hidden(params, full_params, value_fn)
        value = None if value is None else _objective.as_value(name, value)
        core = functools.partial(_searched, metric, objective)
        operands = (updates, params, batch, value, max_kl, shrink, max_shrinks, full_params)
        step, new = _sharding.run(core, operands, (updates, state))
        return _sharding.keep(step, updates), _call.keep_types(new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measure(
    name: str, model: Callable[[Tree, Tree], Tree] | Metric, likelihood: Likelihood | None
) -> Metric:
    """The metric of a model and a likelihood, or the one that stands for both."""
    if not isinstance(model, Metric):
        if likelihood is None:
            raise TypeError(f"{name}: likelihood is missing; only a metric brings its own")
        return _exact_fisher(model, likelihood)
    if likelihood is not None:
        raise TypeError(f"{name}: the metric {model.name} has a likelihood already")
    if model.divergence is None:
        raise ValueError(
            f"{name}: the metric {model.name} has no likelihood whose KL could be measured; take"
            " exact_fisher or sampled_fisher, or a model and a likelihood"
        )
    return model


# One metric for one model: `inject_hyperparams` calls a factory on every update, and compiled
# functions know a metric by identity.
_exact_fisher = functools.lru_cache(maxsize=256)(exact_fisher)


def check_search(name: str, max_kl: Any, shrink: Any, max_shrinks: Any) -> None:
    """Raises unless the numbers of a line search are in range."""
    if isinstance(max_kl, int | float) and not max_kl > 0:
        raise ValueError(f"{name}: max_kl must be positive, got {max_kl}")
    if isinstance(shrink, int | float) and not 0 < shrink < 1:
        raise ValueError(f"{name}: shrink must lie in (0, 1), got {shrink}")
    for label, number in (("max_kl", max_kl), ("shrink", shrink), ("max_shrinks", max_shrinks)):
        _boundary.check_number(name, label, number)


class _Trial(NamedTuple):
    """One length of the step and what it does."""

    shrinks: jax.Array
    kl: jax.Array
    value: jax.Array
    accepted: jax.Array
    kl_before: jax.Array


def _searched(
    metric: Metric,
    objective: Objective,
    updates: Tree,
    params: Tree,
    batch: Tree,
    value: jax.Array | None,
    max_kl: jax.Array,
    shrink: jax.Array,
    max_shrinks: jax.Array,
    full_params: Tree | None,
) -> tuple[Tree, ScaleByKLLineSearchState]:
    if not jax.tree.leaves(params):
        return updates, _empty()
    metric = _boundary.fill_masked(metric, params, full_params)
    dtype = _trees.work_dtype(params)
    outputs = metric.outputs(params, batch)
    before = objective(params, batch, full_params) if value is None else value
    wide = _trees.cast(updates, dtype)

    def shortened(shrinks: jax.Array) -> Tree:
        factor = jnp.asarray(shrink).astype(dtype) ** shrinks.astype(dtype)
        return _trees.cast_like(_trees.scale(wide, factor), updates)

    def attempt(shrinks: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = optax.apply_updates(params, shortened(shrinks))
        kl = metric.divergence(outputs, metric.outputs(there, batch), batch)
        return kl.astype(dtype), objective(there, batch, full_params).astype(before.dtype)

    def step(trial: _Trial) -> _Trial:
        kl, there = attempt(trial.shrinks)
        # False for NaN, too.
        accepted = (kl <= jnp.asarray(max_kl).astype(dtype)) & (there < before)
        kl_before = jnp.where(trial.shrinks == 0, kl, trial.kl_before)
        return _Trial(trial.shrinks + 1, kl, there, accepted, kl_before)

    def unfinished(trial: _Trial) -> jax.Array:
        return ~trial.accepted & (trial.shrinks <= jnp.asarray(max_shrinks).astype(jnp.int32))

    zero = jnp.zeros((), dtype)
    start = _Trial(jnp.zeros((), jnp.int32), zero, before, jnp.asarray(False), zero)
    trial = jax.lax.while_loop(unfinished, step, start)
    # `where`, not a factor of 0: an infinite proposal has no product with 0.
    taken = jax.tree.map(
        lambda u: jnp.where(trial.accepted, u, jnp.zeros_like(u)), shortened(trial.shrinks - 1)
    )
    return taken, ScaleByKLLineSearchState(_info(trial, before))


def _info(trial: _Trial, before: jax.Array) -> KLLineSearchInfo:
    real = lambda x: x.astype(jnp.float32)
    given = lambda x: real(jnp.where(trial.accepted, x, jnp.zeros_like(x)))
    return KLLineSearchInfo(
        trial.shrinks - 1,
        real(trial.kl_before),
        given(trial.kl),
        given(before - trial.value),
        trial.accepted,
    )


def _empty() -> ScaleByKLLineSearchState:
    zero = lambda: jnp.zeros((), jnp.float32)
    info = KLLineSearchInfo(
        jnp.zeros((), jnp.int32), zero(), zero(), zero(), jnp.zeros((), jnp.bool_)
    )
    return ScaleByKLLineSearchState(info)

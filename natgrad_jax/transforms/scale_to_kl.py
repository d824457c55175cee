"""Steps of a constant length in distribution space."""

import functools
from typing import Any

import jax
import optax

from natgrad_jax import _boundary
from natgrad_jax import _sharding
from natgrad_jax.metrics import Metric
from natgrad_jax.transforms import _call
from natgrad_jax.transforms import _distance
from natgrad_jax.transforms import _told

Tree = Any


def scale_to_kl(metric: Metric, kl: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""Scales a step so that it moves the distribution by a given KL divergence, exactly.

    .. math::
        d \leftarrow d \sqrt{2 c / (d^T F d)}

    to second order, with the exact Fisher matrix F of the metric's model and likelihood where it
    has them (also when the direction came from samples), the metric itself otherwise: where a
    likelihood has no exact Fisher matrix, F is estimated from samples of their own, the same for
    every step.

    Args:
      metric: the metric that measures.
      kl: the divergence c > 0 of every step, in nats per row.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs the parameters and the keyword
      ``batch``. It takes steps of either sign; a step with d^T F d <= 0 is left alone. ``info`` in
      its state holds the divergence that came in and the factor.

    Raises:
      TypeError: ``metric`` is no metric.
      ValueError: ``kl`` is a number that is not positive.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal())
      >>> tx, x, p = ng.scale_to_kl(metric, 0.02), jnp.array([[1.0, 2.0]]), jnp.zeros((2,))
      >>> d, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(p), p, batch=x)
      >>> bool(jnp.allclose(ng.fisher_quadratic_form(metric, p, x, d) / 2, 0.02))
      True

    References:
      Kakade, 2001, A natural policy gradient.
    """
    return kl_transformation("scale_to_kl", metric, kl, at_most=False)


def kl_transformation(
    name: str,
    metric: Metric,
    kl: jax.typing.ArrayLike,
    *,
    at_most: bool,
    examples: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """What `scale_to_kl` and `clip_by_kl` share; `examples` of the batch measure, or all."""
    _boundary.check_metric(name, metric)
    if isinstance(kl, int | float) and not kl > 0:
        raise ValueError(f"{name}: the KL divergence of a step must be positive, got {kl}")
    _boundary.check_number(name, "the KL divergence", kl)

    def init_fn(params: Tree) -> _distance.KLState:
        _call.check_init(name, params)
        return _sharding.place_beside(_distance.empty_state(), params)

    def update_fn(
        updates: Tree,
        state: _distance.KLState,
        params: Tree | None = None,
        *misplaced: Any,
        batch: Tree = _call.MISSING,
        full_params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, _distance.KLState]:
        _call.check(name, updates, params, batch, misplaced)
        full_params = _told.hidden(params, full_params, extra_args.get("value_fn"))
        core = functools.partial(_distance.rescaled, metric, at_most, examples)
        operands = (updates, params, batch, kl, full_params)
        scaled, new = _sharding.run(core, operands, (updates, state))
        return _sharding.keep(scaled, updates), _call.keep_types(new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

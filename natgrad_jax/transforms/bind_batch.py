"""A batch fixed beforehand, for callers that pass no keywords to `update`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _boundary
from natgrad_jax import _sharding
from natgrad_jax.transforms import _call
from natgrad_jax.transforms import _objective
from natgrad_jax.transforms import _told

Tree = Any


class BindBatchState(NamedTuple):
    """State of :func:`bind_batch`.

    Attributes:
      count: updates made so far, which a function that gives batches sees. int32.
      inner: the state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    inner: Any


class _Held:
    """Keeps what is bound as it is.

    optimistix looks for arrays in the closures of an optimizer and makes them operands: metrics
    with such arrays would be other ones at every trace, and static no more.
    """

    def __init__(self, inner: Any, batch: Tree, value_fn: Callable[..., Any] | None) -> None:
        self.inner = optax.with_extra_args_support(inner)
        self.value_fn = value_fn
        self._batch = batch

    def batch(self, count: jax.Array) -> Tree:
        """The batch of an update."""
        return self._batch(count) if callable(self._batch) else self._batch


def bind_batch(
    inner: optax.GradientTransformation,
    batch: Tree | Callable[[jax.Array], Tree],
    *,
    value_fn: Callable[..., Any] | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Fixes the batch, for callers that pass no keywords to ``update``.

    .. math::
        (u_k, s_{k+1}) = \mathrm{update}(g_k, s_k, \theta_k;\ \mathrm{batch} = b_k)

    with one batch :math:`b_k = b` for all updates, or a function of their number,
    :math:`b_k = b(k)`. ``flax.training.train_state.TrainState.apply_gradients``,
    ``numpyro.optim.optax_to_numpyro``, ``optimistix.OptaxMinimiser`` and ``optax.contrib.sam`` then
    take every transformation of this package. It hands on the parameters that it meets as well, so
    that ``optax.masked`` and ``optax.partition`` inside it need no ``full_params``.

    Args:
      inner: any transformation, one of this package or a chain with some.
      batch: pytree of arrays, as the metric's model takes it; or a function of the number of
        updates made so far, an int32 scalar, like an ``optax`` schedule. Within ``jax.jit`` it is
        traced: let it index data (``lambda k: jax.tree.map(lambda x: x[k % len(x)], batches)``).
        Called eagerly it may draw the next batch from anywhere.
      value_fn: the objective, where ``inner`` looks at it and the caller passes none: a function of
        (params, batch) or of params alone. Then ``value`` and ``grad``, if missing, are supplied
        too: the objective at the parameters, and the incoming gradient.
      has_aux: whether ``value_fn`` returns a pair of the objective and auxiliary output.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(grads, state, params)``. Keywords
      that the caller does pass reach ``inner``. The state is a :class:`BindBatchState`.

    Raises:
      TypeError: ``inner`` is no transformation, a leaf of ``batch`` no array; ``batch`` is given to
        ``update`` as well.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 3.0, 5.0])
      >>> loss = lambda p: 0.5 * jnp.mean((x @ p - y) ** 2)
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> tx = ng.bind_batch(ng.natural_gradient(1.0, metric, damping=0.0), x)
      >>> p = jnp.zeros((2,))
      >>> updates, state = tx.update(jax.grad(loss)(p), tx.init(p), p)
      >>> bool(jnp.allclose(optax.apply_updates(p, updates), jnp.array([1.0, 2.0]), atol=1e-4))
      True

    Notes:
      Arrays in ``batch`` become constants of a program that `jax.jit` makes of the caller's step.
    """
    name = "bind_batch"
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"{name}: inner must be an optax transformation, got {inner!r}")
    if value_fn is not None and not callable(value_fn):
        raise TypeError(f"{name}: value_fn must be a function, got {value_fn!r}")
    if not callable(batch):
        _boundary.check_batch(name, batch)
    held = _Held(inner, batch, value_fn)
    del inner, batch, value_fn  # functions below hold `held` alone

    def init_fn(params: Tree) -> BindBatchState:
        count = _sharding.place_beside(jnp.zeros((), jnp.int32), params)
        return BindBatchState(count, held.inner.init(params))

    def update_fn(
        updates: Tree,
        state: BindBatchState,
        params: Tree | None = None,
        *misplaced: Any,
        **extra_args: Any,
    ) -> tuple[Tree, BindBatchState]:
        _call.check_positional(name, misplaced)
        if "batch" in extra_args:
            raise TypeError(f"{name}: update() got the keyword `batch`, which is bound already")
        now = held.batch(state.count)
        keywords = _bound(name, now, updates, params, extra_args, held.value_fn, has_aux=has_aux)
        new, inner_state = held.inner.update(updates, state.inner, params, batch=now, **keywords)
        count = _call.keep_types(optax.safe_increment(state.count), state.count)
        return new, BindBatchState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _bound(
    name: str,
    batch: Tree,
    updates: Tree,
    params: Tree | None,
    given: dict[str, Any],
    value_fn: Callable[..., Any] | None,
    *,
    has_aux: bool,
) -> dict[str, Any]:
    """The keywords beside `batch`: those given, the objective and all parameters."""
    function = given.get("value_fn", value_fn)
    full_params = _told.whole(params, given.get("full_params"), function)
    if function is None:
        return {"full_params": full_params, **given}
    told = _told.Told(full_params=full_params)
    child = _objective.inside(name, function, batch, full_params, told, has_aux=has_aux)
    supplied = {}
    if "value_fn" not in given:
        supplied["grad"] = updates
        if "value" not in given:
            supplied["value"] = _objective.as_value(name, child(params, batch))
    return {**supplied, **given, "value_fn": child}

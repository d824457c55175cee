"""One call of `update`: the checks that every transformation of ours makes."""

from typing import Any

import jax
import optax

from natgrad_jax import _boundary
from natgrad_jax import _sharding
from natgrad_jax import _trees

Tree = Any


class _Missing:
    """Stands for a keyword that was not given: None is a batch too."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()


def check_init(caller: str, params: Tree) -> None:
    """Raises what types tell of the parameters of `init`, which may be shapes or a placeholder."""
    if jax.tree.leaves(params):
        _boundary.check_params(f"{caller}: init()", params)


def check_positional(caller: str, misplaced: tuple[Any, ...]) -> None:
    """Raises where `update` got more by position than updates, state and parameters."""
    if misplaced:
        raise TypeError(
            f"{caller}: update() takes (updates, state, params) by position, and got"
            f" {len(misplaced)} more; pass the batch by name: update(grads, state, params,"
            " batch=batch)"
        )


def named(
    caller: str, inner: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """A chain of ours under the name of its alias."""

    def update_fn(
        updates: Tree, state: Tree, params: Tree | None = None, *misplaced: Any, **extra_args: Any
    ) -> tuple[Tree, Tree]:
        check_positional(caller, misplaced)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def check(
    caller: str, updates: Tree, params: Tree, batch: Tree, misplaced: tuple[Any, ...] = ()
) -> None:
    """Raises what structure and types of the arguments of `update` tell.

    Raises:
      TypeError: `batch` is missing, or a leaf is no array or no real number.
      ValueError: `params` is None, or `updates` is no tree like it.
    """
    check_positional(caller, misplaced)
    if batch is MISSING:
        raise TypeError(
            f"{caller}: update() needs the keyword argument `batch`: update(grads, state, params,"
            " batch=batch); give batch=None for a metric that needs no data"
        )
    _boundary.check_params(f"{caller}: update()", params)
    _boundary.check_batch(f"{caller}: update()", batch)
    _boundary.check_like_params(f"{caller}: update()", "updates", updates, params)


def keep_types(new: Tree, old: Tree) -> Tree:
    """Gives a new state the dtypes and, outside jit, the sharding of the old one."""
    return _sharding.keep(optax.tree.cast_like(new, old), old)


def keep_dtypes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Casts the updates of a transformation back, leaf by leaf, to the dtypes they came in.

    A learning rate injected in one dtype would otherwise promote leaves of another.
    """

    def update_fn(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        new, state = inner.update(updates, state, params)
        return _trees.cast_like(new, updates), state

    return optax.GradientTransformation(inner.init, update_fn)

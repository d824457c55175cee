"""The rule by which damping follows the ratio of actual to predicted decrease."""

import inspect
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _boundary
from natgrad_jax import _sharding
from natgrad_jax import _trees
from natgrad_jax.transforms.scale_by_natural_gradient import ScaleByNaturalGradientState
from natgrad_jax.transforms.scale_by_quadratic_model import ScaleByQuadraticModelState

Tree = Any

#: Ratios above the first lower the damping, those below the second raise it.
GOOD, POOR = 0.75, 0.25

#: One that does neither.
FAIR = 0.5

#: A damping in the units of the problem falls faster than it rises, by factor^1.5: 3 beside 2, as
#: Nielsen, 1999, has it.
_FALL = 1.5

#: From one rejection to the next the damping rises twice as much (Nielsen), up to 2^10 times.
_MOST_DOUBLINGS = 10

#: States of transformations that read a keyword.
_READERS = {
    "damping": (ScaleByNaturalGradientState, ScaleByQuadraticModelState),
    "geodesic_acceleration": (ScaleByNaturalGradientState,),
}


class Settings(NamedTuple):
    """What `levenberg_marquardt` is told; numbers may be traced."""

    initial: jax.typing.ArrayLike | None
    factor: jax.typing.ArrayLike
    every: jax.typing.ArrayLike
    lowest: jax.typing.ArrayLike | None
    largest: jax.typing.ArrayLike
    reject: jax.typing.ArrayLike


def settings(
    name: str, initial: Any, factor: Any, every: Any, lowest: Any, largest: Any, reject: Any
) -> Settings:
    """Raises unless the numbers are in range."""
    named = {
        "initial_damping": 0.0 if initial is None else initial,
        "factor": factor,
        "every": every,
        "min_damping": 0.0 if lowest is None else lowest,
        "max_damping": largest,
    }
    for label, number in named.items():
        _boundary.check_number(name, label, number)
    if isinstance(factor, int | float) and not factor > 1:
        raise ValueError(f"{name}: factor must be above 1, got {factor}")
    if isinstance(every, int | float) and (every < 1 or every != int(every)):
        raise ValueError(f"{name}: every must be a positive int, got {every}")
    known = all(isinstance(x, int | float) for x in (lowest, largest))
    if known and lowest > largest:
        raise ValueError(f"{name}: min_damping {lowest} is above max_damping {largest}")
    return Settings(initial, factor, every, lowest, largest, reject)


def first(settings: Settings, scaled: bool, dtype: jnp.dtype) -> jax.Array:
    """The damping of the first step."""
    default = 0.1 if scaled else 0.01
    initial = default if settings.initial is None else settings.initial
    return within(settings, jnp.asarray(initial).astype(dtype))


def adapted(
    settings: Settings,
    damping: jax.Array,
    ratio: jax.Array,
    rejected: jax.Array,
    due: jax.Array,
    rejections: jax.Array,
    *,
    scaled: bool,
) -> jax.Array:
    """The damping of the next step; right after a rejection it does not fall.

    Otherwise every second step of a narrow valley would be rejected.
    """
    dtype = damping.dtype
    factor = jnp.asarray(settings.factor).astype(dtype)
    doublings = jnp.minimum(rejections, _MOST_DOUBLINGS).astype(dtype)
    rise = factor * jnp.where(rejected, jnp.exp2(doublings), 1)
    fall = factor**-_FALL if scaled else 1 / factor
    falls = (ratio > GOOD) & (rejections == 0)
    change = jnp.where((ratio < POOR) | rejected, rise, jnp.where(falls, fall, 1))
    return within(settings, jnp.where(due, damping * change, damping))


def within(settings: Settings, damping: jax.Array) -> jax.Array:
    """The damping between its bounds."""
    dtype = damping.dtype
    lowest = 10 * jnp.finfo(dtype).eps if settings.lowest is None else settings.lowest
    return jnp.clip(damping, *(jnp.asarray(x).astype(dtype) for x in (lowest, settings.largest)))


#: Transformations whose first step was looked at.
_looked_at: dict[Any, None] = {}


def check_sign(name: str, update: Any, state: Any) -> None:
    """Raises where the inner transformation is a direction alone, of the gradient's sign.

    One of the user's own may keep such a state and turn the sign: its `update` is not ours.
    """
    ours = str(getattr(update, "__module__", "")).split(".")[0] == __name__.split(".")[0]
    if ours and isinstance(state, ScaleByNaturalGradientState | ScaleByQuadraticModelState):
        raise ValueError(
            f"{name}: inner gives a direction of the gradient's sign, but what is wanted is a step:"
            " let optax.scale(-1.0) follow in a chain, or take natural_gradient(1.0, metric)"
        )


def check_downhill(name: str, update: Any, grad: Tree, step: Tree) -> None:
    """Warns where the first step of a transformation points up the gradient; seen eagerly only."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((grad, step))):
        return
    if update in _looked_at:
        return
    if len(_looked_at) > 100:
        _looked_at.clear()
    _looked_at[update] = None
    dtype = _trees.work_dtype(step)
    slope = lambda g, u: _trees.vdot(_trees.cast(g, dtype), _trees.cast(u, dtype), dtype)
    if _sharding.run(slope, (grad, step), jnp.zeros((), dtype)) > 0:
        warnings.warn(
            f"{name}: the step of `inner` points uphill, along the gradient, and will be rejected"
            " as long as it does: a sign is missing, as of optax.scale(-1.0)",
            stacklevel=3,
        )


def check_reads(
    name: str, inner: optax.GradientTransformation, state: Any, params: Tree, keyword: str
) -> None:
    """Raises unless something in a transformation takes a keyword.

    Told by the states inside, or by the signature of an `update` of the user's own.
    """
    if keyword in inspect.signature(inner.update).parameters or not jax.tree.leaves(params):
        return
    if not readers(state, keyword):
        raise ValueError(
            f"{name}: nothing inside `inner` reads `{keyword}`; it must hold natural_gradient,"
            f" scale_by_natural_gradient or another transformation whose update takes {keyword}="
        )


def readers(state: Any, keyword: str) -> list[Any]:
    """The states in a tree of states whose transformations read a keyword."""
    reads = lambda x: isinstance(x, _READERS[keyword])
    return [x for x in jax.tree.leaves(state, is_leaf=reads) if reads(x)]

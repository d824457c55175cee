"""What a transformation of ours tells those of ours inside it, and nobody else.

optax hands every keyword to every transformation of a chain, and its line searches refuse those
that `value_fn` does not name. So what we add travels with `value_fn` itself, which all wrappers
pass on as it is and which is called like the user's own: ours find it there, others see a function.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from natgrad_jax import _boundary

Tree = Any


class Told(NamedTuple):
    """What is told; None where nothing is.

    Attributes:
      damping: of this step, before any other.
      refresh: whether solvers make their inverses anew.
      full_params: all parameters, of which masks may hide some.
      geodesic_acceleration: whether directions are accelerated.
      damping_scale: in whose units the damping is, like the parameters.
    """

    damping: jax.typing.ArrayLike | None = None
    refresh: jax.typing.ArrayLike | None = None
    full_params: Tree | None = None
    geodesic_acceleration: bool | None = None
    damping_scale: Tree | None = None


NOTHING = Told()


class Objective:
    """A function (params, batch, ...) that carries what is told to transformations of ours.

    Attributes:
      told: what is told.
    """

    def __init__(self, function: Callable[..., Any], told: Told, keywords: list[str]) -> None:
        self._function = function
        self.told = told
        kinds = inspect.Parameter
        names = ["params", "batch", *(k for k in keywords if k != "batch")]
        self.__signature__ = inspect.Signature(
            [kinds(n, kinds.POSITIONAL_OR_KEYWORD, default=None) for n in names]
        )

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._function(*args, **keywords)


def told(value_fn: Any) -> Told:
    """What came along with a `value_fn`."""
    return value_fn.told if isinstance(value_fn, Objective) else NOTHING


def merged(before: Told, new: Told) -> Told:
    """What is told in the end: the new, and where that is silent what was told before."""
    return Told(*(b if n is None else n for b, n in zip(before, new, strict=True)))


def whole(params: Tree, full_params: Tree | None, value_fn: Any) -> Tree | None:
    """All parameters, as given, as told, or those at hand where none of them is hidden."""
    full = told(value_fn).full_params if full_params is None else full_params
    return params if full is None and not _boundary.masked(params) else full


def hidden(params: Tree, full_params: Tree | None, value_fn: Any) -> Tree | None:
    """All parameters where some of those at hand are hidden, None where they are not needed."""
    return whole(params, full_params, value_fn) if _boundary.masked(params) else None


def split(update: Callable[..., Any], told: Told) -> tuple[dict[str, Any], Told]:
    """What the signature of an `update` names, as keywords, and what else there is to tell.

    A transformation of the user's own that names `damping` takes it, and what it hands on is its
    own matter.
    """
    names = inspect.signature(update).parameters
    named = {k: v for k, v in told._asdict().items() if v is not None and k in names}
    return named, told._replace(**dict.fromkeys(named))

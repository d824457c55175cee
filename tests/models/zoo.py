"""The zoo: small models in every style, each with the reason why it is here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Tree = Any
N = 5


class Specimen(NamedTuple):
    """A model at random parameters and a random batch.

    Attributes:
      name: for test ids.
      reason: why it is here.
      make: key -> (function, params, batch).
      dense: parameters that may be held as dense rows: substrings of their paths.
      mixes: whether examples mix, which ends in a warning.
      batch_axes: as of the metrics.
      single: whether the model works in float32 inside, whatever it is given.
    """

    name: str
    reason: str
    make: Callable[[jax.Array], tuple[Callable[[Tree, Tree], Tree], Tree, Tree]]
    dense: tuple[str, ...] = ()
    mixes: bool = False
    batch_axes: Tree = 0
    single: bool = False


SPECIMENS: list[Specimen] = []


def specimen(reason: str, **more: Any) -> Callable[[Any], Any]:
    """Adds a maker to the zoo under its own name."""

    def add(make: Any) -> Any:
        SPECIMENS.append(Specimen(make.__name__, reason, make, **more))
        return make

    return add


class Draw:
    """Random arrays from one key."""

    def __init__(self, key: jax.Array) -> None:
        self.key = key

    def __call__(self, *shape: int, scale: float = 0.5) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return scale * jax.random.normal(key, shape)

    def integers(self, stop: int, *shape: int) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return jax.random.randint(key, shape, 0, stop)

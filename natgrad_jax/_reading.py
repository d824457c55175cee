"""A model that cannot read its batch: what it raised, and what the batch looks like."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

#: What indexing, unpacking and shapes that do not fit raise, and as what it is raised again.
_RAISED: dict[type[Exception], type[Exception]] = {
    KeyError: ValueError,
    IndexError: ValueError,
    TypeError: TypeError,
    AttributeError: TypeError,
}


def told(
    caller: str, name: str, function: Callable[[Tree, Tree], Any]
) -> Callable[[Tree, Tree], Any]:
    """A function of (params, batch) whose own errors name it, and the forms of its arguments."""

    def call(params: Tree, batch: Tree) -> Any:
        try:
            return function(params, batch)
        except tuple(_RAISED) as error:
            kind = _RAISED.get(type(error))
            if kind is None:  # JAX's own, which derive from these
                raise
            raise kind(
                f"{caller}: {name}(params, batch) raised {type(error).__name__}: {error}; it was"
                f" called with params of shapes {_shapes(params)} and a batch of {_shapes(batch)}"
            ) from error

    return call


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(jnp.shape, tree)

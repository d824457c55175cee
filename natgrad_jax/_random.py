"""The random keys of a transformation: bound at construction, held in the state as key data.

optax's tree casts refuse typed keys, so the state holds their uint32 data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KeyStream(NamedTuple):
    """Keys for one transformation.

    Attributes:
      start: () -> key data for a new state.
      split: key data -> (key data for the next state, a typed key for this update).
    """

    start: Callable[[], jax.Array]
    split: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def key_stream(caller: str, key: Any) -> KeyStream:
    """Reads a seed, a typed or a legacy key.

    Raises:
      TypeError: `key` is none of these.
    """
    typed = typed_key(caller, key)
    impl = jax.random.key_impl(typed)

    def split(data: jax.Array) -> tuple[jax.Array, jax.Array]:
        following, now = jax.random.split(jax.random.wrap_key_data(data, impl=impl))
        return jax.random.key_data(following), now

    # A copy: a step that donates its state must not take the key with it.
    return KeyStream(lambda: jnp.array(jax.random.key_data(typed), copy=True), split)


def typed_key(caller: str, key: Any) -> jax.Array:
    """A typed key from a seed, a typed or a legacy key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return key
    if dtype is not None and dtype == jnp.uint32 and len(shape) == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    if isinstance(key, int) and not isinstance(key, bool):
        return jax.random.key(key)
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer) and shape == ():
        return jax.random.key(key)
    raise TypeError(f"{caller}: key must be an int seed or a jax.random key, got {key!r}")

"""Vectors that are pytrees: the few operations on them that optax.tree lacks."""

import math
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

#: Leaves of at most so many scalars are reduced together.
_SMALL = 4096


def work_dtype(*trees: Tree) -> jnp.dtype:
    """The dtype linear algebra runs in: float64 when any leaf is, float32 otherwise."""
    leaves = (leaf for tree in trees for leaf in jax.tree.leaves(tree))
    dtypes = (jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves)
    return jnp.dtype(jnp.float64 if any(d == jnp.float64 for d in dtypes) else jnp.float32)


def cast(tree: Tree, dtype: jnp.dtype) -> Tree:
    """Casts every leaf to one dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """Casts leaf by leaf to the dtypes of `like`; finite values stay finite (they saturate)."""

    def leaf(x: jax.Array, target: jax.Array) -> jax.Array:
        if jnp.finfo(x.dtype).max <= jnp.finfo(target.dtype).max:
            return x.astype(target.dtype)
        # Rounding may carry the largest value of the narrow dtype to infinity: clip to it exactly.
        limit = jnp.asarray(jnp.finfo(target.dtype).max, x.dtype)
        return jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x).astype(target.dtype)

    return jax.tree.map(leaf, tree, like)


def narrowed(tree: Tree, like: Tree, dtype: jnp.dtype) -> tuple[Tree, jax.typing.ArrayLike]:
    """`cast_like`, and a power of two by which the result is to be multiplied.

    It is one unless some dtype has less range than `dtype`: float16 ends at 65504 and 6e-8.
    """
    narrow = any(jnp.finfo(x.dtype).maxexp < jnp.finfo(dtype).maxexp for x in jax.tree.leaves(like))
    if not narrow:
        return cast_like(tree, like), 1
    unit, power = normalised(cast(tree, dtype), dtype)
    return cast_like(unit, like), power


def size(tree: Tree) -> int:
    """The number of scalars in a tree, P for parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def ravel(tree: Tree) -> jax.Array:
    """All leaves of one dtype, in tree order, as one vector (P,)."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def unravel(vector: jax.Array, like: Tree) -> Tree:
    """The inverse of `ravel`: a tree with the shapes of `like` and the dtype of `vector`."""
    leaves, treedef = jax.tree.flatten(like)
    pieces, start = [], 0
    for leaf in leaves:
        stop = start + math.prod(leaf.shape)
        pieces.append(vector[start:stop].reshape(leaf.shape))
        start = stop
    return jax.tree.unflatten(treedef, pieces)


def _pieces(tree: Tree) -> list[jax.Array]:
    """The leaves, all small ones as one vector: a kernel for each would only cost compilation."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.reshape(-1) for leaf in leaves if leaf.size <= _SMALL]
    return [leaf for leaf in leaves if leaf.size > _SMALL] + (
        [jnp.concatenate(small)] if small else []
    )


def max_abs(tree: Tree, dtype: jnp.dtype) -> jax.Array:
    """The largest absolute value in a tree of one dtype, 0 for a tree without scalars."""
    # A stacked reduction: XLA would copy a chain of scalar operations into whatever uses its end.
    parts = [jnp.max(jnp.abs(piece), initial=0).astype(dtype) for piece in _pieces(tree)]
    return jnp.max(jnp.stack(parts), initial=0) if parts else jnp.zeros((), dtype)


def vdot(a: Tree, b: Tree, dtype: jnp.dtype) -> jax.Array:
    """The inner product of two trees of one dtype, at full precision."""
    pairs = zip(_pieces(a), _pieces(b), strict=True)
    parts = [jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST).astype(dtype) for x, y in pairs]
    return jnp.sum(jnp.stack(parts)) if parts else jnp.zeros((), dtype)


def scale(tree: Tree, factor: jax.Array) -> Tree:
    """Multiplies every leaf by a scalar of the leaves' dtype."""
    return jax.tree.map(lambda x: factor * x, tree)


def add_scaled(a: Tree, factor: jax.Array, b: Tree) -> Tree:
    """a + factor * b, leaf by leaf."""
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


def zeros_like(tree: Tree) -> Tree:
    """Zeros in the working dtype, sharded like the leaves; shapes alone are enough."""
    dtype = work_dtype(tree)

    def leaf(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):
            return jnp.zeros_like(x, dtype=dtype)
        return jnp.zeros(x.shape, dtype)

    return jax.tree.map(leaf, tree)


def normalised(tree: Tree, dtype: jnp.dtype) -> tuple[Tree, jax.Array]:
    """A tree divided by a power of two (exact) near its largest entry, and that power.

    NaN and infinity stay what they are, and make the power NaN.
    """
    largest = max_abs(tree, dtype)
    size = power_of_two(largest)
    unit = jax.tree.map(lambda x: x / size, tree)
    return unit, jnp.where(jnp.isfinite(largest), size, jnp.nan)


def power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two at most x >= 0; the smallest one for less, 1 for 0 and no number."""
    info = jnp.finfo(x.dtype)
    usable = (x >= info.tiny) & (x <= info.max)
    # The exponent bits alone are the power. (`frexp` and `ldexp` are forty operations, which XLA
    # would copy into the kernel of every leaf.)
    kind = jnp.dtype(f"int{info.bits}")
    bits = jax.lax.bitcast_convert_type(jnp.where(usable, x, 1), kind)
    mask = (2 ** (info.bits - 1) - 1) - (2**info.nmant - 1)
    power = jax.lax.bitcast_convert_type(bits & jnp.asarray(mask, kind), x.dtype)
    small = (x > 0) & (x < 1)
    return jnp.where(usable, power, jnp.where(small, info.tiny, 1)).astype(x.dtype)

"""The Jacobian of a function as a pair of linear maps, whatever its derivatives allow.

Most functions have a forward mode. A `custom_vjp` has none, and a function that works on mutable
references cannot be transposed once linearised: for these J v is the transpose of the vjp. Where a
backward pass iterates itself (implicit layers, adjoint methods) it cannot be transposed either:
J v then comes from the rows of J, one backward pass each.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.jacobian import has_forward_mode
from natgrad_jax.jacobian import pulled_columns

Tree = Any
Linear = Callable[[Tree], Tree]

#: Rows of a Jacobian are kept, rather than computed for each product, up to so many numbers.
_KEPT = 2**24


def linear_maps(caller: str, function: Linear, params: Tree) -> tuple[Tree, Linear, Linear]:
    """Outputs of a function, its Jacobian product v -> J v and the transposed one u -> J^T u.

    Args:
      caller: public name for the warning that a model without forward mode gives.
      function: of a params-like tree.
      params: where it is linearised, a pytree of real arrays with P numbers.
    """
    if has_forward_mode(function, params):
        outputs, push = jax.linearize(function, params)
        transpose = jax.linear_transpose(push, params)
        return outputs, push, lambda u: transpose(u)[0]
    outputs, pull = jax.vjp(function, params)
    back = lambda u: pull(u)[0]
    if not _transposes(function, params):
        return outputs, _by_rows(caller, outputs, pull, params), back
    push_tuple = jax.linear_transpose(pull, outputs)
    return outputs, lambda v: push_tuple((v,))[0], back


def push_forward(
    caller: str, function: Linear, params: Tree, tangents: list[Tree]
) -> tuple[Tree, list[Tree]]:
    """Outputs of a function and Jacobian products J v, one for each tangent."""
    tangents = [_trees.cast_like(tangent, params) for tangent in tangents]
    if has_forward_mode(function, params):
        pairs = [jax.jvp(function, (params,), (tangent,)) for tangent in tangents]
        return pairs[0][0], [pushed for _, pushed in pairs]
    outputs, push, _ = linear_maps(caller, function, params)
    return outputs, [push(tangent) for tangent in tangents]


def bend(caller: str, function: Linear, params: Tree, tangent: Tree) -> Tree:
    """The second derivative of a function along a direction.

    Without forward mode by differences, as Transtrum and Sethna, 2012, take it: the derivative is
    2 / h ((r(theta + h d) - r(theta)) / h - J d) with h = 0.1.
    """
    tangent = _trees.cast_like(tangent, params)
    if has_forward_mode(function, params):
        along = lambda p: jax.jvp(function, (p,), (tangent,))[1]
        return jax.jvp(along, (params,), (tangent,))[1]
    outputs, (slope,) = push_forward(caller, function, params, [tangent])
    moved = function(jax.tree.map(lambda p, d: p + 0.1 * d, params, tangent))
    return jax.tree.map(lambda m, z, s: 20 * ((m - z) / 0.1 - s), moved, outputs, slope)


def _transposes(function: Linear, params: Tree) -> bool:
    """Whether the backward pass of a function is made of what JAX can transpose."""

    def products(params: Tree, tangent: Tree) -> Tree:
        outputs, pull = jax.vjp(function, params)
        return jax.linear_transpose(pull, outputs)((tangent,))

    try:
        jax.eval_shape(products, params, params)
    except Exception:  # a derivative rule of the user's may raise anything
        return False
    return True


def _by_rows(caller: str, outputs: Tree, pull: Callable[[Tree], Any], params: Tree) -> Linear:
    leaves, structure = jax.tree.flatten(outputs)
    count, size = sum(math.prod(x.shape) for x in leaves), _trees.size(params)
    warnings.warn(
        f"{caller}: the model has no forward mode, and its backward pass cannot be transposed: a"
        f" product with F takes {count} backward passes, one for each output. woodbury() and"
        " cholesky() need no such product.",
        stacklevel=2,
    )

    def cotangents(leaf: int) -> list[jax.Array]:
        """Unit vectors of one output leaf, along a leading axis."""
        shape, dtype = leaves[leaf].shape, leaves[leaf].dtype
        total = math.prod(shape)
        units = jnp.eye(total, dtype=dtype).reshape(total, *shape)
        zeros = lambda x: jnp.zeros((total, *x.shape), x.dtype)
        return [units if i == leaf else zeros(x) for i, x in enumerate(leaves)]

    def column(own: list[jax.Array]) -> Tree:
        return pull(jax.tree.unflatten(structure, own))[0]

    if count * size <= _KEPT:
        rows = [pulled_columns(column, cotangents(i), size) for i in range(len(leaves))]
        times = lambda row, v: jnp.tensordot(row, v, v.ndim, precision=jax.lax.Precision.HIGHEST)

        def dots(i: int, v: Tree) -> jax.Array:
            return jax.tree.reduce(jnp.add, jax.tree.map(times, rows[i], v))

    else:
        dtype = _trees.work_dtype(params)

        def dots(i: int, v: Tree) -> jax.Array:
            return jax.lax.map(lambda own: _trees.vdot(column(own), v, dtype), cotangents(i))

    def push(tangent: Tree) -> Tree:
        parts = [dots(i, tangent) for i in range(len(leaves))]
        shaped = [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    return push

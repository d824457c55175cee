"""What K-FAC sees of a model whose parameters are in other units, theta = c phi.

A block holds the products of inputs a, the last of them a one for the bias, and cotangents g. With
units c = l r^T of its entries, c o (a g^T) = (l o a) (r o g)^T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import scaling
from natgrad_jax.jacobian.blocks import Bias
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.kronecker import Kronecker
from natgrad_jax.jacobian.kronecker import Used


class _Units(NamedTuple):
    """The units of a block, c = l r^T.

    Attributes:
      entries: those of the linear use, (B or 1, p or 1, q or 1).
      bias: those of the bias, (B or 1, 1, q or 1), or None.
      left: l, (B or 1, p or 1), with a bias (B or 1, p).
      right: r, (B or 1, q or 1).
      exact: whether c = l r^T whatever the units are.
    """

    entries: jax.Array
    bias: jax.Array | None
    left: jax.Array
    right: jax.Array
    exact: bool


def in_units(kronecker: Kronecker, units: list[jax.Array]) -> Kronecker:
    """The blocks of phi.

    Where the units of a block are no such product (parameters joined before use, their biases in
    other proportions), it is solved in the units of the nearest one.

    Args:
      kronecker: the blocks of theta.
      units: c, one number for each parameter leaf.
    """
    of_block = lambda block: _of_block(block, kronecker.joined, units)

    def nearest(arrays: list[jax.Array]) -> list[jax.Array]:
        # Units are looked up at every call: one may stand in the body of a loop, another outside.
        pairs = zip(arrays, kronecker.blocks, strict=True)
        return [_over_rest(block, of_block(block), x) for x, block in pairs]

    uses = [
        [_used(use, of_block(block)) for use in own]
        for block, own in zip(kronecker.blocks, kronecker.uses, strict=True)
    ]
    return kronecker._replace(
        uses=uses,
        split=lambda tree: nearest(kronecker.split(tree)),
        merge=lambda arrays, other: kronecker.merge(nearest(arrays), other),
    )


def _of_block(block: Block, joined: dict[int, Joined], units: list[jax.Array]) -> _Units:
    c = scaling.of_place(block.place, joined, units)
    left, right = _sides(c)
    exact = 1 in c.shape[1:]
    if block.bias is None:
        return _Units(c, None, left, right, exact)
    bias = _of_bias(block.bias, joined, units)
    share = bias / right[:, None, :]  # (B or 1, 1, q or 1)
    exact = exact and share.shape[2] == 1
    own = share[:, :, 0] if share.shape[2] == 1 else _mean(share, 2)[:, :, 0]
    copies = max(len(left), len(own))
    wide = lambda x, n: jnp.broadcast_to(x, (copies, n))
    left = jnp.concatenate([wide(left, block.place.sizes[1]), wide(own, 1)], axis=1)
    return _Units(c, bias, left, right, exact)


def _sides(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """l and r of the nearest product to (B, p, q), least squares of logarithms."""
    if c.shape[1] == 1:
        return jnp.ones((1, 1), c.dtype), c[:, 0]
    if c.shape[2] == 1:
        return c[:, :, 0], jnp.ones((1, 1), c.dtype)
    left, right = _mean(c, 2), _mean(c, 1)
    return (left / _mean(left, 1))[:, :, 0], right[:, 0]


def _mean(c: jax.Array, axis: int) -> jax.Array:
    """The geometric mean along an axis, which stays."""
    return jnp.exp(jnp.mean(jnp.log(c), axis=axis, keepdims=True))


def _of_bias(bias: Bias, joined: dict[int, Joined], units: list[jax.Array]) -> jax.Array:
    """The units of the bias of a block, (B or 1, 1, q or 1)."""
    if bias.root not in joined:
        return units[bias.root].reshape(1, 1, 1)
    joint = joined[bias.root]
    return scaling.of_owners(joint.owners(bias.entries)[:, None], joint, units)


def _over_rest(block: Block, units: _Units, x: jax.Array) -> jax.Array:
    """X / (c / l r^T), entry by entry."""
    if units.exact:
        return x
    c = jnp.broadcast_to(units.entries, block.place.sizes)
    if block.bias is not None:
        row = jnp.broadcast_to(units.bias, (len(c), 1, c.shape[2]))
        c = jnp.concatenate([c, row], axis=1)
    return x * units.left[:, :, None] * units.right[:, None, :] / c


def _used(use: Used, units: _Units) -> Used:
    part = scaling.on_right(use.part, units.right)
    return use._replace(part=scaling.on_left(part, units.left) if units.left.size > 1 else part)

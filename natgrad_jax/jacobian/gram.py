"""The Gram matrix of rows in factored form, R R^T, layer by layer.

Novak et al., 2022, Fast finite width neural tangent kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place


class Cost(NamedTuple):
    """Multiplications of the two ways to a Gram matrix."""

    pairwise: int
    transient: int


def cost(place: Place, one: Part, two: Part) -> Cost:
    """What a block of the Gram matrix costs, from static shapes."""
    b, p, q = place.sizes
    if one.left is None and two.left is None:
        direct = one.examples * one.columns * two.examples * two.columns * q
        return Cost(direct, direct)
    left = [1 if x.left is None else x.left.shape[1] for x in (one, two)]
    pairs = b * one.examples * one.positions * two.examples * two.positions
    inner = 1 if one.looks_up and two.looks_up else p
    pairwise = pairs * (left[0] * left[1] * inner + one.right.shape[1] * two.right.shape[1] * q)
    pairwise += pairs * one.columns * two.columns
    forming = sum(
        x.examples * x.columns * x.positions for x in {id(one): one, id(two): two}.values()
    )
    products = one.examples * one.columns * two.examples * two.columns
    return Cost(pairwise, b * p * q * (forming + products))


def block(place: Place, one: Part, two: Part) -> jax.Array:
    """A block of the Gram matrix, (N1, C1, N2, C2)."""
    both = cost(place, one, two)
    if both.transient < both.pairwise:
        return _of_entries(place, one, two)
    per_example = one.columns * one.positions * two.examples * two.columns * two.positions
    batch = factored.CHUNK // max(place.sizes[0] * per_example, 1)
    if batch >= one.examples or one.examples == 1:
        return _of_pairs(place, one, two)

    def example(left: jax.Array | None, right: jax.Array) -> jax.Array:
        single = Part(None if left is None else left[None], right[None])
        return _of_pairs(place, single, two)[0]

    return jax.lax.map(lambda x: example(*x), (one.left, one.right), batch_size=max(batch, 1))


def _of_pairs(place: Place, one: Part, two: Part) -> jax.Array:
    shape = (one.examples, one.columns, two.examples, two.columns)
    right = _pairs(one.right, two.right)
    if one.left is None and two.left is None:
        # The same product as that of a weight whose use this bias shares: XLA computes it once.
        return jnp.broadcast_to(right[0, :, :, 0, :, :, 0], shape)
    if one.looks_up and two.looks_up:
        same = one.left[:, :, :, :, None, None, None] == _aligned(two.left)
        left = jnp.transpose(same.astype(one.right.dtype), (2, 0, 1, 3, 4, 5, 6))
    else:
        width = place.sizes[1]
        left = _pairs(factored.explicit(one, width), factored.explicit(two, width))
    if one.positions == two.positions == 1 and place.sizes[0] == 1:
        product = left[0, :, :, 0, :, :, 0] * right[0, :, :, 0, :, :, 0]
        return jnp.broadcast_to(product, shape)
    return jnp.broadcast_to(jnp.sum(left * right, axis=(0, 3, 6)), shape)


def _aligned(index: jax.Array) -> jax.Array:
    """(M, 1, B, S) to (1, 1, B, 1, M, 1, S)."""
    return jnp.transpose(index, (2, 0, 1, 3))[None, None, :, None]


def _pairs(one: jax.Array, two: jax.Array) -> jax.Array:
    """Inner products of all pairs, (B, N, C, T, M, D, S)."""
    (n, c, b, t, _), (m, d, _, s, _) = one.shape, two.shape
    if b == 1:
        products = factored.matmul(factored.as_matrix(one), factored.as_matrix(two).T)
        return products.reshape(1, n, c, t, m, d, s)
    return factored.einsum("ncbtp,mdbsp->bnctmds", one, two)


def _of_entries(place: Place, one: Part, two: Part) -> jax.Array:
    b, p, q = place.sizes
    first = (one.examples * one.columns, two.examples * two.columns)

    def piece(left: jax.Array, other: jax.Array) -> jax.Array:
        x = factored.entries_of(one, left).reshape(first[0], -1)
        y = x if two is one else factored.entries_of(two, other).reshape(first[1], -1)
        return factored.einsum("ni,mi->nm", x, y)

    if two is one:
        sums, _, _ = factored.over_chunks(one, p, lambda left: piece(left, left), first[0] * b * q)
        total = jnp.sum(sums, axis=0)
    else:
        x = factored.rows(place, one).reshape(first[0], -1)
        y = factored.rows(place, two).reshape(first[1], -1)
        total = factored.einsum("ni,mi->nm", x, y)
    return total.reshape(one.examples, one.columns, two.examples, two.columns)


def squared_norms(place: Place, part: Part) -> jax.Array:
    """The squared norm of every row in this place, (N, C)."""
    if part.left is None:
        return jnp.broadcast_to(
            jnp.sum(part.right**2, axis=(2, 3, 4)), (part.examples, part.columns)
        )

    def example(left: Any, right: jax.Array) -> jax.Array:
        single = Part(left[None], right[None])
        products = block(place, single, single)[0, :, 0]
        return jnp.diagonal(products)

    if part.positions == 1 and place.sizes[0] == 1:
        left = 1 if part.looks_up else jnp.sum(part.left**2, axis=(2, 3, 4))
        return jnp.broadcast_to(
            left * jnp.sum(part.right**2, axis=(2, 3, 4)), (part.examples, part.columns)
        )
    return jax.lax.map(lambda x: example(*x), (part.left, part.right), batch_size=16)

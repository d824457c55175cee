"""The algebra of rows in factored form, sum_t left_t (x) right_t, without forming them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.view import Pieces

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

#: Transient arrays are kept to this many scalars.
CHUNK = 2**24


class Place(NamedTuple):
    """Which entries of a leaf a factor covers: the flat index is offset + b + p + q."""

    leaf: int
    shape: tuple[int, ...]
    offset: int
    b: Pieces
    p: Pieces
    q: Pieces

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, p and q."""
        return views.size(self.b), views.size(self.p), views.size(self.q)


class Part(NamedTuple):
    """Rows of one group of N examples with C columns each, for one place.

    Attributes:
      left: (N, C or 1, B, T, p); (N, 1, B, T) indices of one-hot vectors; None for ones (then
        p = T = B = 1).
      right: (N, C or 1, B, T, q).
    """

    left: jax.Array | None
    right: jax.Array

    @property
    def looks_up(self) -> bool:
        """Whether `left` holds indices."""
        return self.left is not None and self.left.ndim == 4

    @property
    def examples(self) -> int:
        """N."""
        return self.right.shape[0]

    @property
    def columns(self) -> int:
        """C."""
        left = 1 if self.left is None else self.left.shape[1]
        return max(left, self.right.shape[1])

    @property
    def positions(self) -> int:
        """T."""
        return self.right.shape[3]


class Factor(NamedTuple):
    """The rows of a place: one part for each group of examples, None where they are zero."""

    place: Place
    parts: tuple[Part | None, ...]


def explicit(part: Part, width: int) -> jax.Array:
    """`left` as an array (N, C or 1, B, T, p)."""
    if part.left is None:
        return jnp.ones((part.examples, 1, 1, 1, 1), part.right.dtype)
    if part.looks_up:
        return jax.nn.one_hot(part.left, width, dtype=part.right.dtype)
    return part.left


def rows(place: Place, part: Part) -> jax.Array:
    """The rows themselves, (N, C, entries of the leaf)."""
    entries = _entries(part, explicit(part, place.sizes[1]))
    flat = entries.reshape(entries.shape[0] * entries.shape[1], -1)
    pieces = place.b + place.p + place.q
    put = lambda x: views.place(x, place.shape, place.offset, pieces).reshape(-1)
    return jax.vmap(put)(flat).reshape(*entries.shape[:2], -1)


def _entries(part: Part, left: jax.Array) -> jax.Array:
    """(N, C, B, p, q) for some of the p."""
    columns = part.columns
    left = jnp.broadcast_to(left, (left.shape[0], columns, *left.shape[2:]))
    right = jnp.broadcast_to(part.right, (part.examples, columns, *part.right.shape[2:]))
    return _einsum("ncbtp,ncbtq->ncbpq", left, right)


def _over_chunks(
    part: Part, width: int, function: Callable[[jax.Array], jax.Array], per_entry: int
) -> tuple[jax.Array, int, int]:
    """Maps a function of (N, C, B, T, p chunk) over chunks of p, the last one padded."""
    chunk = max(1, min(width, CHUNK // max(per_entry, 1)))
    count = -(-width // chunk)
    if part.left is None or count <= 1:
        return function(explicit(part, width))[None], 1, width

    def piece(i: jax.Array) -> jax.Array:
        start = i * chunk
        if part.looks_up:
            return jax.nn.one_hot(part.left - start, chunk, dtype=part.right.dtype)
        padded = jnp.pad(part.left, [(0, 0)] * 4 + [(0, count * chunk - width)])
        return jax.lax.dynamic_slice_in_dim(padded, start, chunk, axis=4)

    return jax.lax.map(lambda i: function(piece(i)), jnp.arange(count)), count, chunk


class GramCost(NamedTuple):
    """Multiplications of the two ways to a Gram matrix."""

    pairwise: int
    transient: int


def gram_cost(place: Place, one: Part, two: Part) -> GramCost:
    """What a block of the Gram matrix costs, from static shapes."""
    b, p, q = place.sizes
    if one.left is None and two.left is None:
        direct = one.examples * one.columns * two.examples * two.columns * q
        return GramCost(direct, direct)
    left = [1 if x.left is None else x.left.shape[1] for x in (one, two)]
    pairs = b * one.examples * one.positions * two.examples * two.positions
    inner = 1 if one.looks_up and two.looks_up else p
    pairwise = pairs * (left[0] * left[1] * inner + one.right.shape[1] * two.right.shape[1] * q)
    pairwise += pairs * one.columns * two.columns
    forming = sum(
        x.examples * x.columns * x.positions for x in {id(one): one, id(two): two}.values()
    )
    products = one.examples * one.columns * two.examples * two.columns
    return GramCost(pairwise, b * p * q * (forming + products))


def gram(place: Place, one: Part, two: Part) -> jax.Array:
    """A block of the Gram matrix, (N1, C1, N2, C2)."""
    cost = gram_cost(place, one, two)
    if cost.transient < cost.pairwise:
        return _gram_of_entries(place, one, two)
    per_example = one.columns * one.positions * two.examples * two.columns * two.positions
    batch = CHUNK // max(place.sizes[0] * per_example, 1)
    if batch >= one.examples or one.examples == 1:
        return _gram_of_pairs(place, one, two)

    def example(left: jax.Array | None, right: jax.Array) -> jax.Array:
        single = Part(None if left is None else left[None], right[None])
        return _gram_of_pairs(place, single, two)[0]

    return jax.lax.map(lambda x: example(*x), (one.left, one.right), batch_size=max(batch, 1))


def _gram_of_pairs(place: Place, one: Part, two: Part) -> jax.Array:
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
        left = _pairs(explicit(one, width), explicit(two, width))
    if one.positions == two.positions == 1 and place.sizes[0] == 1:
        product = left[0, :, :, 0, :, :, 0] * right[0, :, :, 0, :, :, 0]
        return jnp.broadcast_to(product, shape)
    return jnp.broadcast_to(jnp.sum(left * right, axis=(0, 3, 6)), shape)


def _aligned(index: jax.Array) -> jax.Array:
    """(M, 1, B, S) to (1, 1, B, 1, M, 1, S)."""
    return jnp.transpose(index, (2, 0, 1, 3))[None, None, :, None]


def _matrix(x: jax.Array) -> jax.Array:
    """(N, C, 1, T, k) to (N C T, k): XLA copies operands of products with axes of size one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _pairs(one: jax.Array, two: jax.Array) -> jax.Array:
    """Inner products of all pairs, (B, N, C, T, M, D, S)."""
    (n, c, b, t, _), (m, d, _, s, _) = one.shape, two.shape
    if b == 1:
        return _matmul(_matrix(one), _matrix(two).T).reshape(1, n, c, t, m, d, s)
    return _einsum("ncbtp,mdbsp->bnctmds", one, two)


def _gram_of_entries(place: Place, one: Part, two: Part) -> jax.Array:
    b, p, q = place.sizes
    first = (one.examples * one.columns, two.examples * two.columns)

    def block(left: jax.Array, other: jax.Array) -> jax.Array:
        x = _entries(one, left).reshape(first[0], -1)
        y = x if two is one else _entries(two, other).reshape(first[1], -1)
        return _einsum("ni,mi->nm", x, y)

    if two is one:
        sums, _, _ = _over_chunks(one, p, lambda left: block(left, left), first[0] * b * q)
        total = jnp.sum(sums, axis=0)
    else:
        x = rows(place, one).reshape(first[0], -1)
        y = rows(place, two).reshape(first[1], -1)
        total = _einsum("ni,mi->nm", x, y)
    return total.reshape(one.examples, one.columns, two.examples, two.columns)


def product(place: Place, part: Part, tangent: jax.Array) -> jax.Array:
    """R v for the entries of v in this place: (N, C)."""
    entries = views.take(tangent, place.offset, place.b + place.p + place.q)
    entries = entries.reshape(place.sizes)
    if part.left is None:
        return _matmul(_matrix(part.right), entries.reshape(-1)).reshape(part.right.shape[:2])
    if part.looks_up:
        picked = entries[jnp.arange(place.sizes[0])[:, None], part.left]
    elif place.sizes[0] == 1:
        shape = *part.left.shape[:4], place.sizes[2]
        picked = _matmul(_matrix(part.left), entries[0]).reshape(shape)
    else:
        picked = _einsum("ncbtp,bpq->ncbtq", part.left, entries)
    if picked.shape[1] == part.right.shape[1] == 1:
        return jnp.sum(picked * part.right, axis=(2, 3, 4))
    return (
        _einsum("nkbtq,ncbtq->nc", picked, part.right)
        if picked.shape[1] == 1
        else _einsum("ncbtq,ncbtq->nc", picked, jnp.broadcast_to(part.right, picked.shape))
    )


def transposed_product(place: Place, part: Part, u: jax.Array) -> jax.Array:
    """R^T u for u (N, C): an array like the leaf, zero outside this place."""
    if part.left is None:
        entries = _matmul(u.reshape(-1), _matrix(part.right))
    elif part.left.shape[1] == 1:
        right = _combined(u, part.right)
        if part.looks_up:
            b, p, q = place.sizes
            where = jnp.arange(b)[None, :, None], part.left[:, 0]
            entries = jnp.zeros((b, p, q), right.dtype).at[where].add(right)
        else:
            entries = _summed_products(part.left, right[:, None])
    else:
        left = part.left * u.reshape(*u.shape, 1, 1, 1)
        right = jnp.broadcast_to(part.right, (*left.shape[:4], part.right.shape[4]))
        entries = _summed_products(left, right)
    return views.place(entries.reshape(-1), place.shape, place.offset, place.b + place.p + place.q)


def _summed_products(left: jax.Array, right: jax.Array) -> jax.Array:
    """sum_nct left (x) right, (B, p, q)."""
    if left.shape[2] == 1:
        return _matmul(_matrix(left).T, _matrix(right))[None]
    return _einsum("ncbtp,ncbtq->bpq", left, right)


def _combined(u: jax.Array, right: jax.Array) -> jax.Array:
    """sum_c u right, (N, B, T, q)."""
    if right.shape[1] == 1:
        return jnp.sum(u, axis=1).reshape(-1, 1, 1, 1) * right[:, 0]
    return _einsum("nc,ncbtq->nbtq", u, right)


def squares(place: Place, part: Part) -> jax.Array:
    """The diagonal of R^T R: an array like the leaf."""
    b, p, q = place.sizes
    pieces = place.b + place.p + place.q
    if part.left is None:
        entries = jnp.sum(part.right**2, axis=(0, 1, 2, 3))
    elif part.looks_up:
        # sum_t g_t S at the entry that t looks up, S = sum of g over all positions that do: S^2.
        same = (part.left[:, :, :, :, None] == part.left[:, :, :, None, :]).astype(part.right.dtype)
        same = jnp.broadcast_to(same, (*part.right.shape[:2], *same.shape[2:]))
        together = _einsum("ncbts,ncbsq->ncbtq", same, part.right)
        u = jnp.ones((part.examples, part.columns), part.right.dtype)
        return transposed_product(place, Part(part.left, part.right * together), u)
    elif part.positions == 1:
        square = Part(part.left**2, part.right**2)
        u = jnp.ones((part.examples, part.columns), part.right.dtype)
        return transposed_product(place, square, u)
    else:
        sums = lambda left: jnp.sum(_entries(part, left) ** 2, axis=(0, 1))
        per_entry = part.examples * part.columns * b * q
        chunks, count, chunk = _over_chunks(part, p, sums, per_entry)
        entries = jnp.moveaxis(chunks, 0, 1).reshape(b, count * chunk, q)[:, :p]
    return views.place(entries.reshape(-1), place.shape, place.offset, pieces)


def squared_norms(place: Place, part: Part) -> jax.Array:
    """The squared norm of every row in this place, (N, C)."""
    if part.left is None:
        return jnp.broadcast_to(
            jnp.sum(part.right**2, axis=(2, 3, 4)), (part.examples, part.columns)
        )

    def example(left: Any, right: jax.Array) -> jax.Array:
        single = Part(left[None], right[None])
        block = gram(place, single, single)[0, :, 0]
        return jnp.diagonal(block)

    if part.positions == 1 and place.sizes[0] == 1:
        left = 1 if part.looks_up else jnp.sum(part.left**2, axis=(2, 3, 4))
        return jnp.broadcast_to(
            left * jnp.sum(part.right**2, axis=(2, 3, 4)), (part.examples, part.columns)
        )
    return jax.lax.map(lambda x: example(*x), (part.left, part.right), batch_size=16)

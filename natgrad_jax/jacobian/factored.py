"""The algebra of rows in factored form, sum_t left_t (x) right_t, without forming them."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.view import Pieces

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

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
    entries = entries_of(part, explicit(part, place.sizes[1]))
    flat = entries.reshape(entries.shape[0] * entries.shape[1], -1)
    pieces = place.b + place.p + place.q
    put = lambda x: views.place(x, place.shape, place.offset, pieces).reshape(-1)
    return jax.vmap(put)(flat).reshape(*entries.shape[:2], -1)


def entries_of(part: Part, left: jax.Array) -> jax.Array:
    """(N, C, B, p, q) for some of the p."""
    columns = part.columns
    left = jnp.broadcast_to(left, (left.shape[0], columns, *left.shape[2:]))
    right = jnp.broadcast_to(part.right, (part.examples, columns, *part.right.shape[2:]))
    return einsum("ncbtp,ncbtq->ncbpq", left, right)


def over_chunks(
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


def as_matrix(x: jax.Array) -> jax.Array:
    """(N, C, 1, T, k) to (N C T, k): XLA copies operands of products with axes of size one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product(place: Place, part: Part, tangent: jax.Array) -> jax.Array:
    """R v for the entries of v in this place: (N, C)."""
    entries = views.take(tangent, place.offset, place.b + place.p + place.q)
    entries = entries.reshape(place.sizes)
    if part.left is None:
        return matmul(as_matrix(part.right), entries.reshape(-1)).reshape(part.right.shape[:2])
    if part.looks_up:
        picked = entries[jnp.arange(place.sizes[0])[:, None], part.left]
    elif place.sizes[0] == 1:
        shape = *part.left.shape[:4], place.sizes[2]
        picked = matmul(as_matrix(part.left), entries[0]).reshape(shape)
    else:
        picked = einsum("ncbtp,bpq->ncbtq", part.left, entries)
    if picked.shape[1] == part.right.shape[1] == 1:
        return jnp.sum(picked * part.right, axis=(2, 3, 4))
    return (
        einsum("nkbtq,ncbtq->nc", picked, part.right)
        if picked.shape[1] == 1
        else einsum("ncbtq,ncbtq->nc", picked, jnp.broadcast_to(part.right, picked.shape))
    )


def transposed_product(place: Place, part: Part, u: jax.Array) -> jax.Array:
    """R^T u for u (N, C): an array like the leaf, zero outside this place."""
    if part.left is None:
        entries = matmul(u.reshape(-1), as_matrix(part.right))
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
        return matmul(as_matrix(left).T, as_matrix(right))[None]
    return einsum("ncbtp,ncbtq->bpq", left, right)


def _combined(u: jax.Array, right: jax.Array) -> jax.Array:
    """sum_c u right, (N, B, T, q)."""
    if right.shape[1] == 1:
        return jnp.sum(u, axis=1).reshape(-1, 1, 1, 1) * right[:, 0]
    return einsum("nc,ncbtq->nbtq", u, right)


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
        together = einsum("ncbts,ncbsq->ncbtq", same, part.right)
        u = jnp.ones((part.examples, part.columns), part.right.dtype)
        return transposed_product(place, Part(part.left, part.right * together), u)
    elif part.positions == 1:
        square = Part(part.left**2, part.right**2)
        u = jnp.ones((part.examples, part.columns), part.right.dtype)
        return transposed_product(place, square, u)
    else:
        sums = lambda left: jnp.sum(entries_of(part, left) ** 2, axis=(0, 1))
        per_entry = part.examples * part.columns * b * q
        chunks, count, chunk = over_chunks(part, p, sums, per_entry)
        entries = jnp.moveaxis(chunks, 0, 1).reshape(b, count * chunk, q)[:, :p]
    return views.place(entries.reshape(-1), place.shape, place.offset, pieces)

"""The Gram matrix of rows in factored form, R R^T, layer by layer.

Novak et al., 2022, Fast finite width neural tangent kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place

#: Stripes of a symmetric block: with four, five eighths of it are computed.
_STRIPES = 4


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
    if place.sizes[0] > 1:
        return _over_copies(place, one, two)
    per_example = one.columns * one.positions * two.examples * two.columns * two.positions
    batch = factored.CHUNK // max(per_example, 1)
    if batch >= one.examples or one.examples == 1:
        return _of_pairs(place, one, two)

    def example(left: jax.Array | None, right: jax.Array) -> jax.Array:
        single = Part(None if left is None else left[None], right[None])
        return _of_pairs(place, single, two)[0]

    return jax.lax.map(lambda x: example(*x), (one.left, one.right), batch_size=max(batch, 1))


def _over_copies(place: Place, one: Part, two: Part) -> jax.Array:
    """The sum over copies, one at a time: XLA's batched products on a CPU are ten times slower.

    Of a symmetric block only stripes from the diagonal on are computed.
    """
    single = place._replace(b=())
    apart = lambda part: jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0)[:, :, :, None], part)
    count = one.examples
    stripes = _STRIPES if two is one and count >= 16 * _STRIPES else 1
    starts = [count * i // stripes for i in range(stripes)]
    stops = [*starts[1:], count]

    def add(totals: list[jax.Array], parts: tuple[Part, Part]) -> tuple[list[jax.Array], None]:
        cut = lambda part, i, j: jax.tree.map(lambda x: x[i:j], part)
        stripe = lambda i, j: block(single, cut(parts[0], i, j), cut(parts[1], i, None))
        sums = zip(totals, starts, stops, strict=True)
        return [total + stripe(i, j) for total, i, j in sums], None

    shape = lambda i, j: (j - i, one.columns, two.examples - i, two.columns)
    dtype = jnp.real(one.right).dtype
    totals = [jnp.zeros(shape(i, j), dtype) for i, j in zip(starts, stops, strict=True)]
    upper = jax.lax.scan(add, totals, (apart(one), apart(two)))[0]
    turned = lambda x: jnp.transpose(x, (2, 3, 0, 1))
    rows = []
    for k, (i, j) in enumerate(zip(starts, stops, strict=True)):
        before = [turned(upper[m][:, :, i - starts[m] : j - starts[m]]) for m in range(k)]
        rows.append(jnp.concatenate([*before, upper[k]], axis=2))
    return jnp.concatenate(rows)


def _of_pairs(place: Place, one: Part, two: Part) -> jax.Array:
    shape = (one.examples, one.columns, two.examples, two.columns)
    right = _pairs(one.right, two.right)
    if one.left is None and two.left is None:
        # The same product as that of a weight whose use this bias shares: XLA computes it once.
        return jnp.broadcast_to(right.real[0, :, :, 0, :, :, 0], shape)
    if one.looks_up and two.looks_up:
        same = one.left[:, :, :, :, None, None, None] == _aligned(two.left)
        left = _Pairs(jnp.transpose(same.astype(right.real.dtype), (2, 0, 1, 3, 4, 5, 6)))
    else:
        width = place.sizes[1]
        left = _pairs(factored.explicit(one, width), factored.explicit(two, width))
    if one.positions == two.positions == 1 and place.sizes[0] == 1:
        first = jax.tree.map(lambda x: x[0, :, :, 0, :, :, 0], (left, right))
        return jnp.broadcast_to(_real_product(*first), shape)
    return jnp.broadcast_to(jnp.sum(_real_product(left, right), axis=(0, 3, 6)), shape)


class _Pairs(NamedTuple):
    """Inner products x . y* of all pairs, (B, N, C, T, M, D, S); real ones have no `imag`."""

    real: jax.Array
    imag: jax.Array | None = None


def _real_product(left: _Pairs, right: _Pairs) -> jax.Array:
    """The real part of the product of two complex numbers."""
    product = left.real * right.real
    both = left.imag is not None and right.imag is not None
    return product - left.imag * right.imag if both else product


def _aligned(index: jax.Array) -> jax.Array:
    """(M, 1, B, S) to (1, 1, B, 1, M, 1, S)."""
    return jnp.transpose(index, (2, 0, 1, 3))[None, None, :, None]


def _pairs(one: jax.Array, two: jax.Array) -> _Pairs:
    """Inner products of all pairs; complex ones by products of twice as many real numbers."""
    if not (jnp.iscomplexobj(one) or jnp.iscomplexobj(two)):
        return _Pairs(_real_pairs(one, two))
    turned = jnp.concatenate([jnp.imag(one), -jnp.real(one)], axis=-1)
    return _Pairs(_real_pairs(_wide(one), _wide(two)), _real_pairs(turned, _wide(two)))


def _wide(x: jax.Array) -> jax.Array:
    """Real and imaginary parts side by side: x . y is the real part of the complex x . y*."""
    return jnp.concatenate([jnp.real(x), jnp.imag(x)], axis=-1) if jnp.iscomplexobj(x) else x


def _real_pairs(one: jax.Array, two: jax.Array) -> jax.Array:
    (n, c, b, t, _), (m, d, _, s, _) = one.shape, two.shape
    if b == 1:
        products = factored.matmul(factored.as_matrix(one), factored.as_matrix(two).T)
        return products.reshape(1, n, c, t, m, d, s)
    return factored.einsum("ncbtp,mdbsp->bnctmds", one, two)


def _of_entries(place: Place, one: Part, two: Part) -> jax.Array:
    b, p, q = place.sizes
    first = (one.examples * one.columns, two.examples * two.columns)

    def piece(left: jax.Array, other: jax.Array) -> jax.Array:
        x = _wide(factored.entries_of(one, left).reshape(first[0], -1))
        y = x if two is one else _wide(factored.entries_of(two, other).reshape(first[1], -1))
        return factored.einsum("ni,mi->nm", x, y)

    if two is one:
        sums, _, _ = factored.over_chunks(one, p, lambda left: piece(left, left), first[0] * b * q)
        total = jnp.sum(sums, axis=0)
    else:
        x = _wide(factored.rows(place, one).reshape(first[0], -1))
        y = _wide(factored.rows(place, two).reshape(first[1], -1))
        total = factored.einsum("ni,mi->nm", x, y)
    return total.reshape(one.examples, one.columns, two.examples, two.columns)


def squared_norms(place: Place, part: Part) -> jax.Array:
    """The squared norm of every row in this place, (N, C)."""
    if part.left is None:
        return jnp.broadcast_to(_squares(part.right), (part.examples, part.columns))

    def example(left: Any, right: jax.Array) -> jax.Array:
        single = Part(left[None], right[None])
        products = block(place, single, single)[0, :, 0]
        return jnp.diagonal(products)

    if part.positions == 1 and place.sizes[0] == 1:
        left = 1 if part.looks_up else _squares(part.left)
        return jnp.broadcast_to(left * _squares(part.right), (part.examples, part.columns))
    return jax.lax.map(lambda x: example(*x), (part.left, part.right), batch_size=16)


def _squares(x: jax.Array) -> jax.Array:
    """Squared norms over copies, positions and entries: (N, C)."""
    return jnp.sum(_wide(x) ** 2, axis=(2, 3, 4))

"""Second moments of what enters and leaves the uses of a block: the factors of K-FAC.

A block (B, p, q) has one moment for each side, (B, p, p) and (B, q, q); a diagonal one (B, p) where
one-hot vectors enter. A block of plain rows has one moment, its own exact Fisher matrix (1, q, q),
or its diagonal (1, q) when it is large. Large moments are kept as block rows, see `_upper`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _symmetric
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian.assemble import along_positions
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.kronecker import Kronecker
from natgrad_jax.jacobian.kronecker import Used
from natgrad_jax.solvers import _upper
from natgrad_jax.solvers._upper import Symmetric

#: The largest number of entries without a linear use that get a block and not a diagonal.
MAX_ROWS = 256

Moments = tuple[Symmetric, ...]


def moments(kronecker: Kronecker, weight_sharing: str) -> list[Moments]:
    """The moments of every block at this batch."""
    return [
        _row_moment(uses) if block.kind == "rows" else _pair(block, uses, weight_sharing)
        for block, uses in zip(kronecker.blocks, kronecker.uses, strict=True)
    ]


def _row_moment(uses: list[Used]) -> Moments:
    rows = rows_of(uses)
    if rows.shape[1] > MAX_ROWS:
        return (jnp.sum(rows**2, axis=0)[None],)
    return (_upper.second_moment(rows),)


def rows_of(uses: list[Used]) -> jax.Array:
    """The rows of a block without linear use, (rows, q)."""
    return jnp.concatenate([factored.as_matrix(use.part.right) for use in uses])


def _pair(block: Block, uses: list[Used], weight_sharing: str) -> Moments:
    pairs = [_of_use(block, use, weight_sharing) for use in uses]
    if len(pairs) == 1:
        return pairs[0]
    # F is a sum over uses of B_k (x) A_k, which has this form where all A_k and all B_k agree.
    if any(use.swapped for use in uses):
        pairs = [_balanced(*pair) for pair in pairs]
    left, right = (
        jax.tree.map(lambda *terms: functools.reduce(jnp.add, terms), *side)
        for side in zip(*pairs, strict=True)
    )
    return _times(1 / len(pairs), left), right


def _times(scale: jax.typing.ArrayLike, moment: Symmetric) -> Symmetric:
    return jax.tree.map(lambda x: scale * x, moment)


def _balanced(left: Symmetric, right: Symmetric) -> Moments:
    """The same product with equal traces: inputs and outputs of a use have different units."""
    traces = _trace(left), _trace(right)
    usable = (traces[0] > 0) & (traces[1] > 0)
    scale = jnp.where(usable, jnp.sqrt(traces[1] / jnp.where(usable, traces[0], 1)), 1)
    return _times(scale, left), _times(1 / scale, right)


def _trace(moment: Symmetric) -> jax.Array:
    return jnp.sum(mean_eigenvalues(moment)) * moment.shape[1]


def _of_use(block: Block, use: Used, weight_sharing: str) -> Moments:
    """Expand: positions count as examples. Reduce: inputs are averaged over them, outputs summed.

    Eschenhagen et al., 2023, Kronecker-factored approximate curvature for modern architectures.
    """
    part = use.part
    reduce = weight_sharing == "reduce"
    per_position = use.weights if reduce else use.weights / part.positions
    inputs = lambda x: jnp.mean(x, axis=3, keepdims=True) if reduce else x
    outputs = lambda x: jnp.sum(x, axis=3, keepdims=True) if reduce else x
    sides = (outputs, inputs) if use.swapped else (inputs, outputs)
    weights = (None, per_position) if use.swapped else (per_position, None)
    right = _second_moment(sides[1](part.right), weights[1])
    if part.looks_up:
        return _counts(block, part, per_position, reduce=reduce), right
    left = sides[0](part.left)
    if block.kind == "look-up":
        scale = jnp.ones(()) if weights[0] is None else weights[0].reshape(-1, 1, 1, 1, 1)
        return jnp.sum(left**2 * scale.astype(left.dtype), axis=(0, 1, 3)), right
    return _second_moment(left, weights[0]), right


def _counts(block: Block, part: Part, weights: jax.Array, *, reduce: bool) -> jax.Array:
    """The diagonal of the second moment of one-hot vectors, (B, p)."""
    index = part.left[:, 0]  # (N, B, T)
    if reduce:
        same = index[:, :, :, None] == index[:, :, None, :]
        shares = jnp.sum(same, axis=3).astype(weights.dtype) / part.positions**2
        values = weights[:, None, None] * shares
    else:
        values = jnp.broadcast_to(weights[:, None, None], index.shape)
    b, p, _ = block.shape
    copies = jnp.broadcast_to(jnp.arange(b)[None, :, None], index.shape)
    return jnp.zeros((b, p), weights.dtype).at[copies, index].add(values)


def _second_moment(x: jax.Array, weights: jax.Array | None) -> Symmetric:
    """sum_nct w_n x x^T of (N, C, B, T, k): (B, k, k)."""
    roots = None if weights is None else jnp.sqrt(weights).astype(x.dtype).reshape(-1, 1, 1, 1, 1)
    if x.shape[2] == 1:
        return _upper.second_moment(x, roots)
    x = x if roots is None else x * roots
    return factored.einsum("ncbti,ncbtj->bij", x, x)


def squares(block: Block, uses: list[Used], left: jax.Array | None, right: jax.Array) -> jax.Array:
    """E[(Q_g^T g a^T Q_a)^2], entry by entry, in a basis for each side: (B, p, q).

    Args:
      block: the block.
      uses: of the block.
      left: Q_a (B, p, p), None for the basis that one-hot vectors are.
      right: Q_g (B, q, q).
    """
    b, p, q = block.shape
    piece = lambda n, stride: () if n == 1 else ((n, stride),)
    place = Place(0, (b, p, q), 0, piece(b, p * q), piece(p, q), piece(q, 1))
    total = jnp.zeros((b, p, q), right.dtype)
    for group in sorted({use.group for use in uses}):
        turned = [_turned(use.part, left, right) for use in uses if use.group == group]
        same = len({part.examples for part in turned}) == 1
        for part in [along_positions(place, turned)] if same else turned:
            total = total + factored.squares(place, part)
    return total


def _turned(part: Part, left: jax.Array | None, right: jax.Array) -> Part:
    inputs = part.left if left is None else _rotate(part.left, left)
    return Part(inputs, _rotate(part.right, right))


def _rotate(x: jax.Array, basis: jax.Array) -> jax.Array:
    if basis.shape[0] == 1:
        return factored.matmul(factored.as_matrix(x), basis[0]).reshape(x.shape)
    return factored.einsum("ncbti,bij->ncbtj", x, basis)


def slots(costs: list[int], period: int) -> list[int]:
    """For each item its step within a period: dear ones first, each to the cheapest step so far."""
    taken, load = [0] * len(costs), [0] * period
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        step = min(range(period), key=lambda s: load[s])
        taken[item] = step
        load[step] += costs[item]
    return taken


def in_turns(
    count: jax.Array,
    period: int,
    sources: list[Symmetric],
    old: list[Any],
    make: Callable[[jax.Array, jax.Array, jax.Array], Any],
    scalars: jax.Array,
    *,
    gains: jax.Array | None = None,
    padded: Callable[[int], int] | None = None,
) -> list[Any]:
    """Renews items in turns, so that each is renewed once in a period and no step renews all.

    Items are made by a loop over those that are due: one program for all of the same order, or,
    padded, for all.

    Args:
      count: steps so far; at step 0 everything is renewed.
      period: in steps.
      sources: what items are made of, (B, n, n) each, or their block rows.
      old: the items, trees of arrays (B, n) or (B, n, n).
      make: (source (B, m, m) with zeros past n, scalar (B,), n) -> item with m in place of n. Of
        the source only the entries on and above the diagonal count.
      scalars: of each item, (items, largest B).
      gains: of each item, (items,), multiplied when it is stored.
      padded: the largest order n -> m; None for m = n.

    Returns:
      The items.
    """
    steps = slots([x.shape[0] * x.shape[1] ** 3 for x in sources], period)
    due = (count % period == jnp.asarray(steps, jnp.int32)) | (count == 0)
    classes: dict[tuple[int, int], list[int]] = {}
    for i, x in enumerate(sources):
        classes.setdefault((x.shape[0], 0 if padded else x.shape[1]), []).append(i)
    new = list(old)
    for items in classes.values():
        order = max(sources[i].shape[1] for i in items)
        made = _renewed_class(
            due[np.asarray(items)],
            [sources[i] for i in items],
            [old[i] for i in items],
            make,
            scalars[np.asarray(items)],
            None if gains is None else gains[np.asarray(items)],
            padded(order) if padded else order,
        )
        for i, x in zip(items, made, strict=True):
            new[i] = x
    return new


def _renewed_class(
    due: jax.Array,
    sources: list[Symmetric],
    old: list[Any],
    make: Callable[[jax.Array, jax.Array, jax.Array], Any],
    scalars: jax.Array,
    gains: jax.Array | None,
    largest: int,
) -> list[Any]:
    count, numbers = len(sources), jnp.arange(len(sources))

    def next_due(k: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(due & (numbers >= k), numbers, count))

    orders = jnp.asarray([source.shape[1] for source in sources])

    def load(i: int) -> jax.Array:
        return _upper.padded(sources[i], largest)

    def store(item: Any, old: Any, here: jax.Array, gain: jax.Array | None) -> Any:
        def cut(x: jax.Array, like: jax.Array) -> jax.Array:
            part = x[tuple(slice(n) for n in like.shape)]
            return part if gain is None else gain * part

        run = lambda carry: (jnp.asarray(False), jax.tree.map(cut, item, carry[1]))
        # Neither `switch` nor `where`: they copy or pass over all items.
        return jax.lax.while_loop(lambda carry: carry[0], run, (here, old))[1]

    def step(carry: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        k, items = carry
        source = jax.lax.switch(k, [functools.partial(load, i) for i in range(count)])
        # An item alone in its class does not depend on k: XLA would make it outside, on every step.
        source, k = jax.lax.optimization_barrier((source, k))
        item = make(source, scalars[k], orders[k])
        gain = None if gains is None else gains[k]
        return next_due(k + 1), [store(item, old, k == i, gain) for i, old in enumerate(items)]

    # Not `cond`, which runs both branches under vmap.
    return jax.lax.while_loop(lambda c: c[0] < count, step, (next_due(jnp.asarray(0)), old))[1]


def empty(block: Block) -> Moments:
    """Moments of zero."""
    b, p, q = block.shape
    if block.kind == "rows":
        return (jnp.zeros((1, q) if q > MAX_ROWS else (1, q, q)),)
    left = jnp.zeros((b, p)) if block.kind == "look-up" else _upper.zeros(b, p)
    return left, _upper.zeros(b, q)


def is_diagonal(side: Symmetric) -> TypeGuard[jax.Array]:
    """Whether a moment is (B, n), a diagonal."""
    return side.ndim == 2


def mean_eigenvalues(side: Symmetric) -> jax.Array:
    """Of a moment (B, n, n), or a diagonal (B, n): (B,)."""
    entries = [side] if is_diagonal(side) else _upper.diagonal(side)
    sums = [jnp.sum(x, axis=1) for x in entries]
    return functools.reduce(jnp.add, sums) / max(side.shape[1], 1)


def table(rows: list[jax.Array], like: jax.Array) -> jax.Array:
    """Rows (B,) of many lengths, filled up with zeros: (sides, largest B)."""
    if not rows:
        return jnp.zeros_like(like)
    return jnp.stack([jnp.pad(row, (0, like.shape[1] - row.shape[0])) for row in rows])


def eigen(moments: jax.Array, scale: jax.Array, order: jax.Array) -> Any:
    """Eigenvalues (B, n), times a scale, and eigenvectors (B, n, n): made by `in_turns`.

    No eigenvectors where the scale is 0: then nothing is known of the moment.
    """
    del order
    scale = scale[: len(moments)]
    found = _eigen(moments, looped=True)
    vectors = jnp.where(scale[:, None, None] > 0, found.vectors, 0)
    return _symmetric.Eigen(scale[:, None] * found.values, vectors)


def eigenvectors(moments: jax.Array, scalar: jax.Array, order: jax.Array) -> jax.Array:
    """Eigenvectors (B, n, n) alone, made by `in_turns`."""
    del scalar, order
    return _eigen(moments, looped=True).vectors


def _eigen(moments: jax.Array, *, looped: bool) -> Any:
    one = functools.partial(_symmetric.eigen, definite=True, looped=looped)
    if moments.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], one(moments[0]))
    return jax.vmap(one)(moments)


def damped_inverse(values: jax.Array, damping: jax.Array) -> jax.Array:
    """1 / (value + damping), 0 for 0 / 0; what is rounding beside the largest value counts as 0.

    Values (B, p, q) of sides in ascending order, or of a side of length one: the largest stand at
    the end of one of them, and a pass over all is saved.
    """
    ends = jnp.concatenate([values[:, :, -1:].reshape(-1), values[:, -1:, :].reshape(-1)])
    cut = jnp.finfo(values.dtype).eps * max(values.shape) * jnp.max(ends, initial=0)
    return reciprocal(jnp.where(values > cut, values, 0) + damping)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, 0 for 0."""
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def turned(bases: list[jax.Array | None], x: jax.Array) -> jax.Array:
    """Q_a^T X Q_g; None for the identity."""
    x = x if bases[0] is None else product(_transposed(bases[0]), x)
    return x if bases[1] is None else product(x, bases[1])


def turned_back(bases: list[jax.Array | None], x: jax.Array) -> jax.Array:
    """Q_a X Q_g^T; None for the identity."""
    x = x if bases[0] is None else product(bases[0], x)
    return x if bases[1] is None else product(x, _transposed(bases[1]))


def _transposed(x: jax.Array) -> jax.Array:
    """Of (B, m, n). A matrix alone is transposed as such, or XLA would copy it for `product`."""
    return x[0].T[None] if x.shape[0] == 1 else jnp.swapaxes(x, 1, 2)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix products (B, m, k) (B, k, n)."""
    if x.shape[0] == 1:
        return jnp.matmul(x[0], y[0], precision=jax.lax.Precision.HIGHEST)[None]
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The inner product of two arrays (B, p, q)."""
    # Without an axis of size one, as in `product`: XLA would make x twice, once in each shape.
    # (And so it would for `vdot`.)
    return jnp.sum(x[0] * y[0]) if x.shape[0] == 1 else jnp.sum(x * y)


def spectrum(
    block: Block, uses: list[Used], own: Moments, *, corrected: bool
) -> tuple[list[jax.Array | None], jax.Array]:
    """The two bases of a block, None for the identity, and its eigenvalues there (B, p, q).

    `corrected`: second moments in that basis in place of products of the factors' eigenvalues.
    """
    bases: list[jax.Array | None] = []
    values: list[jax.Array] = []
    for m in own:
        found = (m, None) if is_diagonal(m) else _eigen(_upper.whole(m), looped=False)
        values.append(found[0])
        bases.append(found[1])
    if block.kind == "rows":
        return [None, *bases], values[0][:, None, :]
    if corrected:
        return bases, squares(block, uses, *bases)
    return bases, values[0][:, :, None] * values[1][:, None, :]

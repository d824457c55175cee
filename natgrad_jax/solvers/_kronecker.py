"""Second moments of what enters and leaves the uses of a block: the factors of K-FAC.

A block (B, p, q) has one moment for each side, (B, p, p) and (B, q, q); a diagonal one (B, p) where
one-hot vectors enter. A block of plain rows has one moment, its own exact Fisher matrix (1, q, q),
or its diagonal (1, q) when it is large.
"""

import functools
from collections.abc import Callable
from typing import Any

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

#: The largest number of entries without a linear use that get a block and not a diagonal.
MAX_ROWS = 256

#: Order from which half of a second moment is computed and half is copied.
_LARGE = 768

Moments = tuple[jax.Array, ...]


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
    return (_of_rows(rows)[None],)


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
    left, right = zip(*pairs, strict=True)
    return sum(left[1:], left[0]) / len(pairs), sum(right[1:], right[0])


def _balanced(left: jax.Array, right: jax.Array) -> Moments:
    """The same product with equal traces: inputs and outputs of a use have different units."""
    traces = _trace(left), _trace(right)
    usable = (traces[0] > 0) & (traces[1] > 0)
    scale = jnp.where(usable, jnp.sqrt(traces[1] / jnp.where(usable, traces[0], 1)), 1)
    return left * scale, right / scale


def _trace(moment: jax.Array) -> jax.Array:
    if moment.ndim == 2:
        return jnp.sum(moment)
    return jnp.sum(jnp.diagonal(moment, axis1=1, axis2=2))


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


def _second_moment(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """sum_nct w_n x x^T of (N, C, B, T, k): (B, k, k)."""
    if weights is not None:
        x = x * jnp.sqrt(weights).astype(x.dtype).reshape(-1, 1, 1, 1, 1)
    if x.shape[2] == 1:
        return _of_rows(factored.as_matrix(x))[None]
    return factored.einsum("ncbti,ncbtj->bij", x, x)


def _of_rows(rows: jax.Array) -> jax.Array:
    """R^T R. Of a large one the block above the diagonal is that below: a quarter of the work."""
    order = rows.shape[1]
    if order < _LARGE:
        return factored.matmul(rows.T, rows)
    one, two = rows[:, : order // 2], rows[:, order // 2 :]
    below = factored.matmul(two.T, one)
    first, last = factored.matmul(one.T, one), factored.matmul(two.T, two)
    return jnp.block([[first, below.T], [below, last]])


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
    sources: list[jax.Array],
    old: list[Any],
    make: Callable[[jax.Array, jax.Array, jax.Array], Any],
    scalars: jax.Array,
    *,
    scale: jax.Array | None = None,
    padded: Callable[[int], int] | None = None,
) -> list[Any]:
    """Renews items in turns, so that each is renewed once in a period and no step renews all.

    Items are made by a loop over those that are due: one program for all of the same order, or,
    padded, for all.

    Args:
      count: steps so far; at step 0 everything is renewed.
      period: in steps.
      sources: what items are made of, (B, n, n) each.
      old: the items, trees of arrays (B, n) or (B, n, n).
      make: (source (B, m, m) with zeros past n, scalar (B,), n) -> item with m in place of n.
      scalars: of each item, (items, largest B).
      scale: of all sources, multiplied when one is loaded.
      padded: the largest order n -> m; None for m = n.

    Returns:
      The items.
    """
    scaled = lambda x: x if scale is None else scale * x
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
            scaled,
            padded(order) if padded else order,
        )
        for i, x in zip(items, made, strict=True):
            new[i] = x
    return new


def _renewed_class(
    due: jax.Array,
    sources: list[jax.Array],
    old: list[Any],
    make: Callable[[jax.Array, jax.Array, jax.Array], Any],
    scalars: jax.Array,
    scaled: Callable[[jax.Array], jax.Array],
    order: int,
) -> list[Any]:
    count, numbers = len(sources), jnp.arange(len(sources))

    def next_due(k: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(due & (numbers >= k), numbers, count))

    def load(i: int) -> jax.Array:
        rest = order - sources[i].shape[1]
        return jnp.pad(scaled(sources[i]), ((0, 0), (0, rest), (0, rest)))

    def store(item: Any, old: Any, here: jax.Array) -> Any:
        cut = lambda x, like: x[tuple(slice(n) for n in like.shape)]
        run = lambda carry: (jnp.asarray(False), jax.tree.map(cut, item, carry[1]))
        # Neither `switch` nor `where`: they copy or pass over all items.
        return jax.lax.while_loop(lambda carry: carry[0], run, (here, old))[1]

    def step(carry: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        k, items = carry
        source = jax.lax.switch(k, [functools.partial(load, i) for i in range(count)])
        # An item alone in its class does not depend on k: XLA would make it outside, on every step.
        source, k = jax.lax.optimization_barrier((source, k))
        orders = jnp.asarray([x.shape[1] for x in sources])
        item = make(source, scalars[k], orders[k])
        return next_due(k + 1), [store(item, old, k == i) for i, old in enumerate(items)]

    # Not `cond`, which runs both branches under vmap.
    return jax.lax.while_loop(lambda c: c[0] < count, step, (next_due(jnp.asarray(0)), old))[1]


def empty(block: Block) -> Moments:
    """Moments of zero."""
    b, p, q = block.shape
    if block.kind == "rows":
        return (jnp.zeros((1, q) if q > MAX_ROWS else (1, q, q)),)
    return jnp.zeros((b, p) if block.kind == "look-up" else (b, p, p)), jnp.zeros((b, q, q))


def mean_eigenvalues(sides: list[jax.Array]) -> jax.Array:
    """The mean eigenvalue of each moment (B, n, n) or diagonal (B, n): (sides, largest B)."""
    if not sides:
        return jnp.zeros((0, 1))
    copies = max(x.shape[0] for x in sides)

    def line(x: jax.Array) -> jax.Array:
        b, n = x.shape[:2]
        # A strided slice where `jnp.diagonal` gathers, which takes a kernel for each side.
        entries = x if x.ndim == 2 else x.reshape(b, n * n)[:, :: n + 1]
        return entries if b == copies else jnp.pad(entries, ((0, copies - b), (0, 0)))

    # One reduction for all, for the same reason.
    sizes = np.asarray([x.shape[1] for x in sides])
    owners = np.repeat(np.arange(len(sides)), sizes)
    own = jnp.arange(len(sides))[:, None, None] == jnp.asarray(owners)[None, None, :]
    totals = jnp.sum(jnp.where(own, jnp.concatenate([line(x) for x in sides], axis=1), 0), axis=2)
    return totals / np.maximum(sizes, 1).astype(totals.dtype)[:, None]


def eigen(moments: jax.Array, scalar: jax.Array, order: jax.Array) -> Any:
    """Eigenvalues (B, n) and eigenvectors (B, n, n) of moments, made by `in_turns`."""
    del scalar, order
    return _eigen(moments, looped=True)


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
    x = x if bases[0] is None else product(jnp.swapaxes(bases[0], 1, 2), x)
    return x if bases[1] is None else product(x, bases[1])


def turned_back(bases: list[jax.Array | None], x: jax.Array) -> jax.Array:
    """Q_a X Q_g^T; None for the identity."""
    x = x if bases[0] is None else product(bases[0], x)
    return x if bases[1] is None else product(x, jnp.swapaxes(bases[1], 1, 2))


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix products (B, m, k) (B, k, n)."""
    if x.shape[0] == 1:
        return jnp.matmul(x[0], y[0], precision=jax.lax.Precision.HIGHEST)[None]
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def spectrum(
    block: Block, uses: list[Used], own: Moments, *, corrected: bool
) -> tuple[list[jax.Array | None], jax.Array]:
    """The two bases of a block, None for the identity, and its eigenvalues there (B, p, q).

    `corrected`: second moments in that basis in place of products of the factors' eigenvalues.
    """
    eigens = [None if m.ndim == 2 else _eigen(m, looped=False) for m in own]
    bases = [None if e is None else e.vectors for e in eigens]
    values = [m if e is None else e.values for m, e in zip(own, eigens, strict=True)]
    if block.kind == "rows":
        return [None, *bases], values[0][:, None, :]
    if corrected:
        return bases, squares(block, uses, *bases)
    return bases, values[0][:, :, None] * values[1][:, None, :]

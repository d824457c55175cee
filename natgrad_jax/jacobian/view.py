"""Strided views of a parameter: what reshapes, transposes, slices and broadcasts leave of it.

A view says for each of its entries which entry of the flat parameter it is: an offset and, for
each dimension, pieces (size, stride) from slow to fast. Stride 0 is a broadcast.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Piece = tuple[int, int]
Pieces = tuple[Piece, ...]
Shape = tuple[int, ...]


class View(NamedTuple):
    """A view of a parameter, or of an array computed from parameters alone.

    Attributes:
      root: which array; leaves of the parameters come first.
      dims: the pieces of each dimension, slow to fast.
      offset: flat index of the first entry.
      scale: None, or a scalar that multiplies the view.
      factor: the value of that scalar where it is known now; None where not.
      scanned: for each enclosing scan, by depth, that runs over the array: the pieces it runs over.
    """

    root: int
    dims: tuple[Pieces, ...]
    offset: int = 0
    scale: jax.Array | None = None
    factor: complex | None = 1
    scanned: tuple[tuple[int, Pieces], ...] = ()


def whole(root: int, shape: Shape) -> View:
    """The view of all of an array as it is."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return View(root, tuple(piece(n, s) for n, s in zip(shape, strides, strict=True)))


def size(pieces: Pieces) -> int:
    """The number of entries that pieces run over."""
    return math.prod(n for n, _ in pieces)


def piece(n: int, stride: int) -> Pieces:
    """The pieces of a dimension with one stride."""
    return () if n == 1 else ((n, stride),)


def scanned_over(view: View, depth: int) -> View:
    """One slice along the leading dimension, as the body of a scan sees it."""
    return view._replace(dims=view.dims[1:], scanned=(*view.scanned, (depth, view.dims[0])))


def window_at(view: View, t: int) -> View | None:
    """Entry t along the leading dimension, or None where that is no view."""
    sizes = [1, *(size(p) for p in view.dims[1:])]
    starts = [t, *(0 for _ in view.dims[1:])]
    row = strided(view, starts, sizes, [1] * len(sizes))
    return None if row is None else row._replace(dims=row.dims[1:])


def joined(view: View, dims: Any) -> Pieces:
    """The pieces of several dimensions of a view, one after the other."""
    return tuple(piece for d in dims for piece in view.dims[d])


def is_broadcast(pieces: Pieces) -> bool:
    """Whether all that pieces run over is one entry."""
    return all(stride == 0 for _, stride in pieces)


def merged(pieces: Pieces) -> Pieces:
    """Joins neighbours that run over memory without a gap."""
    result: list[Piece] = []
    for n, stride in pieces:
        if result and result[-1][1] == n * stride:
            result[-1] = (result[-1][0] * n, stride)
        elif n != 1:
            result.append((n, stride))
    return tuple(result)


def indices(offset: int, pieces: Pieces) -> np.ndarray:
    """Flat indices of all entries, slow to fast."""
    total = np.asarray([offset])
    for n, stride in pieces:
        total = (total[:, None] + stride * np.arange(n)[None, :]).reshape(-1)
    return total


def take(array: jax.Array, offset: int, pieces: Pieces) -> jax.Array:
    """The entries that pieces run over, in their order, of an array: (entries,)."""
    if not size(pieces):
        return jnp.zeros((0,), array.dtype)
    pieces = _refined(pieces, array.shape)
    cut = _cut(array.shape, offset, pieces)
    if cut is None:
        return array.reshape(-1)[indices(offset, pieces)]
    window, order = cut
    block = array
    if any(w != (0, n, 1) for w, n in zip(window, array.shape, strict=True)):
        starts, stops, steps = zip(*window, strict=True)
        block = jax.lax.slice(array, starts, stops, steps)
    sorted_sizes = [n for n, _ in sorted(pieces, key=lambda p: -p[1])]
    return block.reshape(sorted_sizes).transpose(order).reshape(-1)


def place(entries: jax.Array, shape: Shape, offset: int, pieces: Pieces) -> jax.Array:
    """The transpose of `take`: an array of this shape, zero elsewhere."""
    if not size(pieces):
        return jnp.zeros(shape, entries.dtype)
    pieces = _refined(pieces, shape)
    cut = _cut(shape, offset, pieces)
    if cut is None:
        flat = jnp.zeros((math.prod(shape),), entries.dtype)
        return flat.at[indices(offset, pieces)].add(entries).reshape(shape)
    window, order = cut
    ordered = entries.reshape([n for n, _ in pieces]).transpose(np.argsort(order))
    block = ordered.reshape([len(range(*w)) for w in window])
    if block.shape == shape:
        return block
    padding = [
        (start, n - (start + (len(range(start, stop, step)) - 1) * step + 1), step - 1)
        for (start, stop, step), n in zip(window, shape, strict=True)
    ]
    return jax.lax.pad(block, jnp.zeros((), block.dtype), padding)


def window(shape: Shape, offset: int, pieces: Pieces) -> list[tuple[int, int, int]] | None:
    """The (start, stop, step) along each dimension that holds just these entries, or None."""
    cut = _cut(shape, offset, _refined(pieces, shape))
    return None if cut is None else cut[0]


def _refined(pieces: Pieces, shape: Shape) -> Pieces:
    """Splits pieces where they run from one dimension into the next."""
    strides = sorted(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    result: list[Piece] = []
    for n, stride in pieces:
        inner: list[Piece] = []
        for border in strides:
            step = border // stride if stride and border % stride == 0 else 0
            if 1 < step < n and n % step == 0:
                inner.insert(0, (step, stride))
                n, stride = n // step, border
        result += [(n, stride), *inner]
    return tuple(result)


def _cut(
    shape: Shape, offset: int, pieces: Pieces
) -> tuple[list[tuple[int, int, int]], list[int]] | None:
    """A strided window, one range a dimension, that holds just these entries, and their order."""
    ordered = sorted(pieces, key=lambda p: -p[1])
    window, rest = [], list(ordered)
    for d, length in enumerate(shape):
        stride = math.prod(shape[d + 1 :])
        start = offset // stride % length if length else 0
        own = [(n, s // stride) for n, s in rest if s >= stride and s % stride == 0]
        rest = rest[len(own) :]
        step = own[-1][1] if own else 1
        count, expected = size(tuple(own)), step
        for n, s in reversed(own):
            if s != expected:
                return None
            expected = s * n
        window.append((start, start + (count - 1) * step + 1, step))
        if window[-1][1] > length:
            return None
    if rest:
        return None
    return window, [ordered.index(p) for p in pieces]


def split_dim(pieces: Pieces, sizes: Shape) -> tuple[Pieces, ...] | None:
    """Splits the pieces of one dimension into dimensions of these sizes, or None."""
    result, queue = [], list(pieces)
    for length in sizes:
        taken: list[Piece] = []
        while length > 1:
            if not queue:
                return None
            n, stride = queue.pop(0)
            if length % n == 0:
                taken.append((n, stride))
                length //= n
            elif n % length == 0:
                taken.append((length, stride * (n // length)))
                queue.insert(0, (n // length, stride))
                length = 1
            else:
                return None
        result.append(tuple(taken))
    return tuple(result)


def strided(view: View, starts: Any, sizes: Any, steps: Any) -> View | None:
    """The window of a view with these starts, sizes and steps, or None where that is no view."""
    dims, offset = [], view.offset
    for pieces, start, count, step in zip(view.dims, starts, sizes, steps, strict=True):
        if count == size(pieces) and step == 1:
            dims.append(pieces)
        elif len(pieces) == 1:
            ((_, stride),) = pieces
            offset += int(start) * stride
            dims.append(piece(int(count), stride * int(step)))
        else:
            return None
    return view._replace(dims=tuple(dims), offset=offset)

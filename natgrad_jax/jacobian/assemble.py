"""Gathers the uses of each parameter into factors that do not overlap."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.labels import Slice
from natgrad_jax.jacobian.tape import EXAMPLES
from natgrad_jax.jacobian.tape import PARAMETER
from natgrad_jax.jacobian.tape import POSITIONS
from natgrad_jax.jacobian.tape import Site
from natgrad_jax.jacobian.view import Pieces


class Placed(NamedTuple):
    """Rows that were found at a place.

    Attributes:
      place: which entries of a root.
      group: of the examples.
      part: the rows.
      site: the number of the use in the reading of its group; None for dense rows.
    """

    place: Place
    group: int
    part: Part
    site: int | None = None


def place_of(site: Site, shape: tuple[int, ...]) -> Place:
    """Which entries of its root a site covers, pieces in a fixed order."""
    scanned = [pieces for _, pieces in site.view.scanned]
    b = [piece for pieces in scanned for piece in pieces] + list(site.use.b)
    order = lambda pieces: views.merged(tuple(sorted((p for p in pieces if p[1]), key=_slow_first)))
    parts = [order(b), order(site.use.p), order(site.use.q)]
    if site.use.left is None:
        parts = [(), (), order([*b, *site.use.q])]
    return Place(site.view.root, shape, site.view.offset, *parts)


def _slow_first(piece: tuple[int, int]) -> int:
    return -piece[1]


def part_of(
    site: Site, record: Any, cotangent: jax.Array, dtype: jnp.dtype, *, apart: bool = False
) -> Part:
    """The arrays of a site, laid out as its place says. `cotangent` has columns in front.

    They are complex where the use is. `apart`: every position counts as an example of its own.
    """
    use, depth = site.use, len(site.loops)
    left, right = use.left, use.right
    for _ in range(depth):
        left = None if left is None else jax.vmap(left)
        right = jax.vmap(right)
    columns = jax.vmap(right, in_axes=(None, 0))(record, cotangent)
    scanned = [piece for _, pieces in site.view.scanned for piece in pieces]
    b = (*scanned, *use.b)
    gathered = _loops_inside(columns, 1, site.loops)  # (C, N, B, T, q)
    rows = _sorted(_cast(jnp.moveaxis(gathered, 0, 1), dtype), use.q, 4)
    if left is None:
        rows = _positions_first(rows)[:, :, :, 0] if apart else jnp.sum(rows, axis=3)
        flat = rows.reshape(*rows.shape[:2], -1)
        q = (*b, *views.merged(_ordered(use.q)))
        return Part(None, _sorted(flat, q, 2)[:, :, None, None, :])
    inputs = left(record)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        index = _loops_inside(inputs[..., None], 0, site.loops)[..., 0][:, None]
        index, rows = _sorted(index, b, 2), _sorted(rows, b, 2)
        return Part(*map(_positions_first, (index, rows))) if apart else Part(index, rows)
    inputs = _loops_inside(_cast(inputs, dtype), 0, site.loops)[:, None]
    inputs, rows = _sorted(_sorted(inputs, use.p, 4), b, 2), _sorted(rows, b, 2)
    return Part(*map(_positions_first, (inputs, rows))) if apart else Part(inputs, rows)


def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array in a real dtype, or the complex one of the same precision."""
    return x.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype)


def of_all_examples(found: list[tuple[Placed, Slice | None]]) -> list[Placed]:
    """Parts of slices of the examples, put together to parts of all where they complete another."""
    result = [entry for entry, held in found if held is None]
    slices: dict[Any, list[tuple[Slice, Placed]]] = {}
    for entry, held in found:
        if held is not None:
            key = entry.place, jax.tree.map(lambda x: (x.shape[1:], x.dtype), entry.part)
            slices.setdefault(str(key), []).append((held, entry))
    for own in slices.values():
        own.sort(key=lambda pair: pair[0].start)
        ends = [0, *(held.stop for held, _ in own)]
        chained = all(held.start == end for (held, _), end in zip(own, ends, strict=False))
        if chained and ends[-1] == own[0][0].total:
            parts = [entry.part for _, entry in own]
            whole = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
            result.append(own[0][1]._replace(part=whole))
        else:
            result += [entry._replace(part=_padded(entry.part, held)) for held, entry in own]
    return sorted(result, key=lambda entry: entry.site)


def _padded(part: Part, held: Slice) -> Part:
    """The part with rows of zeros for the other examples."""
    before, after = held.start, held.total - held.stop
    pad = lambda x: jnp.pad(x, [(before, after), *((0, 0) for _ in x.shape[1:])])
    return jax.tree.map(pad, part)


def _positions_first(x: jax.Array) -> jax.Array:
    """(N, C, B, T, ...) to (N T, C, B, 1, ...)."""
    moved = jnp.moveaxis(x, 3, 1)
    return moved.reshape(-1, *moved.shape[2:])[:, :, :, None]


def _ordered(pieces: Pieces) -> Pieces:
    return tuple(sorted((p for p in pieces if p[1]), key=_slow_first))


def _loops_inside(x: jax.Array, lead: int, loops: tuple[str, ...]) -> jax.Array:
    """Moves axes of scans, after `lead` others, to what they run over: (..., N, B, T, x)."""
    if not loops:
        return x
    n, b, t, last = range(lead + len(loops), x.ndim)
    axes_of = lambda kind: [lead + i for i, own in enumerate(loops) if own == kind]
    examples, over = [*axes_of(EXAMPLES), n], [*axes_of(PARAMETER), b]
    along = [*axes_of(POSITIONS), t]
    sizes = [math.prod(x.shape[i] for i in axes) for axes in (examples, over, along)]
    moved = x.transpose(*range(lead), *examples, *over, *along, last)
    return moved.reshape(*x.shape[:lead], *sizes, x.shape[last])


def _sorted(x: jax.Array, pieces: Pieces, axis: int) -> jax.Array:
    """Brings the pieces along an axis into descending strides, broadcast ones summed."""
    if views.merged(pieces) == views.merged(_ordered(pieces)):
        return x
    split = x.reshape(*x.shape[:axis], *(n for n, _ in pieces), *x.shape[axis + 1 :])
    summed = [axis + i for i, (_, stride) in enumerate(pieces) if not stride]
    split = jnp.sum(split, axis=tuple(summed))
    kept = [p for p in pieces if p[1]]
    order = sorted(range(len(kept)), key=lambda i: -kept[i][1])
    axes = [
        *range(axis),
        *(axis + i for i in order),
        *range(axis + len(kept), split.ndim),
    ]
    return split.transpose(axes).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def factors_of(placed: list[Placed], groups: int) -> list[Factor]:
    """Joins parts of one place along positions; overlapping places of a root become rows."""
    factors: list[Factor] = []
    for root in dict.fromkeys(entry.place.leaf for entry in placed):
        own = [entry for entry in placed if entry.place.leaf == root]
        factors += _of_one_root(own, groups)
    return factors


def aligned(place: Place, other: Place) -> bool:
    """Whether two places are the same up to the order of left and right."""
    fixed = (place.offset, place.b) == (other.offset, other.b)
    return fixed and {(place.p, place.q), (place.q, place.p)} >= {(other.p, other.q)}


def apart(place: Place, other: Place) -> bool:
    """Whether two places of one leaf are known to share no entry."""
    if not (math.prod(place.sizes) and math.prod(other.sizes)):
        return True
    windows = [views.window(x.shape, x.offset, x.b + x.p + x.q) for x in (place, other)]
    if windows[0] is None or windows[1] is None:
        return False
    for (a, b, s), (c, d, t) in zip(*windows, strict=True):
        if b <= c or d <= a or (s == t and (a - c) % s):
            return True
    return False


def groups_of_places(places: list[Place]) -> list[list[int]] | None:
    """Indices of places that coincide; None when some overlap otherwise."""
    sets: list[list[int]] = []
    for i, place in enumerate(places):
        same = [s for s in sets if aligned(places[s[0]], place)]
        if same:
            same[0].append(i)
        elif all(apart(places[s[0]], place) for s in sets):
            sets.append([i])
        else:
            return None
    return sets


def _of_one_root(own: list[Placed], groups: int) -> list[Factor]:
    sets = groups_of_places([entry.place for entry in own])
    if sets is None:
        place = own[0].place
        total: list[Part | None] = [None] * groups
        for at, group, part, _ in own:
            rows = factored.rows(at, part)[:, :, None, None, :]
            before = total[group]
            total[group] = Part(None, rows if before is None else before.right + rows)
        return [Factor(dense_place(place.leaf, place.shape), tuple(total))]
    factors = []
    for indices in sets:
        place = own[indices[0]].place
        parts: list[Part | None] = [None] * groups
        for group in range(groups):
            same = [oriented(own[i], place) for i in indices if own[i].group == group]
            parts[group] = along_positions(place, same) if same else None
        factors.append(Factor(place, tuple(parts)))
    return factors


def dense_place(leaf: int, shape: tuple[int, ...]) -> Place:
    """The place of plain rows."""
    return Place(leaf, shape, 0, (), (), views.merged(((math.prod(shape), 1),)))


def oriented(entry: Placed, target: Place) -> Part:
    """The part with left and right as in `target`."""
    place, part = entry.place, entry.part
    if (place.p, place.q) == (target.p, target.q):
        return part
    return Part(part.right, factored.explicit(part, place.sizes[1]))


def along_positions(place: Place, parts: list[Part]) -> Part:
    """Parts of the same examples at one place as one."""
    if len(parts) == 1:
        return parts[0]
    if all(part.left is None for part in parts):
        return Part(None, sum((part.right for part in parts[1:]), parts[0].right))
    if all(part.looks_up for part in parts):
        left = jnp.concatenate([part.left for part in parts], axis=3)
    else:
        left = _stacked([factored.explicit(part, place.sizes[1]) for part in parts])
    return Part(left, _stacked([part.right for part in parts]))


def _stacked(arrays: list[jax.Array]) -> jax.Array:
    columns = max(x.shape[1] for x in arrays)
    wide = [jnp.broadcast_to(x, (x.shape[0], columns, *x.shape[2:])) for x in arrays]
    return jnp.concatenate(wide, axis=3)

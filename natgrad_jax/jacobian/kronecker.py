"""What K-FAC sees of a model: its parameters in blocks, and what enters and leaves each of them.

A block is one linear use (or several of the same parameter) with the bias that is added to its
result. Its entries stand as (B, p, q): B independent copies, p inputs with the bias as the last
one, q outputs. What has no linear use is a block of plain rows, (1, 1, q).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _trees
from natgrad_jax.examples import Group
from natgrad_jax.jacobian import assemble
from natgrad_jax.jacobian import columns
from natgrad_jax.jacobian import complex_rows
from natgrad_jax.jacobian import dense
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian import parts as rows_found
from natgrad_jax.jacobian import plan
from natgrad_jax.jacobian import reader
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian._jaxpr import has_forward_mode
from natgrad_jax.jacobian.assemble import Placed
from natgrad_jax.jacobian.blocks import Bias
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.blocks import layout
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.joined import leaves_behind
from natgrad_jax.jacobian.plan import Model
from natgrad_jax.jacobian.plan import Plan
from natgrad_jax.jacobian.reader import Reading
from natgrad_jax.jacobian.tape import Site

Tree = Any


class Used(NamedTuple):
    """One way in which the examples of one group use a block.

    Attributes:
      part: what enters and leaves, (N, C or 1, B, T, p) and (N, C or 1, B, T, q).
      weights: of the examples, (N,); the outputs' side of `part` holds their roots.
      group: of the examples.
      swapped: whether inputs and outputs of the use stand on each other's side.
    """

    part: Part
    weights: jax.Array
    group: int
    swapped: bool


class Kronecker(NamedTuple):
    """A model's parameters in blocks.

    Attributes:
      blocks: they do not overlap.
      uses: of each block.
      split: params-like tree -> arrays (B, p, q), one a block.
      merge: (arrays, params-like tree) -> tree; entries in no block are those of the tree given.
      covers: whether every entry is in a block.
      positions_apart: whether a model that mixes examples had every position counted as one.
      leaves: for each block the parameter leaves behind it.
      joined: arrays that join parameters, where blocks speak of them.
    """

    blocks: list[Block]
    uses: list[list[Used]]
    split: Callable[[Tree], list[jax.Array]]
    merge: Callable[[list[jax.Array], Tree], Tree]
    covers: bool
    positions_apart: bool
    leaves: list[list[int]]
    joined: dict[int, Joined]


class _Family(NamedTuple):
    """Uses of the same entries of one root."""

    place: Place
    members: list[Placed]


def kronecker(
    caller: str,
    function: Any,
    params: Tree,
    batch: Tree,
    output_metric: Any,
    groups: tuple[Group, ...],
    independent: bool | None = None,
    *,
    weighted: bool = False,
) -> Kronecker:
    """The blocks of a model and their uses; the first arguments are those of `engine.jacobian`.

    `weighted`: whether rows have weights of their own.
    """
    if output_metric.removed is not None:
        raise ValueError(
            f"{caller}: a centered metric has no Kronecker factors; take centered=False, or an"
            " exact solver such as woodbury()"
        )
    if any(group.size == 0 for group in groups):
        raise ValueError(f"{caller}: the batch is empty: Kronecker factors need an example")
    model = plan.flatten(caller, function, params, batch, groups)
    if weighted:
        model = plan.with_rows_as_examples(model)
    dtype = _trees.work_dtype(params)

    made, entries = _found(model, output_metric, independent, dtype)
    apart = made.reason is not None
    entries = [real for entry in entries for real in _real(entry, made.readings[0].joined)]
    joined = {root: j for root, j in made.readings[0].joined.items() if not j.units}
    # The order of parameters, not that of equations: it must not depend on the batch.
    first = lambda family: (min(leaves_behind(family.place.leaf, joined)), family.place.offset)
    families = sorted(_families(entries), key=first)
    biases = _biases(made, families)
    taken = {bias for bias, _ in biases.values()}
    weights = _example_weights(model, made, output_metric, dtype)
    blocks, uses = [], []
    for number, family in enumerate(families):
        if number in taken:
            continue
        bias = biases[number][1] if number in biases else None
        block = Block(family.place, bias, _kind(family))
        blocks.append(block)
        uses.append(_uses(block, family, weights, weighted=weighted))
    split, merge, covers = layout(blocks, joined, params)
    leaves = [
        [
            *leaves_behind(b.place.leaf, joined),
            *(leaves_behind(b.bias.root, joined) if b.bias else ()),
        ]
        for b in blocks
    ]
    return Kronecker(blocks, uses, split, merge, covers, apart, leaves, joined)


def _found(
    model: Model, output_metric: Any, independent: bool | None, dtype: Any
) -> tuple[Plan, list[Placed]]:
    """How the rows of a model are taken, and what was found.

    JAX 0.10 may find a derivative rule that was batched before in its caches, and lose where its
    examples lie ("Store empty"). Blocks must be those of the first step: the model then is read
    afresh.
    """

    def read() -> tuple[Plan, list[Placed]]:
        made = plan.plan(model, output_metric.coefficients, independent)
        if made.reason is not None:
            return made, _one_pass(model, made, output_metric, dtype)
        return rows_found.parts_of(model, made, output_metric, dtype)

    try:
        return read()
    except Exception:
        if has_forward_mode(model.function, model.params, model.batch):
            raise  # nothing here is a rule of the user's
        jax.clear_caches()
        return read()


def _real(entry: Placed, joined: dict[int, Joined]) -> list[Placed]:
    """Rows of a complex array as those of the parameters that it is made of."""
    joint = joined.get(entry.place.leaf)
    if joint is None or not joint.units:
        return [entry]
    return [
        Placed(
            complex_rows.place_in_leaf(entry.place, joint, number),
            entry.group,
            complex_rows.real_part(entry.part, unit),
        )
        for number, unit in enumerate(joint.units)
    ]


def _one_pass(model: Model, made: Plan, output_metric: Any, dtype: Any) -> list[Placed]:
    """Uses in a model that mixes examples, from one backward pass for all rows at once.

    The cotangent of a position is that of the sum over rows, as in every implementation of K-FAC;
    each position counts as an example. Parameters without linear uses have exact rows.
    """
    (reading,) = made.readings
    rest: set[int] = set(reading.opaque)
    entries: list[Placed] = []
    if reading.sites:
        behind = [leaf for root in reading.derived for leaf in reading.sources[root]]
        rest |= set(behind)
        outputs, pull, records = reader.pull_back(reading, model.params, model.batch)
        cotangents = columns.everywhere(output_metric)
        cast = [c.astype(z.dtype) for c, z in zip(cotangents, outputs, strict=True)]
        pulled = rows_found.over_columns(pull, cast, reading)
        shapes = rows_found.root_shapes(reading, model.params)
        rest |= _overlapping(reading, shapes)
        for k, (site, record, g) in enumerate(zip(reading.sites, records, pulled, strict=True)):
            if rest.isdisjoint(reading.sources[site.view.root]):
                root = shapes[site.view.root]
                place = assemble.place_of(site, root.shape)
                part = assemble.part_of(site, record, g, dtype, apart=True)
                if not jnp.issubdtype(root.dtype, jnp.complexfloating):
                    part = complex_rows.real_part(part)
                entries.append(Placed(place, 0, part, k))
    leaves = sorted(rest)
    if leaves:
        cotangents = columns.cotangents(output_metric, made.rows)
        rows = dense.column_rows(model.function, model.params, model.batch, leaves, cotangents)
        entries += rows_found.dense_parts(leaves, model, rows, dtype)
    return entries


def _overlapping(reading: Reading, shapes: dict[int, jax.ShapeDtypeStruct]) -> set[int]:
    """The parameters whose uses overlap in part."""
    found: set[int] = set()
    for root in {site.view.root for site in reading.sites}:
        own = [site for site in reading.sites if site.view.root == root]
        if (
            assemble.groups_of_places([assemble.place_of(s, shapes[root].shape) for s in own])
            is None
        ):
            found |= reading.sources[root]
    return found


def _families(entries: list[Placed]) -> list[_Family]:
    families = []
    for root in dict.fromkeys(e.place.leaf for e in entries):
        own = [e for e in entries if e.place.leaf == root]
        sets = assemble.groups_of_places([e.place for e in own])
        for indices in [list(range(len(own)))] if sets is None else sets:
            members = [own[i] for i in indices]
            # Rows beside a linear use, or uses that overlap in part: their sum is exact as rows.
            plain = {e.part.left is None for e in members}
            families.append(
                _as_rows(members)
                if sets is None or len(plain) > 1
                else _Family(members[0].place, members)
            )
    return families


def _as_rows(members: list[Placed]) -> _Family:
    """Uses of one root as its plain rows."""
    place = assemble.dense_place(members[0].place.leaf, members[0].place.shape)
    rows = {}
    for group in dict.fromkeys(e.group for e in members):
        own = [factored.rows(e.place, e.part) for e in members if e.group == group]
        rows[group] = Part(None, sum(own[1:], own[0])[:, :, None, None, :])
    return _Family(place, [Placed(place, group, part) for group, part in rows.items()])


def _kind(family: _Family) -> str:
    if any(e.part.looks_up for e in family.members):
        return "look-up"
    return "rows" if all(e.part.left is None for e in family.members) else "kronecker"


def _biases(made: Plan, families: list[_Family]) -> dict[int, tuple[int, Bias]]:
    """For families of linear uses the family of biases that goes with each, and as which entries.

    Every use must have its bias, the same for all.
    """
    where = {(e.group, e.site): i for i, f in enumerate(families) for e in f.members}
    found: dict[int, tuple[int, Bias]] = {}
    for i, family in enumerate(families):
        if _kind(family) != "rows" or any(e.site is None for e in family.members):
            continue
        pairs = []
        for e in family.members:
            sites = made.readings[e.group].sites
            site = sites[e.site]
            if site.bias_of:
                partner = e.site - site.bias_of
                pairs.append((where.get((e.group, partner)), _bias(site, sites[partner], e.place)))
        hosts = {host for host, _ in pairs}
        if len(pairs) < len(family.members) or len(hosts) != 1:
            continue
        (host,) = hosts
        indices = [index for _, index in pairs]
        if host is None or host in found or any(x is None for x in indices):
            continue
        same = all(np.array_equal(indices[0], x) for x in indices)
        straight = all(e.place == families[host].place for e in families[host].members)
        fits = _kind(families[host]) == "kronecker" and straight
        if fits and same and len(families[host].members) == len(pairs):
            found[host] = i, Bias(family.place.leaf, family.place.shape, indices[0])
    return found


def _bias(site: Site, partner: Site, place: Place) -> np.ndarray | None:
    """Which entries of its root a bias adds to the (b, q) of a use, (B, q); None for no match."""
    loops = len(site.loops)
    shape, result = site.shape[loops:], partner.shape[loops:]
    kept = [d for d in site.use.own if shape[d] > 1]
    own = [d for d in partner.use.own if result[d] > 1]
    at = [site.bias_dims[d] for d in kept]
    if site.loops != partner.loops or sorted(at) != sorted(own):
        return None
    scanned = [piece for _, pieces in site.view.scanned for piece in pieces]
    b = [p for _, pieces in partner.view.scanned for p in pieces] + list(partner.use.b)
    q = list(partner.use.q)
    if any(not stride for _, stride in (*scanned, *b, *q)):
        return None
    index = views.indices(site.view.offset, (*scanned, *site.use.q))
    index = index.reshape([n for n, _ in scanned] + [shape[d] for d in kept])
    first = len(scanned)
    index = index.transpose([*range(first), *(first + at.index(d) for d in own)])
    if index.size != views.size(tuple(b)) * views.size(tuple(q)) or index.size != math.prod(
        place.shape
    ):
        return None
    index = index.reshape(views.size(tuple(b)), views.size(tuple(q)))
    return index[_descending(b)][:, _descending(q)]


def _descending(pieces: list[tuple[int, int]]) -> np.ndarray:
    """Where the entries of pieces stand after these are sorted as in a `Place`."""
    order = sorted(range(len(pieces)), key=lambda i: -pieces[i][1])
    entries = np.arange(views.size(tuple(pieces))).reshape([n for n, _ in pieces])
    return entries.transpose(order).reshape(-1)


def _example_weights(model: Model, made: Plan, output_metric: Any, dtype: Any) -> list[jax.Array]:
    """The weight of every example of each group: the mean over its output leaves."""
    if made.reason is not None:
        return []  # positions all count alike
    if made.mode == "whole":
        return [jnp.ones((1,), dtype)]  # one example
    weights = jax.tree.leaves(output_metric.row_weights)
    result = []
    for number, rows in enumerate(made.rows):
        leaves = [weights[i] for i, _ in dense.wanted_outputs(model, number)]
        own = [jnp.sum(w.reshape(rows.examples, -1), axis=1) for w in leaves]
        nothing = jnp.zeros((rows.examples,), dtype)
        result.append(sum((w.astype(dtype) for w in own), nothing) / max(len(own), 1))
    return result


def _uses(block: Block, family: _Family, weights: list[jax.Array], *, weighted: bool) -> list[Used]:
    uses = []
    for group in sorted({e.group for e in family.members}):
        own = [e for e in family.members if e.group == group]
        for swapped in (False, True):
            side = [e for e in own if (_is_swapped(e.place, block.place)) == swapped]
            if not side:
                continue
            turned = [assemble.oriented(e, block.place) for e in side]
            for part in _joined_parts(block, turned):
                own_weights = weights[group] if weights else _alike(part, weighted=weighted)
                uses.append(Used(_with_bias(block, part), own_weights, group, swapped))
    return uses


def _is_swapped(place: Place, target: Place) -> bool:
    return (place.p, place.q) != (target.p, target.q)


def _joined_parts(block: Block, parts: list[Part]) -> list[Part]:
    """Parts of the same examples as one, along positions."""
    if len({part.examples for part in parts}) == 1:
        return [assemble.along_positions(block.place, parts)]
    return parts


def _alike(part: Part, *, weighted: bool) -> jax.Array:
    """The same weight for every position, but none for those of rows that weigh nothing."""
    used = jnp.ones((part.examples,), part.right.dtype)
    if weighted:
        axes = tuple(range(1, part.right.ndim))
        used = jnp.any(part.right != 0, axis=axes).astype(part.right.dtype)
    return used / jnp.maximum(jnp.sum(used), 1)


def _with_bias(block: Block, part: Part) -> Part:
    """A one stands for the bias among the inputs."""
    if block.bias is None:
        return part
    ones = jnp.ones((*part.left.shape[:-1], 1), part.left.dtype)
    return part._replace(left=jnp.concatenate([part.left, ones], axis=-1))

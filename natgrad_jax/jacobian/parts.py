"""The rows as they are found: of each group the uses in order, then what is dense."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import examples
from natgrad_jax.examples import Group
from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import assemble
from natgrad_jax.jacobian import columns
from natgrad_jax.jacobian import complex_rows
from natgrad_jax.jacobian import dense
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian import reader
from natgrad_jax.jacobian.assemble import Placed
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.labels import Slice
from natgrad_jax.jacobian.plan import Model
from natgrad_jax.jacobian.plan import Plan
from natgrad_jax.jacobian.plan import one_example
from natgrad_jax.jacobian.reader import Flat
from natgrad_jax.jacobian.reader import Reading
from natgrad_jax.jacobian.tape import Site


def factors_of(
    model: Model, made: Plan, output_metric: Any, dtype: Any
) -> tuple[Plan, list[Factor]]:
    """The rows as factors that do not overlap, and the plan as in `parts_of`."""
    made, found = parts_of(model, made, output_metric, dtype)
    return made, assemble.factors_of(found, len(made.rows))


def parts_of(model: Model, made: Plan, output_metric: Any, dtype: Any) -> tuple[Plan, list[Placed]]:
    """The rows as they were found: of each group the uses in order, then what is dense.

    Some derivative rules cannot be evaluated a second time from a jaxpr. Rows of a model with such
    a rule are dense, from the model's own function; the plan that comes back says so.
    """
    cotangents = columns.cotangents(output_metric, made.rows)
    try:
        return made, _found(model, made, cotangents, dtype)
    except Exception as trouble:
        if _jaxpr.has_forward_mode(model.function, model.params, model.batch):
            raise  # nothing here is a rule of the user's
        reason = f"a derivative rule cannot be evaluated again ({type(trouble).__name__})"
    unread = [reader.unread(model.params, reason) for _ in made.readings]
    made = made._replace(readings=unread)
    return made, _found(model, made, cotangents, dtype)


def _found(model: Model, made: Plan, cotangents: list[jax.Array], dtype: Any) -> list[Placed]:
    if made.mode == "vouched":
        return _vouched(model, made, cotangents, dtype)
    if made.mode == "examples":
        return _independent(model, made, cotangents, dtype)
    return _one_piece(model, made.readings[0], cotangents, dtype)


def _independent(model: Model, made: Plan, cotangents: list[jax.Array], dtype: Any) -> list[Placed]:
    """Rows of all examples at once, from one pass over the whole batch for each group."""
    placed: list[Placed] = []
    for number, (reading, rows) in enumerate(zip(made.readings, made.rows, strict=True)):
        if not rows.columns:
            continue
        own = [cotangents[i][: rows.columns] for i, _ in dense.wanted_outputs(model, number)]
        found = site_parts(reading, model.params, model.batch, own, dtype)
        opaque = sorted(reading.opaque)
        if opaque:
            found += dense_parts(
                opaque, model, dense.example_rows(model, made.rows, number, opaque, own), dtype
            )
        placed += [entry._replace(group=number) for entry in found]
    return placed


def _one_piece(
    model: Model, reading: Reading, cotangents: list[jax.Array], dtype: Any
) -> list[Placed]:
    """Rows of a batch that counts as one example, a backward pass for each."""
    placed = site_parts(reading, model.params, model.batch, cotangents, dtype)
    opaque = sorted(reading.opaque)
    if opaque:
        rows = dense.column_rows(model.function, model.params, model.batch, opaque, cotangents)
        placed += dense_parts(opaque, model, rows, dtype)
    return placed


def dense_parts(leaves: list[int], model: Model, rows: list[jax.Array], dtype: Any) -> list[Placed]:
    """Rows (N, C, P_l) of some leaves as parts."""
    return [
        Placed(
            assemble.dense_place(leaf, model.params[leaf].shape),
            0,
            Part(None, x.astype(dtype)[:, :, None, None, :]),
        )
        for leaf, x in zip(leaves, rows, strict=True)
    ]


def _vouched(model: Model, made: Plan, cotangents: list[jax.Array], dtype: Any) -> list[Placed]:
    """Rows example by example, each read as if it were the whole batch."""
    placed: list[Placed] = []
    for number, (group, reading) in enumerate(zip(model.groups, made.readings, strict=True)):
        if not made.rows[number].columns:
            continue
        count = made.rows[number].columns
        outputs = [cotangents[i][:count] for i, _ in dense.wanted_outputs(model, number)]
        own = dense.split_examples(model, made.rows, number, outputs)
        function = dense.outputs_of_group(model, number)
        _check_one_example(model, group, function, own)
        places: list[Any] = []

        def example(
            batch: list[jax.Array],
            columns: list[jax.Array],
            function: Flat = function,
            reading: Reading = reading,
            places: list[Any] = places,
        ) -> list[Part]:
            one = model._replace(function=function, batch=batch)
            found = _one_piece(one, reading, columns, dtype)
            places[:] = [entry._replace(part=None) for entry in found]
            return [entry.part for entry in found]

        parts = examples.map_examples(example, model.batch, group, own)
        flat = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)
        placed += [
            entry._replace(group=number, part=part)
            for entry, part in zip(places, flat, strict=True)
        ]
    return placed


def site_parts(
    reading: Reading,
    params: list[jax.Array],
    batch: list[jax.Array],
    cotangents: list[jax.Array],
    dtype: Any,
) -> list[Placed]:
    """Pulls cotangents (C, L, ...) back to every use, and on to leaves from derived arrays."""
    if not reading.sites:
        return []
    outputs, pull, records = reader.pull_back(reading, params, batch)
    cast = [c.astype(z.dtype) for c, z in zip(cotangents, outputs, strict=True)]
    pulled = over_columns(pull, cast, reading)
    shapes = root_shapes(reading, params)
    found: list[tuple[Placed, Slice | None]] = []
    for number, (site, record, g) in enumerate(zip(reading.sites, records, pulled, strict=True)):
        place = assemble.place_of(site, shapes[site.view.root].shape)
        part = assemble.part_of(site, record, g, dtype)
        if not jnp.issubdtype(shapes[site.view.root].dtype, jnp.complexfloating):
            part = complex_rows.real_part(part)
        found.append((Placed(place, 0, part, number), _slice_of(site)))
    placed: list[Placed] = []
    behind: dict[int, jax.Array] = {}
    for entry in assemble.of_all_examples(found):
        root = entry.place.leaf
        if root not in reading.derived:
            placed.append(entry)
            continue
        rows = factored.rows(entry.place, entry.part)
        behind[root] = behind[root] + rows if root in behind else rows
    return placed + through_derived(reading, params, batch, behind, dtype)


def _slice_of(site: Site) -> Slice | None:
    """Which of the examples a use covers, where not all."""
    return next((held for held in site.label.held if isinstance(held, Slice)), None)


def root_shapes(reading: Reading, params: list[jax.Array]) -> dict[int, jax.ShapeDtypeStruct]:
    """Shapes of everything that sites use."""
    shapes = {i: jax.ShapeDtypeStruct(p.shape, p.dtype) for i, p in enumerate(params)}
    shapes |= reading.derived
    for root, joint in reading.joined.items():
        shapes[root] = jax.eval_shape(joint.gather, params)
    return shapes


def over_columns(pull: Any, cotangents: list[jax.Array], reading: Reading) -> list[jax.Array]:
    """Pulls columns of cotangents (C, L, ...) back to every use."""
    if cotangents[0].shape[0] == 1:
        return [g[None] for g in pull([c[0] for c in cotangents])]
    return dense.pulled_columns(pull, cotangents, sum(math.prod(s.shape) for s in reading.sites))


def through_derived(
    reading: Reading,
    params: list[jax.Array],
    batch: list[jax.Array],
    behind: dict[int, jax.Array],
    dtype: Any,
) -> list[Placed]:
    """Rows of arrays derived from parameters, as rows of the parameters."""
    if not behind:
        return []
    leaves = sorted(set().union(*(reading.sources[root] for root in reading.derived)))

    def arrays(own: list[jax.Array]) -> list[jax.Array]:
        full = list(params)
        for leaf, x in zip(leaves, own, strict=True):
            full[leaf] = x
        return reader.derived_arrays(reading, full, batch)

    values, pull = jax.vjp(arrays, [params[leaf] for leaf in leaves])
    lead = next(iter(behind.values())).shape[:2]
    cotangents = [
        behind[root].reshape(-1, *value.shape).astype(value.dtype)
        for root, value in zip(reading.derived, values, strict=True)
    ]
    (rows,) = jax.vmap(pull)(cotangents)
    return [
        Placed(
            assemble.dense_place(leaf, params[leaf].shape),
            0,
            Part(None, x.astype(dtype).reshape(*lead, 1, 1, params[leaf].size)),
        )
        for leaf, x in zip(leaves, rows, strict=True)
    ]


def _check_one_example(
    model: Model, group: Group, function: Flat, cotangents: list[jax.Array]
) -> None:
    outputs = jax.eval_shape(function, model.params, one_example(model, group))
    for value, c in zip(outputs, cotangents, strict=True):
        if value.shape != c.shape[2:]:
            raise ValueError(
                f"{model.caller}: on a batch of one example the model gives outputs of shape"
                f" {value.shape}, but on the whole batch each example has {c.shape[2:]};"
                " independent=True takes rows example by example"
            )

"""Rows of a pull-back metric: read the model, pull cotangents back, gather the factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax.examples import Group
from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import assemble
from natgrad_jax.jacobian import columns
from natgrad_jax.jacobian import dense
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian import reader
from natgrad_jax.jacobian.columns import RowGroup
from natgrad_jax.jacobian.example_axis import OWN
from natgrad_jax.jacobian.example_axis import Axis
from natgrad_jax.jacobian.example_axis import Label
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.interface import Jacobian
from natgrad_jax.jacobian.products import jacobian_of_factors
from natgrad_jax.jacobian.reader import Flat
from natgrad_jax.jacobian.reader import Reading

Tree = Any


class Model(NamedTuple):
    """A model at parameters and a batch, all of them flat.

    Attributes:
      caller: public name for messages.
      function: (parameter leaves, batch leaves) -> output leaves.
      params: parameter leaves.
      batch: batch leaves.
      groups: groups of examples.
    """

    caller: str
    function: Flat
    params: list[jax.Array]
    batch: list[jax.Array]
    groups: tuple[Group, ...]


class Plan(NamedTuple):
    """How the rows of a model are taken.

    Attributes:
      mode: "examples" (independence was shown), "vouched" (the user said so) or "whole".
      rows: the rows of each group.
      readings: one for each group, or one for the whole; None where the model cannot be read.
      reason: why the mode is "whole" although the batch holds examples; None otherwise.
    """

    mode: str
    rows: list[RowGroup]
    readings: list[Reading | None]
    reason: str | None = None


def flatten(
    caller: str, function: Any, params: Tree, batch: Tree, groups: tuple[Group, ...]
) -> Model:
    """A model on leaves."""
    leaves, structure = jax.tree.flatten(params)
    batch_leaves, batch_structure = jax.tree.flatten(batch)

    def flat(p: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        outputs = function(jax.tree.unflatten(structure, p), jax.tree.unflatten(batch_structure, b))
        return jax.tree.leaves(outputs)

    arrays = [jnp.asarray(x) for x in batch_leaves]
    return Model(caller, flat, leaves, arrays, groups)


def plan(model: Model, coefficients: Tree, independent: bool | None) -> Plan:
    """Decides how rows are taken."""
    made = _plan(model, coefficients, independent)
    if len(made.readings) > 1:
        # Roots are numbered by each reading for itself: groups share parameters alone.
        made = made._replace(readings=[r and reader.apart(r) for r in made.readings])
    return made


def _plan(model: Model, coefficients: Tree, independent: bool | None) -> Plan:
    sized = any(group.size is not None for group in model.groups)
    if sized and independent:
        rows = columns.row_groups(model.caller, coefficients, model.groups)
        return Plan("vouched", rows, [_read_one(model, g) for g in range(len(model.groups))])
    if sized and any(group.size != 1 for group in model.groups):
        try:
            readings = [_read_examples(model, g) for g in range(len(model.groups))]
            rows = columns.row_groups(model.caller, coefficients, model.groups)
            return Plan("examples", rows, list(readings))
        except (reader.ExamplesMixError, _jaxpr.UnreadableError) as trouble:
            return Plan("whole", columns.whole(coefficients), [_read_whole(model)], str(trouble))
    return Plan("whole", columns.whole(coefficients), [_read_whole(model)])


def _read_examples(model: Model, number: int) -> Reading:
    """Reads the outputs of one group; the examples of other groups are shared, whole."""
    axes = model.groups[number].axes
    labels: list[Label] = [
        None if axis is None else Axis(axis % x.ndim)
        for axis, x in zip(axes, model.batch, strict=True)
    ]
    outputs: list[Axis] = [Axis(0, 1, rows) for _, rows in dense.wanted_outputs(model, number)]
    function = dense.outputs_of_group(model, number)
    return reader.read(function, model.params, model.batch, labels, outputs)


def _read_whole(model: Model) -> Reading | None:
    outputs = jax.eval_shape(model.function, model.params, model.batch)
    try:
        return reader.read(
            model.function,
            model.params,
            model.batch,
            [OWN] * len(model.batch),
            [OWN] * len(outputs),
        )
    except _jaxpr.UnreadableError:
        return None


def _read_one(model: Model, number: int) -> Reading | None:
    """Reads a model at one example of a group."""
    group = model.groups[number]
    one = _one_example(model, group)
    labels: list[Label] = [None if axis is None else OWN for axis in group.axes]
    function = dense.outputs_of_group(model, number)
    outputs = [OWN for _ in jax.eval_shape(function, model.params, one)]
    try:
        return reader.read(function, model.params, one, labels, outputs)
    except _jaxpr.UnreadableError:
        return None


def _one_example(model: Model, group: Group) -> list[Any]:
    """Shapes of a batch of one example."""
    return [
        jax.ShapeDtypeStruct(_single(x.shape, axis), x.dtype)
        for x, axis in zip(model.batch, group.axes, strict=True)
    ]


def _check_one_example(
    model: Model, group: Group, function: Flat, cotangents: list[jax.Array]
) -> None:
    outputs = jax.eval_shape(function, model.params, _one_example(model, group))
    for value, c in zip(outputs, cotangents, strict=True):
        if value.shape != c.shape[2:]:
            raise ValueError(
                f"{model.caller}: on a batch of one example the model gives outputs of shape"
                f" {value.shape}, but on the whole batch each example has {c.shape[2:]};"
                " independent=True takes rows example by example"
            )


def _single(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    return tuple(1 if d == axis % len(shape) else n for d, n in enumerate(shape))


def jacobian(
    caller: str,
    function: Any,
    params: Tree,
    batch: Tree,
    output_metric: Any,
    groups: tuple[Group, ...],
    independent: bool | None = None,
) -> Jacobian:
    """The rows R of a pull-back metric, in factored form where the model allows it.

    Args:
      caller: public name for messages.
      function: (params, batch) -> outputs.
      params: pytree of real arrays, P numbers.
      batch: pytree of arrays.
      output_metric: the `OutputMetric` at the outputs of this batch.
      groups: the groups of examples of this batch.
      independent: whether the user vouches that examples do not mix.

    Returns:
      A :class:`Jacobian`.
    """
    model = flatten(caller, function, params, batch, groups)
    made = plan(model, output_metric.coefficients, independent)
    if made.reason is not None:
        reader.warn(caller, made.reason)
    dtype = _trees.work_dtype(params)
    factors = factors_of(model, made, output_metric, dtype)
    joined = made.readings[0].joined if made.readings[0] is not None else {}
    return jacobian_of_factors(factors, made.rows, output_metric, params, joined, dtype)


def factors_of(model: Model, made: Plan, output_metric: Any, dtype: Any) -> list[Factor]:
    """The rows as factors that do not overlap."""
    return assemble.factors_of(parts_of(model, made, output_metric, dtype), len(made.rows))


def parts_of(model: Model, made: Plan, output_metric: Any, dtype: Any) -> list[assemble.Placed]:
    """The rows as they were found: of each group the uses in order, then what is dense."""
    cotangents = columns.cotangents(output_metric, made.rows)
    if made.mode == "vouched":
        return _vouched(model, made, cotangents, dtype)
    if made.mode == "examples":
        return _independent(model, made, cotangents, dtype)
    return _one_piece(model, made.readings[0], cotangents, dtype)


def _independent(
    model: Model, made: Plan, cotangents: list[jax.Array], dtype: Any
) -> list[assemble.Placed]:
    """Rows of all examples at once, from one pass over the whole batch for each group."""
    placed: list[assemble.Placed] = []
    for number, (reading, rows) in enumerate(zip(made.readings, made.rows, strict=True)):
        if not rows.columns:
            continue
        assert reading is not None
        own = [cotangents[i][: rows.columns] for i, _ in dense.wanted_outputs(model, number)]
        found = site_parts(reading, model.params, model.batch, own, dtype)
        opaque = sorted(reading.opaque)
        if opaque:
            found += dense_parts(
                opaque, model, dense.example_rows(model, made.rows, number, opaque, own), dtype
            )
        placed += [(place, number, part) for place, _, part in found]
    return placed


def _one_piece(
    model: Model, reading: Reading | None, cotangents: list[jax.Array], dtype: Any
) -> list[assemble.Placed]:
    """Rows of a batch that counts as one example, a backward pass for each."""
    placed: list[assemble.Placed] = []
    opaque = list(range(len(model.params)))
    if reading is not None:
        placed = site_parts(reading, model.params, model.batch, cotangents, dtype)
        opaque = sorted(reading.opaque)
    if opaque:
        rows = dense.column_rows(model.function, model.params, model.batch, opaque, cotangents)
        placed += dense_parts(opaque, model, rows, dtype)
    return placed


def dense_parts(
    leaves: list[int], model: Model, rows: list[jax.Array], dtype: Any
) -> list[assemble.Placed]:
    """Rows (N, C, P_l) of some leaves as parts."""
    return [
        (
            assemble.dense_place(leaf, model.params[leaf].shape),
            0,
            Part(None, x.astype(dtype)[:, :, None, None, :]),
        )
        for leaf, x in zip(leaves, rows, strict=True)
    ]


def _vouched(
    model: Model, made: Plan, cotangents: list[jax.Array], dtype: Any
) -> list[assemble.Placed]:
    """Rows example by example, each read as if it were the whole batch."""
    placed: list[assemble.Placed] = []
    for number, (group, reading) in enumerate(zip(model.groups, made.readings, strict=True)):
        if not made.rows[number].columns:
            continue
        count = made.rows[number].columns
        outputs = [cotangents[i][:count] for i, _ in dense.wanted_outputs(model, number)]
        own = dense.split_examples(model, made.rows, number, outputs)
        function = dense.outputs_of_group(model, number)
        _check_one_example(model, group, function, own)
        places: list[Place] = []

        def example(
            batch: list[jax.Array],
            columns: list[jax.Array],
            function: Flat = function,
            reading: Reading | None = reading,
            places: list[Place] = places,
        ) -> list[Part]:
            one = model._replace(function=function, batch=batch)
            found = _one_piece(one, reading, columns, dtype)
            places[:] = [place for place, _, _ in found]
            return [part for _, _, part in found]

        parts = examples.map_examples(example, model.batch, group, own)
        flat = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)
        placed += [(place, number, part) for place, part in zip(places, flat, strict=True)]
    return placed


def site_parts(
    reading: Reading,
    params: list[jax.Array],
    batch: list[jax.Array],
    cotangents: list[jax.Array],
    dtype: Any,
) -> list[assemble.Placed]:
    """Pulls cotangents (C, L, ...) back to every use, and on to leaves from derived arrays."""
    outputs, pull, records = reader.pull_back(reading, params, batch)
    cast = [c.astype(z.dtype) for c, z in zip(cotangents, outputs, strict=True)]
    pulled = over_columns(pull, cast, reading)
    shapes = root_shapes(reading, params)
    placed: list[assemble.Placed] = []
    behind: dict[int, jax.Array] = {}
    for site, record, g in zip(reading.sites, records, pulled, strict=True):
        root = site.view.root
        place = assemble.place_of(site, shapes[root])
        part = assemble.part_of(site, record, g, dtype)
        if root not in reading.derived:
            placed.append((place, 0, part))
            continue
        rows = factored.rows(place, part)
        behind[root] = behind[root] + rows if root in behind else rows
    return placed + through_derived(reading, params, batch, behind, dtype)


def root_shapes(reading: Reading, params: list[jax.Array]) -> dict[int, tuple[int, ...]]:
    """Shapes of everything that sites use."""
    shapes = {i: p.shape for i, p in enumerate(params)} | reading.derived
    for root, joint in reading.joined.items():
        shapes[root] = jax.eval_shape(joint.gather, params).shape
    return shapes


def over_columns(pull: Any, cotangents: list[jax.Array], reading: Reading) -> list[jax.Array]:
    """Pulls columns of cotangents (C, L, ...) back, as many at a time as memory allows."""
    count = cotangents[0].shape[0]
    if count == 1:
        return [g[None] for g in pull([c[0] for c in cotangents])]
    scalars = sum(_size(site.shape) for site in reading.sites)
    batch = max(1, factored.CHUNK // max(scalars, 1))
    if batch >= count:
        return jax.vmap(pull)(cotangents)
    return jax.lax.map(pull, cotangents, batch_size=batch)


def _size(shape: tuple[int, ...]) -> int:
    return _trees.size([jax.ShapeDtypeStruct(shape, jnp.float32)])


def through_derived(
    reading: Reading,
    params: list[jax.Array],
    batch: list[jax.Array],
    behind: dict[int, jax.Array],
    dtype: Any,
) -> list[assemble.Placed]:
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
        (
            assemble.dense_place(leaf, params[leaf].shape),
            0,
            Part(None, x.astype(dtype).reshape(*lead, 1, 1, params[leaf].size)),
        )
        for leaf, x in zip(leaves, rows, strict=True)
    ]

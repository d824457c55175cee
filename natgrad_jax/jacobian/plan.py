"""How the rows of a model are computed: what can be read off it decides."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.examples import Group
from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import columns
from natgrad_jax.jacobian import dense
from natgrad_jax.jacobian import reader
from natgrad_jax.jacobian.columns import RowGroup
from natgrad_jax.jacobian.labels import OWN
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
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
      spread: constants with one dimension of this size hold something for each example.
    """

    caller: str
    function: Flat
    params: list[jax.Array]
    batch: list[jax.Array]
    groups: tuple[Group, ...]
    spread: int | None = None


class Plan(NamedTuple):
    """How the rows of a model are taken.

    Attributes:
      mode: "examples" (independence was shown), "vouched" (the user said so) or "whole".
      rows: the rows of each group.
      readings: one for each group, or one for the whole.
      reason: why the mode is "whole" although the batch holds examples; None otherwise.
    """

    mode: str
    rows: list[RowGroup]
    readings: list[Reading]
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


def with_rows_as_examples(model: Model) -> Model:
    """The model with every output row as an example, where no leaf holds examples but rows do.

    Leaves and constants with one dimension of as many entries as there are rows are taken to hold
    something for each row; reading the model shows whether rows depend on their own entries alone.
    """
    if any(group.size is not None for group in model.groups):
        return model
    outputs = jax.eval_shape(model.function, model.params, model.batch)
    counts = {x.shape[0] for x in outputs}
    if len(counts) != 1 or counts <= {0, 1}:
        return model
    (count,) = counts
    axes = tuple(reader.dimension_of(x, count) for x in model.batch)
    rows = model._replace(groups=(Group(count, axes),), spread=count)
    try:
        reading = _read_examples(rows, 0)
    except (reader.ExamplesMixError, _jaxpr.UnreadableError):
        return model
    return model if reading.opaque else rows


def plan(model: Model, coefficients: Tree, independent: bool | None) -> Plan:
    """Decides how rows are taken."""
    made = _plan(model, coefficients, independent)
    if len(made.readings) > 1:
        # Roots are numbered by each reading for itself: groups share parameters alone.
        made = made._replace(readings=[reader.apart(r) for r in made.readings])
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
            return Plan("examples", rows, readings)
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
    return reader.read(function, model.params, model.batch, labels, outputs, model.spread)


def _read_whole(model: Model) -> Reading:
    outputs = jax.eval_shape(model.function, model.params, model.batch)
    try:
        return reader.read(
            model.function,
            model.params,
            model.batch,
            [OWN] * len(model.batch),
            [OWN] * len(outputs),
        )
    except _jaxpr.UnreadableError as trouble:
        return reader.unread(model.params, str(trouble))


def _read_one(model: Model, number: int) -> Reading:
    """Reads a model at one example of a group."""
    group = model.groups[number]
    one = one_example(model, group)
    labels: list[Label] = [None if axis is None else OWN for axis in group.axes]
    function = dense.outputs_of_group(model, number)
    outputs = [OWN for _ in jax.eval_shape(function, model.params, one)]
    try:
        return reader.read(function, model.params, one, labels, outputs)
    except _jaxpr.UnreadableError as trouble:
        return reader.unread(model.params, str(trouble))


def one_example(model: Model, group: Group) -> list[Any]:
    """Shapes of a batch of one example."""
    return [
        jax.ShapeDtypeStruct(_single(x.shape, axis), x.dtype)
        for x, axis in zip(model.batch, group.axes, strict=True)
    ]


def _single(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    return tuple(1 if d == axis % len(shape) else n for d, n in enumerate(shape))

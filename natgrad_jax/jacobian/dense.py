"""Rows of parameters that do not factor: a backward pass for each example and column, in chunks."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import examples
from natgrad_jax.jacobian import batch_size
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian.columns import RowGroup

Tree = Any


def wanted_outputs(model: Any, number: int) -> list[tuple[int, int]]:
    """The output leaves of one group of examples, and their rows for each example."""
    found = []
    for i, leaf in enumerate(jax.eval_shape(model.function, model.params, model.batch)):
        group, rows = examples.rows_per_example(model.caller, leaf.shape[0], model.groups)
        if group is model.groups[number]:
            found.append((i, rows))
    return found


def outputs_of_group(model: Any, number: int) -> Any:
    """The model with the outputs of one group of examples alone."""
    wanted = [i for i, _ in wanted_outputs(model, number)]

    def function(params: list[jax.Array], batch: list[jax.Array]) -> list[jax.Array]:
        outputs = model.function(params, batch)
        return [outputs[i] for i in wanted]

    return function


def split_examples(
    model: Any, groups: list[RowGroup], number: int, cotangents: list[jax.Array]
) -> list[jax.Array]:
    """Cotangents (C, k N, ...) of one group's outputs, example by example: (N, C, k, ...)."""
    count, n = groups[number].columns, groups[number].examples
    split = []
    for (_, rows), c in zip(wanted_outputs(model, number), cotangents, strict=True):
        split.append(jnp.moveaxis(c.reshape(count, n, rows, *c.shape[2:]), 1, 0))
    return split


def column_rows(
    function: Any,
    params: list[jax.Array],
    batch: list[jax.Array],
    wanted: list[int],
    cotangents: list[jax.Array],
) -> list[jax.Array]:
    """Rows (1, C, P_l) of some leaves, by one backward pass for each column."""

    def outputs(own: list[jax.Array]) -> list[jax.Array]:
        full = list(params)
        for i, x in zip(wanted, own, strict=True):
            full[i] = x
        return function(full, batch)

    values, pull = jax.vjp(outputs, [params[i] for i in wanted])
    cast = [c.astype(v.dtype) for c, v in zip(cotangents, values, strict=True)]
    (rows,) = pulled_columns(pull, cast, sum(params[i].size for i in wanted))
    return [x.reshape(1, x.shape[0], math.prod(x.shape[1:])) for x in rows]


def pulled_columns(pull: Any, cotangents: list[jax.Array], scalars: int) -> Any:
    """Pulls columns of cotangents (C, L, ...) back, as many at a time as memory allows.

    Args:
      pull: the transpose of a Jacobian.
      cotangents: columns in front.
      scalars: that one column takes.
    """
    count = cotangents[0].shape[0]
    chunk = max(1, factored.CHUNK // max(scalars, 1))
    try:
        if chunk >= count:
            return jax.vmap(pull)(cotangents)
        return jax.lax.map(pull, cotangents, batch_size=chunk)
    except Exception:  # a derivative rule of the user's that has no rule for batches
        return jax.lax.map(pull, cotangents)


def example_rows(
    model: Any, groups: list[RowGroup], number: int, wanted: list[int], cotangents: list[jax.Array]
) -> list[jax.Array]:
    """Rows (N, C, P_l) of some leaves, for one group of independent examples.

    Args:
      model: the model.
      groups: rows of all groups.
      number: the group.
      wanted: which parameter leaves.
      cotangents: of the group's outputs, (C, k N, ...).
    """
    if batch_size.is_free(model, [rows for _, rows in wanted_outputs(model, number)]):
        try:
            return _one_by_one(model, groups, number, wanted, cotangents)
        except Exception:  # a function of the user's that has no rule for batches
            pass
    return _within_batch(model, groups, number, wanted, cotangents)


def _one_by_one(
    model: Any, groups: list[RowGroup], number: int, wanted: list[int], cotangents: list[jax.Array]
) -> list[jax.Array]:
    """Each example evaluated by itself."""
    group, function = model.groups[number], outputs_of_group(model, number)
    own = split_examples(model, groups, number, cotangents)

    def example(one: list[jax.Array], columns: list[jax.Array]) -> list[jax.Array]:
        return [x[0] for x in column_rows(function, model.params, one, wanted, columns)]

    numbers = groups[number].columns * sum(model.params[i].size for i in wanted)
    chunk = max(1, factored.CHUNK // max(numbers, 1))
    return examples.map_examples(example, model.batch, group, own, chunk=chunk)


def _within_batch(
    model: Any, groups: list[RowGroup], number: int, wanted: list[int], cotangents: list[jax.Array]
) -> list[jax.Array]:
    """Each example's cotangents through the whole batch, for models that depend on its size."""
    function, own = outputs_of_group(model, number), wanted_outputs(model, number)

    def example(index: jax.Array) -> list[jax.Array]:
        masked = []
        for (_, rows), c in zip(own, cotangents, strict=True):
            here = jnp.arange(c.shape[1]) // rows == index
            masked.append(jnp.where(here.reshape(1, -1, *(1 for _ in c.shape[2:])), c, 0))
        pulled = column_rows(function, model.params, model.batch, wanted, masked)
        return [x[0] for x in pulled]

    return jax.lax.map(example, jnp.arange(groups[number].examples))

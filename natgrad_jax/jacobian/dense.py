"""Materialised rows, taken example by example: exact where examples do not mix.

One backward pass for each example and column of the output-space factor B, batched by vmap. The
rows take M x P numbers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax.jacobian.interface import Jacobian

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST


def dense_jacobian(
    caller: str,
    function: Callable[[Tree, Tree], Tree],
    params: Tree,
    batch: Tree,
    output_metric: Any,
    groups: tuple[examples.Group, ...],
) -> Jacobian:
    """Forms the rows R of a pull-back metric and gives the products on them.

    Args:
      caller: public name for error messages.
      function: (params, batch) -> outputs.
      params: pytree of real arrays, P numbers.
      batch: pytree of arrays.
      output_metric: the `OutputMetric` at the outputs of this batch.
      groups: the groups of examples of this batch.

    Returns:
      A :class:`Jacobian` whose rows are held as one (M, P_l) array for each leaf of `params`.
    """
    dtype = _trees.work_dtype(params)
    coefficients, structure = jax.tree.flatten(output_metric.coefficients)
    pieces: list[Any] = [None] * len(coefficients)
    for group in groups:
        columns = _columns(caller, coefficients, group, groups)
        if not columns:
            continue  # examples of a size that no output has
        cotangents = _cotangents(output_metric, columns, group)
        stacked = _example_rows(caller, function, params, batch, cotangents, group)
        start = 0
        for i, width in columns.items():
            part = [leaf[:, start : start + width] for leaf in stacked]
            pieces[i] = [x.reshape(x.shape[0] * width, x.shape[2]).astype(dtype) for x in part]
            start += width
    rows = [jnp.concatenate(leaf) for leaf in zip(*pieces, strict=True)]
    if output_metric.center is not None:
        # Centering acts along the rows, on each parameter's column by itself.
        center = jax.vmap(output_metric.center, in_axes=-1, out_axes=-1)
        rows = [jax.tree.leaves(center(jax.tree.unflatten(structure, [x])))[0] for x in rows]
    return _products(rows, params, dtype)


def _columns(
    caller: str, coefficients: list[Any], group: examples.Group, groups: tuple[examples.Group, ...]
) -> dict[int, int]:
    """For each coefficient leaf of this group, its rows of R for one example."""
    count = 1 if group.size is None else group.size
    return {
        i: math.prod(c.shape) // max(count, 1)
        for i, c in enumerate(coefficients)
        if examples.rows_per_example(caller, c.shape[0], groups)[0] is group
    }


def _cotangents(output_metric: Any, columns: dict[int, int], group: examples.Group) -> list[Any]:
    """Columns of B for every example at once: for each output leaf (N, columns, k, ...), or None.

    B acts row by row, so one unit coefficient at the same place of every example gives the same
    column of every example's B.
    """
    count = 1 if group.size is None else group.size
    leaves, structure = jax.tree.flatten(output_metric.coefficients)
    total = sum(columns.values())
    basis, start = [], 0
    for i, c in enumerate(leaves):
        if i not in columns:
            basis.append(jnp.zeros((total, *c.shape), c.dtype))
            continue
        unit = jnp.eye(total, dtype=c.dtype)[:, start : start + columns[i]]
        everywhere = jnp.broadcast_to(unit[:, None, :], (total, count, columns[i]))
        basis.append(everywhere.reshape(total, *c.shape))
        start += columns[i]
    stacked = jax.vmap(output_metric.factor_product)(jax.tree.unflatten(structure, basis))

    def split(i: int, x: jax.Array) -> jax.Array | None:
        # Only with several groups do coefficients outside this group exist; they then mirror the
        # outputs leaf by leaf.
        if len(columns) < len(leaves) and i not in columns:
            return None
        return jnp.moveaxis(
            x.reshape(total, count, x.shape[1] // max(count, 1), *x.shape[2:]), 1, 0
        )

    return [split(i, x) for i, x in enumerate(jax.tree.leaves(stacked))]


def _example_rows(
    caller: str,
    function: Callable[[Tree, Tree], Tree],
    params: Tree,
    batch: Tree,
    cotangents: list[Any],
    group: examples.Group,
) -> list[jax.Array]:
    """Pulls each example's cotangents back through that example alone: leaves (N, columns, P_l)."""
    wanted = [i for i, c in enumerate(cotangents) if c is not None]

    def example(one: Tree, columns: list[jax.Array]) -> list[jax.Array]:
        def outputs(p: Tree) -> list[jax.Array]:
            every = jax.tree.leaves(function(p, one))
            return [every[i] for i in wanted]

        values, pull_back = jax.vjp(outputs, params)
        for value, column in zip(values, columns, strict=True):
            if value.shape != column.shape[1:]:
                raise ValueError(
                    f"{caller}: on a batch of one example the model gives outputs of shape"
                    f" {value.shape}, but on the whole batch each example has {column.shape[1:]};"
                    " rows are taken example by example"
                )
        cast = [c.astype(v.dtype) for c, v in zip(columns, values, strict=True)]
        (rows,) = jax.vmap(pull_back)(cast)
        return [x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in jax.tree.leaves(rows)]

    return examples.vmap_examples(example, batch, group, [cotangents[i] for i in wanted])


def _products(rows: list[jax.Array], params: Tree, dtype: jnp.dtype) -> Jacobian:
    shapes, treedef = jax.tree.flatten(params)

    def product(tangent: Tree) -> jax.Array:
        tangents = [v.reshape(-1).astype(dtype) for v in jax.tree.leaves(tangent)]
        parts = [jnp.dot(r, v, precision=_HIGHEST) for r, v in zip(rows, tangents, strict=True)]
        return functools.reduce(jnp.add, parts)

    def transposed_product(u: jax.Array) -> Tree:
        parts = [jnp.dot(u, r, precision=_HIGHEST) for r in rows]
        return unflatten([x.reshape(s.shape) for x, s in zip(parts, shapes, strict=True)])

    def unflatten(leaves: list[jax.Array]) -> Tree:
        return jax.tree.unflatten(treedef, leaves)

    return Jacobian(
        product=product,
        transposed_product=transposed_product,
        gram=lambda: functools.reduce(
            jnp.add, [jnp.matmul(r, r.T, precision=_HIGHEST) for r in rows]
        ),
        diagonal=lambda: unflatten(
            [jnp.sum(r * r, axis=0).reshape(s.shape) for r, s in zip(rows, shapes, strict=True)]
        ),
        blocks=lambda: unflatten([jnp.matmul(r.T, r, precision=_HIGHEST) for r in rows]),
        matrix=lambda: jnp.concatenate(rows, axis=1),
    )

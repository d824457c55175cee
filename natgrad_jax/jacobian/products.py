"""A :class:`Jacobian` made of factors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import columns
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian.columns import RowGroup
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.interface import Jacobian

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST


def jacobian_of_factors(
    factors: list[Factor], groups: list[RowGroup], output_metric: Any, params: Tree, dtype: Any
) -> Jacobian:
    """The products on rows that are held as factors.

    Args:
      factors: they do not overlap; what none covers is zero.
      groups: the rows of each group of examples.
      output_metric: for the structure of the rows and their centering.
      params: pytree, for shapes.
      dtype: of the rows.
    """
    leaves, structure = jax.tree.flatten(params)
    is_centered = output_metric.center is not None
    center = functools.partial(columns.centered, output_metric)

    def tree(arrays: list[jax.Array]) -> Tree:
        return jax.tree.unflatten(structure, arrays)

    def zeros() -> list[jax.Array]:
        return [jnp.zeros(leaf.shape, dtype) for leaf in leaves]

    def product(tangent: Tree) -> jax.Array:
        vectors = [v.astype(dtype) for v in jax.tree.leaves(tangent)]
        parts = [jnp.zeros((group.examples, group.columns), dtype) for group in groups]
        for place, own in factors:
            for g, part in enumerate(own):
                if part is not None:
                    parts[g] = parts[g] + factored.product(place, part, vectors[place.leaf])
        rows = columns.to_rows(groups, parts)
        return center(rows) if is_centered else rows

    def transposed_product(u: jax.Array) -> Tree:
        parts, total = columns.from_rows(groups, center(u) if is_centered else u), zeros()
        for place, own in factors:
            for g, part in enumerate(own):
                if part is not None:
                    added = factored.transposed_product(place, part, parts[g])
                    total[place.leaf] = total[place.leaf] + added
        return tree(total)

    def gram() -> jax.Array:
        blocks = {}
        for g, first in enumerate(groups):
            for h, second in list(enumerate(groups))[g:]:
                shape = (first.examples, first.columns, second.examples, second.columns)
                terms = [
                    factored.gram(place, own[g], own[h])
                    for place, own in factors
                    if own[g] is not None and own[h] is not None
                ]
                blocks[g, h] = functools.reduce(jnp.add, terms, jnp.zeros(shape, dtype))
        matrix = columns.to_matrix(groups, blocks)
        return center(center(matrix).T) if is_centered else matrix

    def diagonal() -> Tree:
        if is_centered:
            return tree([jnp.sum(r * r, axis=0).reshape(x.shape) for r, x in pairs()])
        total = zeros()
        for place, own in factors:
            for part in own:
                if part is not None:
                    total[place.leaf] = total[place.leaf] + factored.squares(place, part)
        return tree(total)

    def leaf_rows(leaf: int) -> jax.Array:
        size = leaves[leaf].size
        parts = [jnp.zeros((group.examples, group.columns, size), dtype) for group in groups]
        for place, own in factors:
            for g, part in enumerate(own):
                if place.leaf == leaf and part is not None:
                    parts[g] = parts[g] + factored.rows(place, part)
        rows = columns.to_rows(groups, parts)
        return center(rows) if is_centered else rows

    def pairs() -> list[tuple[jax.Array, jax.Array]]:
        return [(leaf_rows(i), leaf) for i, leaf in enumerate(leaves)]

    def squared_norms() -> jax.Array:
        parts = [jnp.zeros((group.examples, group.columns), dtype) for group in groups]
        for place, own in factors:
            for g, part in enumerate(own):
                if part is not None:
                    parts[g] = parts[g] + factored.squared_norms(place, part)
        return columns.to_rows(groups, parts)

    return Jacobian(
        product=product,
        transposed_product=transposed_product,
        gram=gram,
        diagonal=diagonal,
        blocks=lambda: tree([jnp.matmul(r.T, r, precision=_HIGHEST) for r, _ in pairs()]),
        matrix=lambda: jnp.concatenate([r for r, _ in pairs()], axis=1),
        squared_norms=squared_norms,
    )

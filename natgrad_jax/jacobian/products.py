"""A :class:`Jacobian` made of factors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import columns
from natgrad_jax.jacobian import complex_rows
from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian import gram as grams
from natgrad_jax.jacobian import scaling
from natgrad_jax.jacobian.columns import RowGroup
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.interface import Jacobian
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.joined import leaves_behind

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST


def jacobian_of_factors(
    factors: list[Factor],
    groups: list[RowGroup],
    output_metric: Any,
    params: Tree,
    joined: dict[int, Joined],
    dtype: Any,
) -> Jacobian:
    """The products on rows that are held as factors.

    Args:
      factors: they do not overlap; what none covers is zero.
      groups: the rows of each group of examples.
      output_metric: for the structure of the rows and their centering.
      params: pytree, for shapes.
      joined: arrays that join parameters, where factors speak of them.
      dtype: of the rows.
    """
    leaves, structure = jax.tree.flatten(params)
    # Only inner products are taken of complex rows as they are: all else speaks of parameters.
    inner, factors = factors, [r for f in factors for r in complex_rows.real_factors(f, joined)]
    joined = {root: joint for root, joint in joined.items() if not joint.units}
    removed = output_metric.removed

    def center(rows: jax.Array) -> jax.Array:
        return rows if removed is None else columns.centered(removed, rows)

    def tree(arrays: list[jax.Array]) -> Tree:
        return jax.tree.unflatten(structure, arrays)

    def summed(terms: list[tuple[int, jax.Array]]) -> Tree:
        """Arrays like roots, added up for each leaf."""
        total: dict[int, jax.Array] = {}
        for root, array in terms:
            for leaf, x in joined[root].scatter(array) if root in joined else [(root, array)]:
                total[leaf] = total[leaf] + x if leaf in total else x
        unused = lambda i: jnp.zeros(leaves[i].shape, dtype)
        return tree([total[i] if i in total else unused(i) for i in range(len(leaves))])

    def product(tangent: Tree) -> jax.Array:
        vectors = [v.astype(dtype) for v in jax.tree.leaves(tangent)]
        parts = [jnp.zeros((group.examples, group.columns), dtype) for group in groups]
        roots = dict(enumerate(vectors)) | {r: j.gather(vectors) for r, j in joined.items()}
        for place, own in factors:
            for g, part in enumerate(own):
                if part is not None:
                    parts[g] = parts[g] + factored.product(place, part, roots[place.leaf])
        rows = columns.to_rows(groups, parts)
        return center(rows)

    def transposed_product(u: jax.Array) -> Tree:
        parts = columns.from_rows(groups, center(u))
        return summed(
            [
                (place.leaf, factored.transposed_product(place, part, parts[g]))
                for place, own in factors
                for g, part in enumerate(own)
                if part is not None
            ]
        )

    def in_units(units: Tree | None) -> list[tuple[Factor, jax.Array | None]]:
        if units is None:
            return [(factor, None) for factor in inner]
        scales = jax.tree.leaves(units)
        return [scaling.in_units(factor, joined, scales) for factor in factors]

    def gram(units: Tree | None = None) -> jax.Array:
        blocks, own = {}, in_units(units)
        for g, first in enumerate(groups):
            for h, second in list(enumerate(groups))[g:]:
                shape = (first.examples, first.columns, second.examples, second.columns)
                terms = [
                    _times(times, grams.block(place, parts[g], parts[h]))
                    for (place, parts), times in own
                    if parts[g] is not None and parts[h] is not None
                ]
                blocks[g, h] = functools.reduce(jnp.add, terms, jnp.zeros(shape, dtype))
        matrix = columns.to_matrix(groups, blocks)
        return matrix if removed is None else columns.centered_gram(removed, matrix)

    def diagonal() -> Tree:
        if removed is not None:
            return tree([jnp.sum(r * r, axis=0).reshape(x.shape) for r, x in pairs()])
        return summed(
            [
                (place.leaf, factored.squares(place, part))
                for place, own in factors
                for part in own
                if part is not None
            ]
        )

    def own_entries(leaf: int, place: Place, rows: jax.Array) -> jax.Array:
        """The entries of a leaf in rows (N, C, entries of a root)."""
        if place.leaf not in joined:
            return rows
        pick = lambda row: dict(joined[place.leaf].scatter(row.reshape(place.shape)))[leaf]
        return jax.vmap(jax.vmap(pick))(rows).reshape(*rows.shape[:2], -1)

    def leaf_rows(leaf: int) -> jax.Array:
        size = leaves[leaf].size
        parts = [jnp.zeros((group.examples, group.columns, size), dtype) for group in groups]
        for place, own in factors:
            for g, part in enumerate(own):
                if part is not None and leaf in leaves_behind(place.leaf, joined):
                    parts[g] = parts[g] + own_entries(leaf, place, factored.rows(place, part))
        rows = columns.to_rows(groups, parts)
        return center(rows)

    def pairs() -> list[tuple[jax.Array, jax.Array]]:
        return [(leaf_rows(i), leaf) for i, leaf in enumerate(leaves)]

    def squared_norms(units: Tree | None = None) -> jax.Array:
        parts = [jnp.zeros((group.examples, group.columns), dtype) for group in groups]
        for (place, own), times in in_units(units):
            for g, part in enumerate(own):
                if part is not None:
                    parts[g] = parts[g] + _times(times, grams.squared_norms(place, part))
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


def _times(factor: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if factor is None else factor * x

"""The metric of output space at given outputs, as the products that everything else needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax import examples

Tree = Any


class OutputMetric(NamedTuple):
    """The metric of output space at given outputs, row weights included.

    Attributes:
      product: tangents of the outputs to cotangents, v -> W M v.
      factor_product: coefficients to cotangents, u -> W^(1/2) B u, row by row.
      coefficients: shapes and dtypes of u; every leaf has a leading row axis.
      row_weights: for every output leaf the weights of its rows, (L,).
      removed: None, or the unit vector of coefficients (M,) whose direction is projected out of
        the rows: the roots of the weights, which removes the weighted mean score. (Zero where all
        weights are.)
    """

    product: Callable[[Tree], Tree]
    factor_product: Callable[[Tree], Tree]
    coefficients: Tree
    row_weights: Tree
    removed: jax.Array | None = None


def row_metric(outputs: Tree, row_weights: Tree) -> OutputMetric:
    """M = I in every row."""
    root = jax.tree.map(jnp.sqrt, row_weights)
    return OutputMetric(
        lambda v: examples.scale_rows(row_weights, v),
        lambda u: examples.scale_rows(root, u),
        coefficients_like(outputs),
        row_weights,
    )


def coefficients_like(outputs: Tree) -> Tree:
    """Shapes of coefficients that mirror the outputs, in the working dtype."""
    dtype = _trees.work_dtype(outputs)
    return jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, dtype), outputs)

"""A gradient split into what the rows R hold and what they do not.

With R R^T = U diag(s) U^T the eigenvectors of F = R^T R are R^T u_i / sqrt(s_i), and every
direction orthogonal to them is null.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.jacobian import Jacobian
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report

Tree = Any


class Split(NamedTuple):
    """g = R^T U a + outside.

    Attributes:
      modes: a, coefficients in the eigenbasis of R R^T, 0 for null eigenvalues.
      outside: params-like, orthogonal to the rows.
    """

    modes: jax.Array
    outside: Tree


def split(rows: Jacobian, spectrum: _symmetric.Eigen, g: Tree) -> Split:
    """Splits g, in two passes.

    What one pass leaves in the row space by rounding would be divided by the damping alone ("twice
    is enough": Kahan, in Parlett, 1980, The symmetric eigenvalue problem).
    """
    kept = spectrum.values > 0
    inverse = jnp.where(kept, 1 / jnp.where(kept, spectrum.values, 1), 0)
    modes, outside = jnp.zeros_like(spectrum.values), g
    for _ in range(2):
        part = inverse * _symmetric.matvec(spectrum.vectors.T, rows.product(outside))
        back = rows.transposed_product(_symmetric.matvec(spectrum.vectors, part))
        modes, outside = modes + part, jax.tree.map(lambda x, b: x - b, outside, back)
    return Split(modes, outside)


def apply_gains(
    here: Curvature,
    rows: Jacobian,
    spectrum: _symmetric.Eigen,
    gains: jax.Array,
    null_gain: jax.Array,
    damping: jax.Array,
    g: Tree,
    *,
    refine: bool,
) -> tuple[Tree, Report]:
    """The function of F with these gains, on eigenvalues and null space, applied to g.

    `refine` where the gains are those of the inverse: a second application, to the residual.
    """

    def apply(g: Tree) -> tuple[Tree, Tree]:
        parts = split(rows, spectrum, g)
        u = _symmetric.matvec(spectrum.vectors, gains * parts.modes)
        outside = _trees.scale(parts.outside, null_gain)
        return jax.tree.map(jnp.add, rows.transposed_product(u), outside), outside

    d, outside = apply(g)
    if refine:
        d = jax.tree.map(jnp.add, d, apply(residual(rows, damping, g, d))[0])
    squared = lambda v: _trees.vdot(v, v, here.dtype)
    total = squared(d)
    outcome = _solver.report(
        relative_residual=relative_residual(here, rows, damping, g, d),
        outside_row_space=_solver.outside_share(total - squared(outside), total),
        eigen_taken=True,
    )
    return d, outcome


def residual(rows: Jacobian, damping: jax.Array, g: Tree, d: Tree) -> Tree:
    """g - (F + damping I) d, by products of R."""
    fisher_d = rows.transposed_product(rows.product(d))
    return jax.tree.map(lambda g, f, d: g - f - damping * d, g, fisher_d, d)


def relative_residual(
    here: Curvature, rows: Jacobian, damping: jax.Array, g: Tree, d: Tree
) -> jax.Array:
    """||g - (F + damping I) d|| / ||g||, 0 for g = 0."""
    left = residual(rows, damping, g, d)
    return _solver.relative(_trees.ravel(left), _trees.ravel(g)).astype(here.dtype)

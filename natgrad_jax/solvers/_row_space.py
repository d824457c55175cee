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


def unit_of(gram: jax.Array, least: jax.typing.ArrayLike = 0.0) -> jax.Array:
    """A power of two near the root of the largest entry of R R^T, or of `least` where more.

    The largest entry of a semi-definite matrix lies on its diagonal.
    """
    largest = jnp.max(gram.reshape(-1)[:: gram.shape[0] + 1], initial=0)
    return _trees.power_of_two(jnp.sqrt(jnp.maximum(largest, least)))


def in_units(rows: Jacobian, unit: jax.Array) -> Jacobian:
    """The products of R / unit. Vectors (M,) are scaled: no pass over parameters is added."""
    return rows._replace(
        product=lambda v: rows.product(v) / unit,
        transposed_product=lambda u: rows.transposed_product(u / unit),
    )


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
    unit: jax.Array,
    spectrum: _symmetric.Eigen,
    gains: jax.Array,
    null_gain: jax.Array,
    damping: jax.Array,
    g: Tree,
    *,
    refine: bool,
) -> tuple[Tree, Report]:
    """The function of F with these gains, on eigenvalues and null space, applied to g.

    The spectrum is that of R R^T / unit^2, in which no square over- or underflows.
    `refine` where the gains are those of the inverse: a second application, to the residual.
    """
    scaled = in_units(rows, unit)

    def apply(g: Tree) -> tuple[Tree, Tree]:
        parts = split(scaled, spectrum, g)
        u = _symmetric.matvec(spectrum.vectors, gains * parts.modes)
        u, size = _trees.normalised(u, here.dtype)
        inside = _trees.scale(scaled.transposed_product(u), size)
        outside = _trees.scale(parts.outside, null_gain)
        return jax.tree.map(jnp.add, inside, outside), outside

    d, outside = apply(g)
    left = residual(rows, damping, g, d)
    if refine:
        more, outside_too = apply(left)
        better = jax.tree.map(jnp.add, d, more)
        left_then = residual(rows, damping, g, better)
        # Rounding divided by a tiny damping may make it worse, or infinite.
        good = _norm(left_then) < _norm(left)
        pick = lambda new, old: jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)
        d, left = pick(better, d), pick(left_then, left)
        outside = pick(jax.tree.map(jnp.add, outside, outside_too), outside)
    (whole, part), _ = _trees.normalised((d, outside), here.dtype)
    squared = lambda v: _trees.vdot(v, v, here.dtype)
    total = squared(whole)
    ratio = _solver.relative(_trees.ravel(left), _trees.ravel(g)).astype(here.dtype)
    outcome = _solver.report(
        relative_residual=ratio,
        outside_row_space=_solver.outside_share(total - squared(part), total),
        eigen_taken=True,
    )
    return d, outcome


def _norm(tree: Tree) -> jax.Array:
    return _solver.norm(_trees.ravel(tree))


def residual(rows: Jacobian, damping: jax.Array, g: Tree, d: Tree) -> Tree:
    """g - (F + damping I) d, by products of R."""
    fisher_d = rows.transposed_product(rows.product(d))
    return jax.tree.map(lambda g, f, d: g - f - damping * d, g, fisher_d, d)

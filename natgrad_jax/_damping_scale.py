"""Damping by a diagonal, lambda diag(s) in place of lambda I, by a change of variables.

With phi = s^(1/2) theta the system (F + lambda diag(s)) d = g is F' + lambda I for
F' = s^(-1/2) F s^(-1/2): a solver gets F' and s^(-1/2) g, and knows of nothing.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.curvature import Linear
from natgrad_jax.curvature import diagonal
from natgrad_jax.jacobian import Jacobian
from natgrad_jax.jacobian import scaled_blocks
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


class Diagonal(NamedTuple):
    """Stands for "diagonal" among the operands of a compiled function: a tree without leaves."""


def check(caller: str, damping_scale: Any, solver: Solver | None) -> Tree:
    """The scale as an operand of compiled functions.

    Raises:
      TypeError, ValueError: it is none, or does not fit the solver.
    """
    if isinstance(damping_scale, str):
        if damping_scale != "diagonal":
            raise ValueError(
                f"{caller}: damping_scale must be None, 'diagonal' or a tree of numbers, got"
                f" {damping_scale!r}"
            )
        if solver is not None and not solver.scales_entries:
            raise ValueError(
                f"{caller}: damping_scale='diagonal' scales every entry of a parameter by itself,"
                f" which the solver {solver.name} cannot with Kronecker factors; give one number a"
                " parameter, or take None, cholesky(), woodbury(), cg(), spectral(), diagonal() or"
                " block_diagonal()"
            )
        return Diagonal()
    for path, leaf in jax.tree_util.tree_leaves_with_path(damping_scale):
        name = f"damping_scale{jax.tree_util.keystr(path)}"
        if isinstance(leaf, int | float) and not 0 < leaf < math.inf:
            raise ValueError(f"{caller}: {name} must be positive and finite, got {leaf}")
        _boundary.check_number(caller, name, leaf)
    return damping_scale


def check_prefix(caller: str, damping_scale: Tree, params: Tree) -> None:
    """Raises unless the scale is a tree prefix of the parameters."""
    if damping_scale is None or isinstance(damping_scale, Diagonal):
        return
    try:
        _spread(damping_scale, params)
    except ValueError as error:
        raise ValueError(
            f"{caller}: damping_scale must be a tree prefix of params,"
            f" {jax.tree.structure(params)}, got {jax.tree.structure(damping_scale)}"
        ) from error


def _spread(prefix: Tree, params: Tree) -> Tree:
    """One number for each parameter."""
    return jax.tree.map(lambda s, part: jax.tree.map(lambda _: s, part), prefix, params)


def scaled(solver: Solver, damping_scale: Tree) -> Solver:
    """A solver of (F + lambda diag(s)) d = g, from one of (F + lambda I) d = g."""
    if damping_scale is None:
        return solver

    def prepare(here: Curvature, damping: jax.Array, state: Any) -> tuple[Solve, Any]:
        there, units = _in_units(here, damping_scale)
        solve, state = solver.prepare(there, damping, state)

        def scaled_solve(g: Tree, state: Any) -> tuple[Tree, Any, Report]:
            # Order one again, as every solve expects.
            unit, size = _trees.normalised(_times(units, g), here.dtype)
            d, state, report = solve(unit, state)
            slope = report.grad_dot_direction
            slope = None if slope is None else slope * size * size
            d = _times(units, _trees.scale(d, size))
            return d, state, report._replace(grad_dot_direction=slope)

        return scaled_solve, state

    return solver._replace(prepare=prepare)


def _in_units(here: Curvature, damping_scale: Tree) -> tuple[Curvature, Tree]:
    """F of phi, for theta = c phi, and the units c = s^(-1/2)."""
    if isinstance(damping_scale, Diagonal):
        here, scale = _with_diagonal(here)
        kronecker = None
    else:
        scale = entries_of(damping_scale, here.params, here.dtype)
        kronecker = here.kronecker
    units = jax.tree.map(lambda s: 1 / jnp.sqrt(s), scale)

    def linearize() -> Linear:
        product = here.linearize()
        return lambda v: _times(units, product(_times(units, v)))

    def blocks() -> Any:
        return scaled_blocks.in_units(kronecker(), jax.tree.leaves(units))

    return here._replace(
        linearize=linearize,
        jacobian=here.jacobian and (lambda: _rows_in_units(here, here.jacobian(), units)),
        kronecker=kronecker and blocks,
    ), units


def _with_diagonal(here: Curvature) -> tuple[Curvature, Tree]:
    """The scale that is the diagonal of F, and F with its rows at hand where they gave it.

    Entries within rounding of nothing beside the largest say nothing of their units: they are
    damped like that one. The sign is dropped, that of a Hessian's.
    """
    if here.jacobian is not None:
        rows = here.jacobian()
        here = here._replace(jacobian=lambda: rows)
    entries = diagonal(here)
    largest, info = _trees.max_abs(entries, here.dtype), jnp.finfo(here.dtype)
    floor = jnp.maximum((10 * info.eps) ** 2 * largest, info.tiny)
    instead = jnp.where(largest > info.tiny, largest, 1)
    known = lambda x: jnp.where(jnp.abs(x) > floor, jnp.abs(x), instead)
    return here, jax.tree.map(known, entries)


def entries_of(damping_scale: Tree, params: Tree, dtype: jnp.dtype) -> Tree | None:
    """One number for each parameter leaf or entry, where the scale is given as such."""
    if damping_scale is None or isinstance(damping_scale, Diagonal):
        return None
    return jax.tree.map(lambda s: jnp.asarray(s).astype(dtype), _spread(damping_scale, params))


def _rows_in_units(here: Curvature, rows: Jacobian, units: Tree) -> Jacobian:
    """R diag(c), whose factors stay as they are."""

    def block(c: jax.Array, own: jax.Array) -> jax.Array:
        flat = jnp.broadcast_to(c.reshape(-1), own.shape[:1])
        return flat[:, None] * own * flat[None, :]

    def matrix() -> jax.Array:
        wide = jax.tree.map(lambda c, x: jnp.broadcast_to(c, x.shape), units, here.params)
        return rows.matrix() * _trees.ravel(wide)[None]

    return Jacobian(
        product=lambda v: rows.product(_times(units, v)),
        transposed_product=lambda u: _times(units, rows.transposed_product(u)),
        gram=lambda: rows.gram(units),
        diagonal=lambda: _times(units, _times(units, rows.diagonal())),
        blocks=lambda: jax.tree.map(block, units, rows.blocks()),
        matrix=matrix,
        squared_norms=lambda: rows.squared_norms(units),
    )


def _times(units: Tree, tree: Tree) -> Tree:
    return jax.tree.map(jnp.multiply, units, tree)

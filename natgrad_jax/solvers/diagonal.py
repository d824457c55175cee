"""The diagonal solver: what Adam's second moment would be with the Fisher matrix in it."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax import curvature
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


def diagonal() -> Solver:
    r"""Divides by the diagonal of the Fisher matrix: an approximation.

    .. math::
        d_i = g_i / (F_{ii} + \lambda)

    Returns:
      A :class:`Solver`, for every metric.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x * p)
      >>> d, _ = ng.natural_gradient_direction(
      ...     metric, jnp.zeros((2,)), jnp.array([[1.0, 2.0]]), jnp.ones((2,)),
      ...     solver=ng.diagonal(), damping=0.0)
      >>> d.tolist()
      [1.0, 0.25]

    Notes:
      With damping 0, entries whose diagonal is exactly 0 give 0. Adam divides by the *root* of the
      diagonal of the empirical Fisher matrix of the batch mean, which is another matrix.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        entries = curvature.diagonal(here)

        def divide(g: jax.Array, entry: jax.Array) -> jax.Array:
            shifted = entry + damping
            return jnp.where(shifted == 0, 0, g / jnp.where(shifted == 0, 1, shifted))

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            d = jax.tree.map(divide, g, entries)
            unseen = jax.tree.map(lambda g, entry: jnp.where(entry == 0, g, 0), g, entries)
            slope, outside = (_trees.vdot(x, d, here.dtype) for x in (g, unseen))
            share = _solver.outside_share(slope - outside, slope)
            measured = share if here.definite else _solver.NOT_MEASURED
            return d, state, _solver.report(outside_row_space=measured)

        return solve, state

    return Solver("diagonal", _solver.stateless, prepare, approximates=True)

"""The block-diagonal solver: one exact block of the Fisher matrix for each parameter leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import curvature
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


def block_diagonal() -> Solver:
    r"""Solves each parameter leaf with its own block of the Fisher matrix: an approximation.

    .. math::
        d_l = (F_{ll} + \lambda I)^{-1} g_l

    Returns:
      A :class:`Solver`, for every metric.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p["w"] + p["b"])
      >>> params = {"w": jnp.zeros((1,)), "b": jnp.zeros(())}
      >>> d, _ = ng.natural_gradient_direction(
      ...     metric, params, jnp.array([[2.0]]), {"w": jnp.ones((1,)), "b": jnp.ones(())},
      ...     solver=ng.block_diagonal(), damping=0.0)
      >>> float(d["w"][0]), float(d["b"])
      (0.25, 1.0)

    Notes:
      O(M P_l + P_l^2) memory and O(M P_l^2 + P_l^3) work for a leaf of P_l parameters and M rows.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        leaves, treedef = jax.tree.flatten(here.params)
        blocks = jax.tree.leaves(curvature.blocks(here))
        factors = [_symmetric.factorize(b, damping, definite=here.definite) for b in blocks]

        def solve(gradient: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            parts = [
                factor.solve(g.reshape(-1)).reshape(leaf.shape)
                for factor, g, leaf in zip(factors, jax.tree.leaves(gradient), leaves, strict=True)
            ]
            terms = [jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), parts, strict=True)]
            seen = [jnp.where(jnp.trace(b) > 0, x, 0) for b, x in zip(blocks, terms, strict=True)]
            zero = jnp.zeros((), here.dtype)
            share = _solver.outside_share(sum(seen, zero), sum(terms, zero))
            taken = jnp.asarray([False, *(factor.eigen_taken for factor in factors)])
            return (
                jax.tree.unflatten(treedef, parts),
                state,
                _solver.report(
                    eigen_taken=jnp.any(taken),
                    outside_row_space=share if here.definite else _solver.NOT_MEASURED,
                ),
            )

        return solve, state

    return Solver("block_diagonal", _solver.stateless, prepare, approximates=True)

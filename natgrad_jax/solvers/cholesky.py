"""The dense solver: F as a P x P matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.curvature import dense_from_rows
from natgrad_jax.curvature import dense_matrix
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


def cholesky() -> Solver:
    r"""Solves with the dense Fisher matrix by a Cholesky factorisation.

    .. math::
        d = (F + \lambda I)^{-1} g

    With damping 0, and where the factorisation fails, an eigendecomposition takes its place:
    damping 0 means the pseudo-inverse, its spectrum cut at eps x P x (largest eigenvalue).

    Returns:
      A :class:`Solver`, for every metric.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> d, info = ng.natural_gradient_direction(
      ...     metric, jnp.zeros((2,)), x, jnp.ones((2,)), solver=ng.cholesky(), damping=0.5)
      >>> bool(jnp.allclose(d, jnp.array([1 / (0.5 + 0.5), 1 / (2 + 0.5)])))
      True

    Notes:
      F is made from the rows R in full: O(M P + P^2) memory, O(M P^2 + P^3) work, for small
      models. In float32 one step of iterative refinement follows, at O(P^2). Eigenvalues of a
      Hessian keep their sign.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        rows = None if here.jacobian is None else here.jacobian()
        matrix = dense_matrix(here) if rows is None else dense_from_rows(rows)
        factor = _symmetric.factorize(matrix, damping, definite=here.definite)

        def residual(d: jax.Array, g: jax.Array) -> jax.Array:
            if rows is None:
                return g - _symmetric.matvec(matrix, d) - damping * d
            # With products of R: the rounding of forming F would stay in the residual.
            tangent = rows.product(_trees.unravel(d, here.params))
            return g - _trees.ravel(rows.transposed_product(tangent)) - damping * d

        def outside(d: jax.Array) -> jax.Array:
            if not here.definite:
                return jnp.asarray(_solver.NOT_MEASURED, here.dtype)
            pushed = _symmetric.matvec(matrix, d)
            few = 64 if matrix.shape[0] <= 256 else 8  # a diagnostic must stay cheap
            inside = _symmetric.solve_in_range(
                jnp.linalg.norm(matrix), damping, factor.solve, pushed, iterations=few
            )
            share = _solver.outside_share(jnp.sum(inside**2), jnp.sum(d**2))
            return jnp.where(damping > 0, share, 0)

        def solve(gradient: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            g = _trees.ravel(gradient)
            d = factor.solve(g)
            if here.dtype == jnp.float32:
                # Not with damping 0, where what is left of g lies outside the range and stays.
                d = jnp.where(damping > 0, d + factor.solve(residual(d, g)), d)
            outcome = _solver.report(
                relative_residual=_solver.relative(residual(d, g), g),
                outside_row_space=outside(d),
                eigen_taken=factor.eigen_taken,
            )
            return _trees.unravel(d, here.params), state, outcome

        return solve, state

    return Solver("cholesky", _solver.stateless, prepare)

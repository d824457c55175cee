"""The sample-space solver: the M x M Gram matrix in place of the P x P Fisher matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


def woodbury() -> Solver:
    r"""Solves in sample space, exactly, for any gradient.

    .. math::
        (R^T R + \lambda I)^{-1} g
        = \frac{1}{\lambda} \left[ g - R^T (R R^T + \lambda I)^{-1} R g \right]

    with the rows R (M, P) of :math:`F = R^T R`. Damping 0 means the pseudo-inverse,
    :math:`F^+ g = R^T (R R^T)^{+2} R g`.

    Returns:
      A :class:`Solver`, for metrics that have rows (all but `hessian` and `euclidean`).

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> log_prob = lambda p, x: -0.5 * (x @ p - 1.0) ** 2
      >>> x = jax.random.normal(jax.random.key(0), (3, 50))      # 3 examples, 50 parameters
      >>> metric, g = ng.empirical_fisher(log_prob), jnp.ones((50,))
      >>> direction = lambda solver: ng.natural_gradient_direction(
      ...     metric, jnp.zeros((50,)), x, g, solver=solver, damping=0.1)[0]
      >>> bool(jnp.allclose(direction(ng.woodbury()), direction(ng.cholesky()), rtol=1e-4))
      True

    Notes:
      O(M^2 P + M^3) work. What lies outside the row space of R is only divided by the damping:
      `info.outside_row_space` reports its share of the step. In float32 a step of iterative
      refinement is taken in sample space always, and with fresh products of R where the damping is
      so small (below about 1e-5 of the largest eigenvalue) that the subtraction cancels.

    References:
      Woodbury, 1950; Chen and Heyl, 2023, Efficient optimization of deep neural quantum states
      toward machine precision.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        rows = here.jacobian()
        gram = rows.gram()
        factor = _symmetric.factorize(gram, damping)
        single = here.dtype == jnp.float32
        inverse = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)

        def residual(w: jax.Array, y: jax.Array) -> jax.Array:
            return y - _symmetric.matvec(gram, w) - damping * w

        def dual(g: Tree) -> tuple[jax.Array, jax.Array]:
            """R g, and w = (R R^T + damping I)^-1 R g."""
            y = rows.product(g)
            w = factor.solve(y)
            if single:
                pays = (damping > 0) & ~factor.eigen_taken
                w = jnp.where(pays, w + factor.solve(residual(w, y)), w)
            return y, w

        def primal(g: Tree, w: jax.Array) -> Tree:
            u = jax.lax.cond(damping > 0, lambda w: -inverse * w, factor.solve, w)
            return _trees.add_scaled(rows.transposed_product(u), inverse, g)

        def refined(g: Tree, d: Tree, ratio: jax.Array) -> tuple[Tree, jax.Array]:
            """One step of refinement with products of R, where damping is small beside R R^T."""
            eps = jnp.finfo(here.dtype).eps
            pays = (
                (damping > 0) & ~factor.eigen_taken & (eps * jnp.linalg.norm(gram) > 1e-2 * damping)
            )

            def left(d: Tree) -> Tree:
                fisher_d = rows.transposed_product(rows.product(d))
                return jax.tree.map(lambda g, f, d: g - f - damping * d, g, fisher_d, d)

            def step(carry: tuple[jax.Array, Tree, jax.Array]) -> tuple[jax.Array, Tree, jax.Array]:
                r = left(carry[1])
                d = _trees.add_scaled(carry[1], jnp.ones((), here.dtype), primal(r, dual(r)[1]))
                measured = _solver.relative(_trees.ravel(left(d)), _trees.ravel(g))
                return jnp.asarray(False), d, measured

            return jax.lax.while_loop(lambda c: c[0], step, (pays, d, ratio))[1:]

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            y, w = dual(g)
            d, ratio = primal(g, w), _relative_residual(g, y, w)
            if single:
                d, ratio = refined(g, d, ratio)
            squared = lambda v: _trees.vdot(v, v, here.dtype)
            # R d = w, so the part of d in the row space is R^T (R R^T)^+ w.
            inside = jnp.dot(w, _symmetric.solve_in_range(gram, factor.solve, w))
            share = _solver.outside_share(inside, squared(d))
            outcome = _solver.report(
                relative_residual=ratio,
                outside_row_space=jnp.where(damping > 0, share, 0),
                eigen_taken=factor.eigen_taken,
            )
            return d, state, outcome

        def _relative_residual(g: Tree, y: jax.Array, w: jax.Array) -> jax.Array:
            # With damping the residual is R^T r / damping for the sample-space residual r; without,
            # it is what the row space does not hold: ||g||^2 - (R g)^T (R R^T)^+ (R g).
            r, norm = residual(w, y), _trees.vdot(g, g, here.dtype)
            damped = jnp.dot(r, _symmetric.matvec(gram, r)) * inverse**2
            squared = jnp.where(damping > 0, damped, norm - jnp.dot(y, w))
            ratio = jnp.maximum(squared, 0) / jnp.where(norm > 0, norm, 1)
            return jnp.where(norm > 0, jnp.sqrt(ratio), 0)

        return solve, state

    return Solver("woodbury", _solver.stateless, prepare, needs_rows=True)

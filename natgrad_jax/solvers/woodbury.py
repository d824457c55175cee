"""The sample-space solver: the M x M Gram matrix in place of the P x P Fisher matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _row_space
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
      refinement is taken in sample space always, and with products of R where the damping is below
      about 1e-5 of the largest eigenvalue; below about 1e-6 the subtraction leaves no digit, and an
      eigendecomposition of R R^T, several times the price, takes its place.

    References:
      Woodbury, 1950; Chen and Heyl, 2023, Efficient optimization of deep neural quantum states
      toward machine precision.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        rows = here.jacobian()
        gram = rows.gram()
        single, eps = here.dtype == jnp.float32, jnp.finfo(here.dtype).eps
        size = jnp.linalg.norm(gram)
        # Below, the subtraction leaves no digit: the modes are then treated one by one.
        hopeless = eps * size > 0.1 * damping
        factor = _symmetric.factorize(gram, damping, decompose=hopeless)
        inverse = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)

        def subtract(g: Tree) -> tuple[Tree, jax.Array, jax.Array]:
            """The formula as it stands, R g, and w = (R R^T + damping I)^-1 R g."""
            y = rows.product(g)
            w = factor.solve(y)
            if single:
                w = w + factor.solve(_left(y, w))
            d = _trees.add_scaled(rows.transposed_product(-inverse * w), inverse, g)
            return d, y, w

        def _left(y: jax.Array, w: jax.Array) -> jax.Array:
            return y - _symmetric.matvec(gram, w) - damping * w

        def refined(g: Tree, d: Tree, ratio: jax.Array) -> tuple[Tree, jax.Array]:
            """Refinement with products of R, while it halves the residual."""

            def step(carry: tuple[jax.Array, Tree, jax.Array]) -> tuple[jax.Array, Tree, jax.Array]:
                _, d, ratio = carry
                correction, _, _ = subtract(_row_space.residual(rows, damping, g, d))
                new = jax.tree.map(jnp.add, d, correction)
                measured = _row_space.relative_residual(here, rows, damping, g, new)
                better = measured < ratio
                kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, d)
                return measured < 0.5 * ratio, kept, jnp.minimum(measured, ratio)

            start = (eps * size > 1e-2 * damping, d, jnp.full_like(ratio, jnp.inf))
            _, d, measured = jax.lax.while_loop(lambda c: c[0], step, start)
            return d, jnp.where(jnp.isfinite(measured), measured, ratio)

        def by_cholesky(g: Tree) -> tuple[Tree, Report]:
            d, y, w = subtract(g)
            # The residual is R^T r / damping for the sample-space residual r.
            r, norm = _left(y, w), _trees.vdot(g, g, here.dtype)
            ratio = inverse * jnp.sqrt(
                jnp.maximum(jnp.dot(r, _symmetric.matvec(gram, r)), 0)
                / jnp.where(norm > 0, norm, 1)
            )
            if single:
                d, ratio = refined(g, d, ratio)
            # R d = w, so the part of d in the row space is R^T (R R^T)^+ w.
            inside = jnp.dot(w, _symmetric.solve_in_range(gram, factor.solve, w))
            share = _solver.outside_share(inside, _trees.vdot(d, d, here.dtype))
            return d, _solver.report(relative_residual=ratio, outside_row_space=share)

        def by_eigen(g: Tree) -> tuple[Tree, Report]:
            gains = _symmetric.damped_inverse(factor.eigen.values, damping)
            return _row_space.apply_gains(
                here, rows, factor.eigen, gains, inverse, damping, g, refine=True
            )

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            d, outcome = jax.lax.cond(factor.eigen_taken, by_eigen, by_cholesky, g)
            return d, state, outcome

        return solve, state

    return Solver("woodbury", _solver.stateless, prepare, needs_rows=True)

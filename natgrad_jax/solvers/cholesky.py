"""The dense solver: F as a P x P matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _orthogonal
from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.curvature import dense_matrix
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import NOT_MEASURED
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.solvers.cg import iterate

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST

#: F is positive definite for certain with so many eps of its norm on the diagonal.
_SHIFT = 10

#: Iterations at most where the factor is that of such a matrix.
_ITERATIONS = 100


def cholesky() -> Solver:
    r"""Solves with the dense Fisher matrix by a Cholesky factorisation.

    .. math::
        d = (F + \lambda I)^{-1} g

    With damping 0 an eigendecomposition takes its place: damping 0 means the pseudo-inverse, its
    spectrum cut at eps x P x (largest eigenvalue).

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
      models. In float32 one step of iterative refinement follows, at O(M P). Where the damping is
      within the rounding of F (10 eps ||F||) the factor is that of a matrix with so much more on
      its diagonal, and conjugate gradients with it as preconditioner solve the system itself.
      Eigenvalues of a Hessian keep their sign; where its factorisation fails the
      eigendecomposition takes its place.
    """
    return dense(decompose=True)


def dense(*, decompose: bool) -> Solver:
    """`cholesky`; with `decompose=False` its direction is no good where `eigen_taken` is told."""

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        system = _system(here, damping, decompose=decompose)

        def solve(gradient: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            g = _trees.ravel(gradient)
            d = _refined(system, g, system.factor.solve(g))
            outcome = _solver.report(
                relative_residual=_solver.relative(_left(system, g, d), g),
                outside_row_space=_outside_share(system, d) if here.definite else NOT_MEASURED,
                eigen_taken=system.factor.eigen_taken,
            )
            return _trees.unravel(d, here.params), state, outcome

        return solve, state

    return Solver("cholesky", _solver.stateless, prepare)


class _System(NamedTuple):
    """F (P, P), v -> (F + damping I) v, and a factor."""

    matrix: jax.Array
    damping: jax.Array
    product: Callable[[jax.Array], jax.Array]
    factor: _symmetric.Factor
    has_rows: bool


def _system(here: Curvature, damping: jax.Array, *, decompose: bool) -> _System:
    rows = None if here.jacobian is None else here.jacobian().matrix()
    matrix = dense_matrix(here) if rows is None else jnp.matmul(rows.T, rows, precision=_HIGHEST)
    rounding = _SHIFT * jnp.finfo(here.dtype).eps * jnp.linalg.norm(matrix)
    options = {} if rows is None else {"floor": rounding, "shift": rounding}
    factor = _symmetric.factorize(
        matrix, damping, definite=here.definite, decompose=decompose, **options
    )

    def fisher_product(v: jax.Array) -> jax.Array:
        # With products of R: the rounding of forming F would stay in the residual.
        whole = rows is None
        return _symmetric.matvec(matrix, v) if whole else _orthogonal.fisher_product(rows, v)

    product = lambda v: fisher_product(v) + damping * v
    return _System(matrix, damping, product, factor, rows is not None)


def _left(system: _System, g: jax.Array, d: jax.Array) -> jax.Array:
    return g - system.product(d)


def _refined(system: _System, g: jax.Array, d: jax.Array) -> jax.Array:
    """One step of refinement in float32, or many where the factor is only a preconditioner.

    Not with damping 0, where what is left of g lies outside the range and stays.
    """
    once = int(g.dtype == jnp.float32)
    if not system.has_rows:
        if not once:
            return d
        better = d + system.factor.solve(_left(system, g, d))
        norm = lambda d: _solver.norm(_left(system, g, d))
        return jnp.where((system.damping > 0) & (norm(better) < norm(d)), better, d)
    exact = jnp.where(system.factor.eigen_taken, 0, once)
    limit = jnp.where(system.factor.shifted, _ITERATIONS, exact)
    # Down to rounding: of weak modes little is seen in the residual.
    tol = 10 * float(jnp.finfo(g.dtype).eps)
    product, solve = system.product, system.factor.solve
    return iterate(product, solve, system.damping, g, d, product(d), tol=tol, limit=limit).best


def _outside_share(system: _System, d: jax.Array) -> jax.Array:
    unit, _ = _trees.normalised(d, d.dtype)
    pushed = _symmetric.matvec(system.matrix, unit)
    few = 64 if d.shape[0] <= 256 else 8  # a diagnostic must stay cheap
    factor = system.factor
    inside = _symmetric.solve_in_range(
        jnp.linalg.norm(system.matrix), factor.damping, factor.solve, pushed, iterations=few
    )
    share = _solver.outside_share(jnp.sum(inside**2), jnp.sum(unit**2))
    return jnp.where(system.damping > 0, share, 0)

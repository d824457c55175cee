"""The solver by orthogonal factors of the rows, which never squares their condition number."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _orthogonal
from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST

#: Iterations at most where the damping is rounding beside the rows.
_ITERATIONS = 100


def qr() -> Solver:
    r"""Solves by orthogonal factors of the rows, which keep the digits that a product loses.

    .. math::
        \begin{pmatrix} R \\ \sqrt{\lambda} I \end{pmatrix} = Q L, \qquad
        d = (R^T R + \lambda I)^{-1} g = L^{-1} L^{-T} g

    with the rows R (M, P) of :math:`F = R^T R`, for any gradient g; with fewer rows than parameters
    the factors are those of :math:`R^T`, and what lies outside the row space is divided by the
    damping. Damping 0 means the pseudo-inverse. Its null modes are those whose singular value is
    at most 10 eps sqrt(min(M, P)) times the largest: of R where M < P, and otherwise of R with
    columns of unit length, so that units of parameters do not decide (columns below that share of
    the longest are null, whatever their unit).

    Returns:
      A :class:`Solver`, for metrics that have rows (all but `hessian` and `euclidean`).

    Examples:
      Columns that nearly agree: in float32 their product is singular, 1 + 1e-8 being 1.

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> x, start = jnp.array([[1.0, 1.0], [1e-4, 0.0], [0.0, 1e-4]]), jnp.array([1.0, -1.0])
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> step = lambda solver: ng.natural_gradient_direction(
      ...     metric, start, x, x.T @ (x @ start) / 3, solver=solver, damping=0.0)[0]
      >>> bool(jnp.allclose(step(ng.qr()), start, rtol=1e-3))
      True
      >>> bool(jnp.allclose(step(ng.cholesky()), start, rtol=1e-3))
      False

    Notes:
      Modes whose singular value is a share :math:`\sigma` of the largest are resolved while
      :math:`\sigma` is above eps; `cholesky`, `woodbury` and `spectral` need :math:`\sigma^2` above
      it: in float32 1e-6 in place of 3e-4. It pays where small modes decide: equations with
      derivatives, polynomials, parameters in different units, small damping. The gradient comes in
      rounded, by eps ||R|| ||r|| for residuals r: so take several steps, each from a smaller r.

      Rows are formed in full, M x P numbers. It takes 2 (M + P) P^2 operations for M >= P and
      4 P M^2 otherwise, two to four times those of `cholesky` and `woodbury`, and one step of
      refinement. Where the damping is rounding beside the rows (below the square of the share
      above), conjugate gradients follow with the factor as preconditioner. With damping 0 singular
      values of the triangle are taken where some may be null (`info.eigen_taken`).

    References:
      Björck, 1996, Numerical methods for least squares problems, chapters 2 and 6 (corrected
      seminormal equations).
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        system = _system(here.jacobian().matrix(), damping)

        def solve(gradient: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            g = _trees.ravel(gradient)
            d, residual = _direction(system, g)
            outcome = _solver.report(
                relative_residual=residual,
                outside_row_space=_outside_share(system, d),
                eigen_taken=system.factor.used_svd,
            )
            return _trees.unravel(_in_units(system, d), here.params), state, outcome

        return solve, state

    return Solver("qr", _solver.stateless, prepare, needs_rows=True)


def one_direction(here: Curvature, damping: jax.Array, gradient: Tree) -> tuple[Tree, Report]:
    """One direction, where another solver has failed; all that is not needed for it is left out.

    Of `outside_row_space` it tells the part that lies outside of the span of the rows, not what
    lies in null modes of dependent rows.
    """
    system = _system(here.jacobian().matrix(), damping)
    d, residual = _direction(system, _trees.ravel(gradient))
    outcome = _solver.report(
        relative_residual=residual,
        outside_row_space=_unspanned_share(system, d),
        eigen_taken=system.factor.used_svd,
    )
    return _trees.unravel(_in_units(system, d), here.params), outcome


class _System(NamedTuple):
    """(R^T R + damping I) d = g for rows and damping in units in which they are at most one.

    Attributes:
      size: that unit, a power of two: rows are R / size, the damping lambda / size^2.
      rows: (M, P).
      damping: scalar.
      basis: orthonormal columns (P, M) that span the rows where M < P, otherwise None.
      core: the rows in that basis, (M, M); the rows themselves otherwise.
      factor: of these.
    """

    size: jax.Array
    rows: jax.Array
    damping: jax.Array
    basis: jax.Array | None
    core: jax.Array
    factor: _orthogonal.Factor


def _system(rows: jax.Array, damping: jax.Array) -> _System:
    root = jnp.sqrt(damping)
    (rows, root), size = _trees.normalised((rows, root), rows.dtype)
    wide = rows.shape[0] < rows.shape[1]
    core, basis = _orthogonal.reduced(rows) if wide else (rows, None)
    factor = _orthogonal.factorize(core, root * root, equilibrate=not wide)
    return _System(size, rows, root * root, basis, core, factor)


def _apply(system: _System, g: jax.Array) -> jax.Array:
    if system.basis is None:
        return system.factor.solve(g)
    modes, outside = _orthogonal.outside(system.basis, g)
    damping = system.factor.damping
    gain = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)
    return _symmetric.matvec(system.basis, system.factor.solve(modes)) + gain * outside


def _product(system: _System, v: jax.Array) -> jax.Array:
    return _orthogonal.fisher_product(system.rows, v) + system.damping * v


def _in_units(system: _System, d: jax.Array) -> jax.Array:
    return d / system.size / system.size


class _Iterate(NamedTuple):
    """Of conjugate gradients: d, its search direction, residual, r^T (preconditioned r), count."""

    d: jax.Array
    p: jax.Array
    r: jax.Array
    rho: jax.Array
    number: jax.Array


def _direction(system: _System, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The solution and its relative residual.

    The factor is applied twice, to the gradient and to the residual. Where it is only a
    preconditioner, it takes conjugate gradients, whose residual is made anew each time.
    """
    shifted, dot = system.factor.shifted, functools.partial(jnp.dot, precision=_HIGHEST)
    limit = jnp.where(shifted, _ITERATIONS, 2)
    target = 10 * jnp.finfo(g.dtype).eps * jnp.linalg.norm(g)

    def step(s: _Iterate) -> _Iterate:
        z = _apply(system, s.r)
        rho = dot(s.r, z)
        usable = shifted & (s.number > 1) & (s.rho > 0)
        beta = jnp.where(usable, rho / jnp.where(usable, s.rho, 1), 0)
        p = z + beta * s.p
        curvature = dot(p, _product(system, p))
        steps = shifted & (s.number > 0) & (curvature > 0)
        length = jnp.where(steps, dot(s.r, p) / jnp.where(steps, curvature, 1), 1)
        d = s.d + length * p
        return _Iterate(d, p, g - _product(system, d), rho, s.number + 1)

    def unfinished(s: _Iterate) -> jax.Array:
        known = ~shifted | (jnp.linalg.norm(s.r) > target)
        return (s.number < limit) & known

    zero = jnp.zeros_like(g)
    start = _Iterate(zero, zero, g, jnp.zeros((), g.dtype), jnp.zeros((), jnp.int32))
    end = jax.lax.while_loop(unfinished, step, start)
    return end.d, _solver.relative(end.r, g)


def _unspanned_share(system: _System, d: jax.Array) -> jax.Array:
    zero = jnp.zeros((), d.dtype)
    if system.basis is None:
        return zero
    d, _ = _trees.normalised(d, d.dtype)
    inside = _symmetric.matvec(system.basis.T, d)
    share = _solver.outside_share(jnp.sum(inside**2), jnp.sum(d**2))
    return jnp.where(system.damping > 0, share, zero)


def _outside_share(system: _System, d: jax.Array) -> jax.Array:
    """Of the direction, by conjugate gradients on F with the factor as preconditioner."""
    d, _ = _trees.normalised(d, d.dtype)
    modes = d if system.basis is None else _symmetric.matvec(system.basis.T, d)
    few = 64 if modes.shape[0] <= 256 else 8  # a diagnostic must stay cheap
    damping, solve = system.factor.damping, system.factor.solve
    # The curvature of a null mode comes out as rounding of L, not of F = L^T L.
    noise = jnp.linalg.norm(system.core) * jnp.sqrt(damping)
    pushed = _orthogonal.fisher_product(system.core, modes)
    inside = _symmetric.solve_in_range(noise, damping, solve, pushed, iterations=few)
    share = _solver.outside_share(jnp.sum(inside**2), jnp.sum(d**2))
    return jnp.where(system.damping > 0, share, 0)

"""The sample-space solver: the M x M Gram matrix in place of the P x P Fisher matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.jacobian import Jacobian
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any

#: The subtraction of the formula may cost this share of the direction before it is corrected.
_LOST = 1e-4

#: So may what Cholesky leaves, relative to the gradient.
_RESIDUAL = 1e-2

#: Rounds of one solve, at most; one correction leaves rounding behind, unless the damping is tiny.
_ROUNDS = 5


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
      O(M^2 P + M^3) work; M^2 (p + q) for a layer of p inputs and q outputs. Rows of parameters
      that enter linearly are held in factored form, N (p + q) numbers an output column and position
      at most (:func:`explain`), beside the O(M^2) of the Gram matrix. What lies outside the
      row space of R is only divided by the damping: `info.outside_row_space` reports its share of
      the step. Where rounding in the subtraction would be seen in the direction (g within the row
      space, small damping), the direction is corrected by its residual, for four products of R
      instead of two. With damping 0, and where Cholesky fails, an eigendecomposition
      of R R^T takes its place, several times the price.

    References:
      Woodbury, 1950; Chen and Heyl, 2023, Efficient optimization of deep neural quantum states
      toward machine precision.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        space = _sample_space(here, damping)

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            # One product of R and one transposed product a round, and nearly always one round: a
            # loop compiles them once, the rounds that rarely run included.
            unfinished = lambda s: s.going & (s.count < _ROUNDS)
            end = jax.lax.while_loop(unfinished, lambda s: _round(space, s), _start(g, here, space))
            outcome = _solver.report(
                relative_residual=_ratio(jnp.hypot(end.error, end.outside), end.g_norm),
                outside_row_space=_solver.outside_share(
                    _inside_squared(space, end.w), end.d_squared
                ),
                eigen_taken=space.eigen_taken,
                # g^T d = d^T (F + damping I) d, with R d = w: a sum of squares.
                grad_dot_direction=jnp.dot(end.w, end.w) + damping * end.d_squared,
            )
            return end.d, state, outcome

        return solve, state

    return Solver("woodbury", _solver.stateless, prepare, needs_rows=True)


class _SampleSpace(NamedTuple):
    """R, K = R R^T, and b -> (K + damping I)^-1 b, which drops the null space of K if it is met."""

    rows: Jacobian
    gram: jax.Array
    norm: jax.Array
    damping: jax.Array
    solve: Callable[[jax.Array], jax.Array]
    eigen_taken: jax.Array

    def left(self, b: jax.Array, x: jax.Array) -> jax.Array:
        """b - (K + damping I) x."""
        return b - _symmetric.matvec(self.gram, x) - self.damping * x


def _sample_space(here: Curvature, damping: jax.Array) -> _SampleSpace:
    rows = here.jacobian()
    gram = rows.gram()
    norm = jnp.linalg.norm(gram)
    # A pivot within the rounding of the Gram matrix says that repeated rows, not the damping,
    # decide what the factor holds.
    floor = 10 * jnp.finfo(here.dtype).eps * norm
    factor = _symmetric.factorize(gram, damping, floor=floor, in_range=True)
    return _SampleSpace(rows, gram, norm, damping, factor.solve, factor.eigen_taken)


def _solve(space: _SampleSpace, y: jax.Array) -> jax.Array:
    """(K + damping I)^-1 y, in float32 with one step of refinement."""
    if y.dtype != jnp.float32:
        return space.solve(y)
    # A loop holds one solve, where two in a row would be compiled twice.
    again = lambda _, w: w + space.solve(space.left(y, w))
    return jax.lax.fori_loop(0, 2, again, jnp.zeros_like(y))


class _Round(NamedTuple):
    """Where a solve stands.

    Attributes:
      count: rounds so far.
      d: the direction; before the first round g.
      w: what R d is to be, (M,): g = R^T w + damping d, up to rounding.
      d_squared: ||d||^2.
      g_norm: ||g||.
      error: ||R^T (w - R d)||, all that (F + damping I) d lacks of R^T w + damping d.
      outside: ||g - R^T w|| for damping 0, which no direction can make up for; 0 otherwise.
      going: whether digits are missing.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    d: Tree
    w: jax.Array
    d_squared: jax.Array
    g_norm: jax.Array
    error: jax.Array
    outside: jax.Array
    going: jax.Array


def _start(g: Tree, here: Curvature, space: _SampleSpace) -> _Round:
    zero = jnp.zeros((), here.dtype)
    w = jnp.zeros(space.gram.shape[:1], here.dtype)
    count, going = jnp.zeros((), jnp.int32), jnp.asarray(True)
    return _Round(count, g, w, zero, zero, zero, zero, going)


def _round(space: _SampleSpace, s: _Round) -> _Round:
    """The formula first, then corrections d + R^T (K + damping I)^-1 (w - R d).

    The residual of d is R^T (w - R d) whatever rounding has done to d and w, so it is taken in
    sample space, and what solves for it there is pushed through: no subtraction, no division by the
    damping. Correcting d by R^T v corrects w by - damping v. With damping 0, the first round leaves
    g - R^T w, the second takes the rest of the rows out of it, the next makes d of w.
    """
    damping, damped = space.damping, space.damping > 0
    scale = jnp.where(damped, damping, 1)
    first, projecting = s.count == 0, ~damped & (s.count == 1)
    y = space.rows.product(s.d)
    wrong = jnp.where(first | projecting, y, s.w - y)
    v = _solve(space, wrong)
    pushed = _symmetric.matvec(space.gram, v)
    # The formula has R d = v + left / damping.
    missing = jnp.where(first, (y - pushed - damping * v) / scale, wrong)
    error = _root(jnp.dot(missing, _symmetric.matvec(space.gram, missing)))
    # What grew has met rounding divided by a tiny damping: more of it would not help.
    better = (s.count <= jnp.where(damped, 1, 2)) | (error < s.error)
    v = jnp.where(better, v, 0)
    keep = jnp.where(first, 1 / scale, jnp.where(projecting, 0, 1))
    add = jnp.where(first, -1 / scale, keep)
    back = space.rows.transposed_product(v)
    d = jax.tree.map(lambda d, t: keep * d + add * t, s.d, back)
    d_squared = _trees.vdot(d, d, v.dtype)
    # After the formula, scale d is g - R^T v; g is R^T v + damping d with R d = v.
    kept = scale * jnp.sqrt(d_squared)
    g_norm = jnp.where(first, _root(kept**2 + jnp.dot(v, pushed + 2 * damping * v)), s.g_norm)
    rounding = jnp.finfo(v.dtype).eps * (g_norm + jnp.sqrt(space.norm) * jnp.linalg.norm(v))
    sound = ~space.eigen_taken & (rounding <= _LOST * kept) & (error <= _RESIDUAL * g_norm)
    rest = s.d_squared - 2 * jnp.dot(v, y) + jnp.dot(v, pushed)
    outside = jnp.where(first, kept, jnp.where(projecting, _root(rest), s.outside))
    return _Round(
        count=s.count + 1,
        d=d,
        w=s.w + jnp.where(first | projecting, 1, -damping) * v,
        d_squared=d_squared,
        g_norm=g_norm,
        error=jnp.where(better, error, s.error),
        outside=jnp.where(damped, 0, outside),
        going=jnp.where(first, ~sound, projecting | (better & (error > _LOST * g_norm))),
    )


def _root(square: jax.Array) -> jax.Array:
    """The root of what rounding may have made negative."""
    return jnp.sqrt(jnp.maximum(square, 0))


def _inside_squared(space: _SampleSpace, w: jax.Array) -> jax.Array:
    """The squared norm of the part of d in the row space, w^T K^+ w for R d = w.

    A diagnostic must stay cheap beside the factorisation: where that is large, three iterations
    have to do, and modes far below the damping count as outside.
    """
    few = 64 if w.shape[0] <= 256 else 3
    inside = _symmetric.solve_in_range(space.norm, space.damping, space.solve, w, iterations=few)
    return jnp.dot(w, inside)


def _ratio(norm: jax.Array, of: jax.Array) -> jax.Array:
    return jnp.where(of > 0, norm / jnp.where(of > 0, of, 1), 0)

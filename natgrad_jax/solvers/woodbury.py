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

#: Corrections, at most; the first one leaves rounding behind, unless the damping is tiny.
_ROUNDS = 4


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
      O(M^2 P + M^3) work; M^2 (p + q) for a layer of p inputs and q outputs. What lies outside the
      row space of R is only divided by the damping: `info.outside_row_space` reports its share of
      the step. Where rounding in the subtraction would be seen in the direction (g within the row
      space, small damping), the part inside is computed apart from the part outside, for four
      products of R instead of two. With damping 0, and where Cholesky fails, an eigendecomposition
      of R R^T takes its place, several times the price.

    References:
      Woodbury, 1950; Chen and Heyl, 2023, Efficient optimization of deep neural quantum states
      toward machine precision.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        space = _sample_space(here, damping)
        inverse = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 1)

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            y = space.rows.product(g)
            w = _solve(space, y)
            inside = space.rows.transposed_product(w)
            d = jax.tree.map(lambda g, r: inverse * (g - r), g, inside)
            found = _judge(space, y, w, d)
            d, found = _correct(space, found, d)
            share = _solver.outside_share(_inside_squared(space, found.w), found.d_squared)
            outcome = _solver.report(
                relative_residual=found.residual,
                outside_row_space=share,
                eigen_taken=space.eigen_taken,
                # g^T d = d^T (F + damping I) d, with R d = w: a sum of squares.
                grad_dot_direction=jnp.dot(found.w, found.w) + damping * found.d_squared,
            )
            return d, state, outcome

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

    def row_norm(self, u: jax.Array) -> jax.Array:
        """||R^T u||."""
        return jnp.sqrt(jnp.maximum(jnp.dot(u, _symmetric.matvec(self.gram, u)), 0))

    def left(self, b: jax.Array, x: jax.Array) -> jax.Array:
        """b - (K + damping I) x."""
        return b - _symmetric.matvec(self.gram, x) - self.damping * x


class _Found(NamedTuple):
    """What is known of a direction d.

    Attributes:
      w: what R d is to be, (M,): g = R^T w + damping d, up to rounding.
      d_squared: ||d||^2.
      g_norm: ||g||.
      outside: ||g - R^T w|| for damping 0, which no direction can make up for; 0 otherwise.
      residual: ||(F + damping I) d - g|| / ||g||.
      doubtful: whether digits are missing.
    """

    w: jax.Array
    d_squared: jax.Array
    g_norm: jax.Array
    outside: jax.Array
    residual: jax.Array
    doubtful: jax.Array


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


def _judge(space: _SampleSpace, y: jax.Array, w: jax.Array, d: Tree) -> _Found:
    """Measures d = (g - R^T w) / damping, or g - R^T w for damping 0, in sample space."""
    damped = space.damping > 0
    scale = jnp.where(damped, space.damping, 1)
    pushed = _symmetric.matvec(space.gram, w)
    d_squared = _trees.vdot(d, d, w.dtype)
    kept = scale * jnp.sqrt(d_squared)
    # ||R^T w + damping d||, with R d = w.
    along = jnp.maximum(jnp.dot(w, pushed + 2 * space.damping * w), 0)
    g_norm = jnp.sqrt(kept**2 + along)
    # R d = w + left / damping.
    residual = _ratio(space.row_norm(space.left(y, w)) / scale, g_norm)
    rounding = jnp.finfo(w.dtype).eps * (g_norm + jnp.sqrt(space.norm) * jnp.linalg.norm(w))
    sound = ~space.eigen_taken & (rounding <= _LOST * kept) & (residual <= _RESIDUAL)
    return _Found(w, d_squared, g_norm, jnp.where(damped, 0, kept), residual, ~sound)


class _Round(NamedTuple):
    """A correction; `error` is ||R^T (w - R d)||, what it corrects."""

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    w: jax.Array
    d: jax.Array
    outside: jax.Array
    error: jax.Array
    going: jax.Array


def _correct(space: _SampleSpace, found: _Found, d: Tree) -> tuple[Tree, _Found]:
    """d + R^T (K + damping I)^-1 (w - R d), where digits are missing.

    The residual of d is R^T (w - R d) whatever rounding has done to d and w, so it is taken in
    sample space, and what solves for it there is pushed through: no subtraction, no division by the
    damping. Correcting d by R^T v corrects w by - damping v. With damping 0, d comes as
    g - R^T w: a first round takes the rest of the rows out of it, the next makes d of w.
    One product and one transposed product, on raveled vectors: it rarely runs, and compiles fast.
    """
    damping = space.damping

    def step(s: _Round) -> _Round:
        projecting = (damping <= 0) & (s.count == 0)
        y = space.rows.product(_trees.unravel(s.d, d))
        wrong = jnp.where(projecting, y, s.w - y)
        error = space.row_norm(wrong)
        # What grew has met rounding divided by a tiny damping: more of it would not help.
        v = jnp.where(projecting | (error < s.error), space.solve(wrong), 0)
        back = _trees.ravel(space.rows.transposed_product(jnp.where(projecting, 0, v)))
        rest = jnp.dot(s.d, s.d) - 2 * jnp.dot(v, y) + space.row_norm(v) ** 2
        return _Round(
            count=s.count + 1,
            w=s.w + jnp.where(projecting, 1, -damping) * v,
            d=jnp.where(projecting, 0, s.d) + back,
            outside=jnp.where(projecting, jnp.sqrt(jnp.maximum(rest, 0)), s.outside),
            error=jnp.where(projecting, s.error, jnp.minimum(error, s.error)),
            going=projecting | ((error < s.error) & (error > _LOST * found.g_norm)),
        )

    def run(carry: tuple[Tree, _Found]) -> tuple[Tree, _Found]:
        start = _Round(
            count=jnp.zeros((), jnp.int32),
            w=found.w,
            d=_trees.ravel(carry[0]),
            outside=found.outside,
            error=jnp.full_like(found.residual, jnp.inf),
            going=jnp.asarray(True),
        )
        end = jax.lax.while_loop(lambda s: s.going & (s.count < _ROUNDS), step, start)
        return _trees.unravel(end.d, d), found._replace(
            w=end.w,
            d_squared=jnp.dot(end.d, end.d),
            outside=end.outside,
            residual=_ratio(jnp.hypot(end.error, end.outside), found.g_norm),
            doubtful=jnp.asarray(False),
        )

    # A loop of at most one trip: what it needs is made only where it runs.
    return jax.lax.while_loop(lambda carry: carry[1].doubtful, run, (d, found))


def _inside_squared(space: _SampleSpace, w: jax.Array) -> jax.Array:
    """The squared norm of the part of d in the row space, w^T K^+ w for R d = w.

    A diagnostic must stay cheap beside the factorisation: where that is large, three iterations
    have to do, and modes far below the damping count as outside.
    """
    few = 64 if w.shape[0] <= 256 else 3
    return jnp.dot(w, _symmetric.solve_in_range(space.gram, space.solve, w, iterations=few))


def _ratio(norm: jax.Array, of: jax.Array) -> jax.Array:
    return jnp.where(of > 0, norm / jnp.where(of > 0, of, 1), 0)

"""The sample-space solver: the M x M Gram matrix in place of the P x P Fisher matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.jacobian import Jacobian
from natgrad_jax.solvers import _row_space
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any

#: The subtraction of the formula may cost this share of the direction before it is corrected.
_LOST = 1e-4

#: So may what Cholesky leaves, relative to the gradient.
_RESIDUAL = 1e-2

#: Of the bound on what rounding does to the residual so much is seen: errors average out.
_BLUR = 0.05

#: Rounds of one solve, at most; one correction leaves rounding behind, unless the damping is tiny.
_ROUNDS = 5

#: The same where the factor is only a preconditioner, and rounds without progress that end it.
_ITERATIONS, _PATIENCE = 100, 10

#: A Gram matrix is positive definite for certain with so many eps of its norm on the diagonal.
_SHIFT = 10


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
      instead of two. Where the damping is within the rounding of R R^T (10 eps of its norm), the
      factor is that of a matrix with so much more on its diagonal, and conjugate gradients with it
      as preconditioner follow. With damping 0 an eigendecomposition of R R^T takes its place.

    References:
      Woodbury, 1950; Chen and Heyl, 2023, Efficient optimization of deep neural quantum states
      toward machine precision.
    """
    return sample_space(decompose=True)


def sample_space(*, decompose: bool) -> Solver:
    """`woodbury`; with `decompose=False` its direction is no good where `eigen_taken` is told."""

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        space = _sample_space(here, damping, decompose=decompose)

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            # One product of R and one transposed product a round, and nearly always one round: a
            # loop compiles them once, the rounds that rarely run included.
            limit = jnp.where(space.factor.shifted, _ITERATIONS, _ROUNDS)
            unfinished = lambda s: s.going & (s.count < limit)
            end = jax.lax.while_loop(unfinished, lambda s: _round(space, s), _start(g, here, space))
            outcome = _solver.report(
                relative_residual=_ratio(jnp.hypot(end.error, end.outside), end.g_norm),
                outside_row_space=_solver.outside_share(
                    _inside_squared(space, end.w), end.d_squared
                ),
                eigen_taken=space.factor.eigen_taken,
                grad_dot_direction=_slope(space, end),
            )
            in_units = space.root * space.unit * space.unit
            return jax.tree.map(lambda d: d / in_units, end.d), state, outcome

        return solve, state

    return Solver("woodbury", _solver.stateless, prepare, needs_rows=True)


class _SampleSpace(NamedTuple):
    """R, K = R R^T and damping in units in which they are at most of order one.

    Attributes:
      rows: R.
      unit: of R, a power of two: in what follows R stands for R / unit, K for K / unit^2, the
        damping for damping / unit^2.
      gram: K, not yet divided.
      norm: of K.
      damping: scalar.
      root: a power of two near its root, 1 for damping 0.
      factor: of K + damping I; it drops the null space of K if it is met.
    """

    rows: Jacobian
    unit: jax.Array
    gram: jax.Array
    norm: jax.Array
    damping: jax.Array
    root: jax.Array
    factor: _symmetric.Factor

    def pushed(self, x: jax.Array) -> jax.Array:
        """K x. Vectors are scaled, not matrices: that would take a pass over them."""
        return _symmetric.matvec(self.gram, x / self.unit) / self.unit

    def left(self, b: jax.Array, x: jax.Array) -> jax.Array:
        """b - (K + damping I) x."""
        return b - self.pushed(x) - self.damping * x


def _sample_space(here: Curvature, damping: jax.Array, *, decompose: bool) -> _SampleSpace:
    rows = here.jacobian()
    gram = rows.gram()
    unit = _row_space.unit_of(gram, damping)
    damping = damping / unit / unit
    norm = jnp.linalg.norm(gram / (unit * unit))
    # A pivot within the rounding of the Gram matrix says that repeated rows, not the damping,
    # decide what the factor holds.
    floor = _SHIFT * jnp.finfo(here.dtype).eps * norm
    factor = _symmetric.factorize(
        gram,
        damping,
        floor=floor,
        in_range=True,
        shift=floor,
        decompose=decompose,
        unit=unit * unit,
    )
    # No less than lets errors of 1e-4 be seen when squared.
    least = 1e4 * float(jnp.finfo(here.dtype).tiny) ** 0.5
    root = _trees.power_of_two(jnp.maximum(jnp.sqrt(damping), least))
    root = jnp.where(damping > 0, root, 1)
    rows = _row_space.in_units(rows, unit)
    return _SampleSpace(rows, unit, gram, norm, damping, root, factor)


def _solve(space: _SampleSpace, y: jax.Array) -> jax.Array:
    """(K + damping I)^-1 y, in float32 with one step of refinement."""
    if y.dtype != jnp.float32:
        return space.factor.solve(y)
    # A loop holds one solve, where two in a row would be compiled twice.
    again = lambda _, w: w + space.factor.solve(space.left(y, w))
    return jax.lax.fori_loop(0, 2, again, jnp.zeros_like(y))


class _Round(NamedTuple):
    """Where a solve stands.

    d is as large as g / damping and as small as g: times the root of the damping, as d, w and all
    that corrects them are held, neither end over- or underflows when squared.

    Attributes:
      count: rounds so far.
      d: the direction times that root; before the first round g.
      w: what R d is to be, (M,), times that root: g = R^T w + damping d, up to rounding.
      d_squared: ||d||^2, of d so held.
      g_norm: ||g||.
      error: ||R^T (w - R d)||, all that (F + damping I) d lacks of R^T w + damping d.
      outside: ||g - R^T w|| for damping 0, which no direction can make up for; 0 otherwise.
      search: the last correction of w and what it was found from: p, w - R d and their product.
      idle: rounds since the error was lowest.
      lowest: that error.
      going: whether digits are missing.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    d: Tree
    w: jax.Array
    d_squared: jax.Array
    g_norm: jax.Array
    error: jax.Array
    outside: jax.Array
    search: "_Search"
    idle: jax.Array
    lowest: jax.Array
    going: jax.Array


class _Search(NamedTuple):
    """Of conjugate gradients: direction p, residual r and r^T (preconditioned r)."""

    p: jax.Array
    r: jax.Array
    rho: jax.Array


def _start(g: Tree, here: Curvature, space: _SampleSpace) -> _Round:
    zero = jnp.zeros((), here.dtype)
    w = jnp.zeros(space.gram.shape[:1], here.dtype)
    count, going = jnp.zeros((), jnp.int32), jnp.asarray(True)
    search, far = _Search(w, w, zero), jnp.full((), jnp.inf, here.dtype)
    return _Round(count, g, w, zero, zero, zero, zero, search, count, far, going)


def _round(space: _SampleSpace, s: _Round) -> _Round:
    """The formula first, then corrections of d by R^T p, p from (K + damping I)^-1 (w - R d).

    The residual of d is R^T (w - R d) whatever rounding has done to d and w, so it is taken in
    sample space, and what solves for it there is pushed through: no subtraction, no division by the
    damping. Correcting d by R^T p corrects w by - damping p. These are conjugate gradients on
    K + damping I, in the form of Polak and Ribière as the residual is made anew in each round: with
    a factor that is exact up to rounding p is the whole correction. With damping 0, the first round
    leaves g - R^T w, the second takes the rest of the rows out of it, the next makes d of w.
    """
    damping, damped = space.damping, space.damping > 0
    scale = jnp.where(damped, damping / space.root, 1)
    first, projecting = s.count == 0, ~damped & (s.count == 1)
    y = space.rows.product(s.d)
    wrong = jnp.where(first | projecting, y, s.w - y)
    z = _solve(space, wrong)
    pushed = space.pushed(z)
    # The formula has R d = z + left / damping.
    missing = jnp.where(first, (y - pushed - damping * z) / scale, wrong)
    error = _root(jnp.dot(missing, space.pushed(missing))) / space.root
    idle = jnp.where(error < s.lowest, 0, s.idle + 1)
    # Of many small corrections the last does not lower the error by much: told is what is left.
    reached = space.factor.shifted & (error <= 10 * jnp.finfo(y.dtype).eps * s.g_norm)
    # What grew has met rounding divided by a tiny damping: more of it would not help.
    patience = jnp.where(space.factor.shifted, _PATIENCE, 1)
    better = (s.count <= jnp.where(damped, 1, 2)) | (idle < patience)
    v, rho = _search_direction(s, space.factor.shifted, wrong, z)
    back = space.rows.transposed_product(v)
    length = jnp.where(first | ~space.factor.shifted, 1, _step_length(damping, wrong, v, back))
    length = jnp.where(better & (first | ~reached), length, 0)
    keep = jnp.where(first, 1 / scale, jnp.where(projecting, 0, 1))
    add = jnp.where(first, -1 / scale, keep * length)
    d = jax.tree.map(lambda d, t: keep * d + add * t, s.d, back)
    d_squared = _trees.vdot(d, d, v.dtype)
    # After the formula, scale d is g - R^T z; g is R^T z + damping d with R d = z.
    kept = scale * jnp.sqrt(d_squared)
    g_norm = jnp.where(first, _root(kept**2 + jnp.dot(z, pushed + 2 * damping * z)), s.g_norm)
    rounding = jnp.finfo(v.dtype).eps * (g_norm + jnp.sqrt(space.norm) * jnp.linalg.norm(z))
    blurred = _BLUR * space.norm * rounding / (scale * space.root)
    exact = ~space.factor.eigen_taken & ~space.factor.shifted
    sound = exact & (rounding <= _LOST * kept) & (error <= _RESIDUAL * g_norm)
    rest = s.d_squared - 2 * jnp.dot(z, y) + jnp.dot(z, pushed)
    outside = jnp.where(first, kept, jnp.where(projecting, _root(rest), s.outside))
    missed = jnp.where(space.factor.shifted, ~reached, error > _LOST * g_norm)
    return _Round(
        count=s.count + 1,
        d=d,
        w=s.w + jnp.where(first, space.root, jnp.where(projecting, 1, -damping * length)) * v,
        d_squared=d_squared,
        g_norm=g_norm,
        # Rounding of d, which the rows amplify, is not in what the Gram matrix tells.
        error=jnp.where(first, jnp.maximum(error, blurred), jnp.where(better, error, s.error)),
        outside=jnp.where(damped, 0, outside),
        search=_Search(v, wrong, rho),
        idle=jnp.where(first | projecting, 0, idle),
        lowest=jnp.where(first | projecting, jnp.inf, jnp.minimum(error, s.lowest)),
        going=jnp.where(first, ~sound, projecting | (better & missed)),
    )


def _search_direction(
    s: _Round, shifted: jax.Array, r: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next direction, z itself with a factor that is exact, and r^T z."""
    rho, before = jnp.dot(r, z), s.search.rho
    usable = shifted & (s.count > 1) & (before > 0)
    beta = (rho - jnp.dot(s.search.r, z)) / jnp.where(usable, before, 1)
    return z + jnp.where(usable, jnp.maximum(beta, 0), 0) * s.search.p, rho


def _step_length(damping: jax.Array, r: jax.Array, p: jax.Array, back: Tree) -> jax.Array:
    """r^T p / p^T (K + damping I) p, with K p not formed: R^T p is at hand."""
    curvature = _trees.vdot(back, back, p.dtype) + damping * jnp.dot(p, p)
    usable = curvature > 0
    return jnp.where(usable, jnp.dot(r, p) / jnp.where(usable, curvature, 1), 1)


def _slope(space: _SampleSpace, end: _Round) -> jax.Array:
    """g^T d = d^T (F + damping I) d, with R d = w a sum of squares."""
    w, d = end.w / space.root, jnp.sqrt(end.d_squared)
    along = jnp.dot(w, w) + space.damping / space.root / space.root * d * d
    return along / space.unit / space.unit


def _root(square: jax.Array) -> jax.Array:
    """The root of what rounding may have made negative."""
    return jnp.sqrt(jnp.maximum(square, 0))


def _inside_squared(space: _SampleSpace, w: jax.Array) -> jax.Array:
    """The squared norm of the part of d in the row space, w^T K^+ w for R d = w.

    A diagnostic must stay cheap beside the factorisation: where that is large, three iterations
    have to do, and modes far below the damping count as outside.
    """
    few = 64 if w.shape[0] <= 256 else 3
    factor = space.factor
    inside = _symmetric.solve_in_range(space.norm, factor.damping, factor.solve, w, iterations=few)
    return jnp.dot(w, inside)


def _ratio(norm: jax.Array, of: jax.Array) -> jax.Array:
    return jnp.where(of > 0, norm / jnp.where(of > 0, of, 1), 0)

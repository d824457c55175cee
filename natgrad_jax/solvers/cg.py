"""Conjugate gradients: the matrix-free solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any
Linear = Callable[[Tree], Tree]


class CGState(NamedTuple):
    """What the next solve starts from.

    Attributes:
      previous: the last solution, params-like; None without warm start.
      preconditioner: the preconditioner's own state.
    """

    previous: Tree
    preconditioner: Any


class _NullMass(NamedTuple):
    """Bounds the share of the first residual that F does not see, from the run itself.

    Residuals r_j = q_j(A) r_0 of A = F + lambda I are orthogonal, so that the spectral measure of
    r_0 has at most the mass 1 / sum_j q_j(lambda)^2 ||r_0||^2 / ||r_j||^2 at lambda, which is where
    F is zero: the Christoffel function (Golub and Meurant, 2010, Matrices, moments, quadrature).

    Attributes:
      residual: q_j(lambda).
      direction: the polynomial of the search direction at lambda.
      total: the sum so far.
    """

    residual: jax.Array
    direction: jax.Array
    total: jax.Array


class _Iterate(NamedTuple):
    x: Tree
    r: Tree
    p: Tree
    rho: jax.Array
    best: Tree
    residual: jax.Array
    steepest: jax.Array
    null: _NullMass
    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    broken: jax.Array
    negative: jax.Array


def cg(
    max_iterations: int = 100,
    tol: float = 1e-6,
    preconditioner: Solver | None = None,
    warm_start: bool = True,
) -> Solver:
    r"""Solves by conjugate gradients, from Fisher-vector products alone.

    Iterates until :math:`\|(F + \lambda I) d - g\| \le \mathrm{tol} \cdot \|g\|`. The model is
    linearised once. It differs from a textbook solver in this:

    1. The stop is relative, and the warm start enters as :math:`\alpha x_0` with
       :math:`\alpha = x_0^T g / x_0^T (F + \lambda I) x_0`: scaling g scales d. This costs one
       product.
    2. With damping 0 the gradient is first projected on the range of F by a run of its own, so
       that the result is the minimum-norm solution also for a singular F. Both runs start cold and
       without preconditioner, and end with the iterate of smallest residual: rounding makes later
       ones grow along modes that cannot be resolved.
    3. It stops at negative curvature (a Hessian may be indefinite) with the solution so far, or
       the preconditioned gradient when there is none, and says so in `info.negative_curvature`.

    Args:
      max_iterations: at most that many iterations of a run.
      tol: relative residual at which to stop.
      preconditioner: another solver of the same system, applied in every iteration.
      warm_start: start from the previous solution, held in the state.

    Returns:
      A :class:`Solver`, for every metric.

    Raises:
      ValueError: ``max_iterations`` is not a positive integer, or the preconditioner is no
        fixed linear :class:`Solver` (conjugate gradients are none).

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> d, info = ng.natural_gradient_direction(
      ...     metric, jnp.zeros((2,)), x, jnp.ones((2,)), solver=ng.cg(), damping=0.1)
      >>> int(info.iterations), bool(info.relative_residual < 1e-5)
      (2, True)

    Notes:
      One iteration costs about 1.3 gradients, O(P) memory. Iterations grow with the square root of
      (largest eigenvalue) / damping.

    References:
      Hestenes and Stiefel, 1952; Martens, 2010, Deep learning via Hessian-free optimization.
    """
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"cg: max_iterations must be a positive int, got {max_iterations!r}")
    if preconditioner is not None and (
        not isinstance(preconditioner, Solver) or preconditioner.name == "cg"
    ):
        raise ValueError(
            "cg: preconditioner must be a linear solver such as kfac(batch) or diagonal(), got"
            f" {getattr(preconditioner, 'name', preconditioner)!r}"
        )

    def init(metric: Metric, params: Tree) -> CGState:
        previous = _trees.zeros_like(params) if warm_start else None
        return CGState(
            previous, () if preconditioner is None else preconditioner.init(metric, params)
        )

    def prepare(here: Curvature, damping: jax.Array, state: CGState) -> tuple[Solve, CGState]:
        fisher_product = here.linearize()
        product = lambda v: _trees.add_scaled(fisher_product(v), damping, v)
        precondition, inner_state = _preconditioner(preconditioner, here, damping, state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, here.dtype), here.params)
        over = lambda v, size: jax.tree.map(lambda v: v / size, v)

        def run_from(size: jax.Array, g: Tree, x: Tree, ax: Tree) -> _Iterate:
            """Solves with (F + damping I) / size: of a small F squares of residuals underflow."""
            scaled = lambda v: over(product(v), size)
            options = {"tol": tol, "limit": max_iterations}
            return iterate(scaled, precondition, damping / size, g, x, ax, **options)

        def project(g: Tree) -> tuple[Tree, jax.Array]:
            """The part of g in the range of F with damping 0, g itself otherwise; the size of F."""

            def run(carry: tuple[jax.Array, Tree, jax.Array]) -> tuple[jax.Array, Tree, jax.Array]:
                unit, size = _trees.normalised(fisher_product(carry[1]), here.dtype)
                return jnp.asarray(False), run_from(size, unit, zeros, zeros).best, size

            start = (damping <= 0, g, jnp.ones((), here.dtype))
            return jax.lax.while_loop(lambda c: c[0], run, start)[1:]

        def solve(g: Tree, state: CGState) -> tuple[Tree, CGState, Report]:
            target, size = project(g)
            x, ax = zeros, zeros
            if warm_start:
                x, ax = _rescaled(state.previous, product(state.previous), target, damping, here)
            # Without damping the start is 0, whatever the size.
            last = run_from(size, target, x, ax)
            last = last._replace(best=over(last.best, size))
            squared = lambda v: _trees.vdot(v, v, here.dtype)
            unseen = _outside_share(here, damping, target, x, ax, last, state.previous)
            # With damping 0 what the projection took away, orthogonal to the rest, counts too.
            taken = squared(jax.tree.map(lambda g, t: g - t, g, target))
            norm = squared(g)
            ratio = (last.residual + taken) / jnp.where(norm > 0, norm, 1)
            outcome = _solver.report(
                iterations=last.count,
                relative_residual=jnp.where(norm > 0, jnp.sqrt(ratio), 0),
                outside_row_space=unseen if preconditioner is None else _solver.NOT_MEASURED,
                negative_curvature=last.negative,
            )
            return (
                last.best,
                CGState(last.best if warm_start else None, state.preconditioner),
                outcome,
            )

        return solve, CGState(state.previous, inner_state)

    return Solver(
        "cg",
        init,
        prepare,
        needs_rows=preconditioner is not None and preconditioner.needs_rows,
        scales_entries=preconditioner is None or preconditioner.scales_entries,
        holds=CGState,
    )


def _preconditioner(
    solver: Solver | None, here: Curvature, damping: jax.Array, state: CGState
) -> tuple[Linear, Any]:
    if solver is None:
        return lambda r: r, ()
    solve, inner = solver.prepare(here, damping, state.preconditioner)
    apply = lambda r: solve(r, inner)[0]
    # A preconditioned run on a singular system would end in another norm's shortest solution.
    return lambda r: jax.lax.cond(damping > 0, apply, lambda r: r, r), inner


def _rescaled(x: Tree, ax: Tree, g: Tree, damping: jax.Array, here: Curvature) -> tuple[Tree, Tree]:
    """The multiple of a starting point that comes closest, 0 where that is 0 / 0 or undamped."""
    energy = _trees.vdot(x, ax, here.dtype)
    usable = (energy > 0) & (damping > 0)
    alpha = jnp.where(usable, _trees.vdot(x, g, here.dtype) / jnp.where(usable, energy, 1), 0)
    return _trees.scale(x, alpha), _trees.scale(ax, alpha)


def _outside_share(
    here: Curvature,
    damping: jax.Array,
    g: Tree,
    x: Tree,
    ax: Tree,
    last: _Iterate,
    previous: Tree,
) -> jax.Array:
    """The largest share of ||d|| that may lie where F is zero: there d is g / damping.

    A bound that is the share itself once the run has converged. With a warm start x it is that of
    g = r_0 + A x, where ||x||^2 - (x^T F x)^2 / ||F x||^2 bounds what x has there.
    """
    if not here.definite:
        return jnp.asarray(_solver.NOT_MEASURED, here.dtype)
    squared = lambda v: _trees.vdot(v, v, here.dtype)
    r = jax.tree.map(lambda g, ax: g - ax, g, ax)
    length = jnp.sqrt(squared(r) / last.null.total)
    if previous is not None:
        fx = jax.tree.map(lambda ax, x: ax - damping * x, ax, x)
        size, along, norm = squared(x), _trees.vdot(x, fx, here.dtype), squared(fx)
        seen = jnp.where(norm > 0, along**2 / jnp.where(norm > 0, norm, 1), 0)
        length = length + damping * jnp.sqrt(jnp.maximum(size - seen, 0))
    whole = damping * jnp.sqrt(squared(last.best))
    share = jnp.where(whole > 0, length / jnp.where(whole > 0, whole, 1), 0)
    return jnp.where(damping > 0, jnp.minimum(share, 1), 0)


def iterate(
    product: Linear,
    precondition: Linear,
    damping: jax.Array,
    g: Tree,
    x: Tree,
    ax: Tree,
    *,
    tol: float,
    limit: jax.typing.ArrayLike,
) -> _Iterate:
    """Preconditioned conjugate gradients for A x = g from x, where A x is known.

    `best` is the last iterate, or the one of smallest residual without damping, when A may be
    singular; `residual` is its squared residual norm.
    """
    dtype, singular = _trees.work_dtype(g), damping <= 0
    dot = lambda a, b: _trees.vdot(a, b, dtype)
    target = tol**2 * dot(g, g)
    rounding = _trees.size(g) * jnp.finfo(dtype).eps

    def step(s: _Iterate) -> _Iterate:
        ap = product(s.p)
        curvature = dot(s.p, ap)
        length = dot(s.p, s.p)
        steepest = jnp.maximum(s.steepest, curvature / length)
        # Below rounding, the curvature of a singular A is noise: p lies in its null space.
        flat = singular & (curvature <= rounding * steepest * length)
        broken = (curvature <= 0) | flat
        alpha = jnp.where(broken, 0, s.rho / jnp.where(broken, 1, curvature))
        # With negative curvature at once there is no solution yet: the preconditioned gradient.
        escape = jnp.where((curvature < 0) & (s.count == 0) & ~flat, 1, alpha)
        x = _trees.add_scaled(s.x, escape, s.p)
        r = _trees.add_scaled(s.r, -alpha, ap)
        z = precondition(r)
        rho, residual = dot(r, z), dot(r, r)
        beta = rho / s.rho
        seen = s.null.residual - alpha * damping * s.null.direction
        # Residuals at rounding tell nothing more, in either direction.
        told = jnp.maximum(residual, (1e3 * jnp.finfo(dtype).eps) ** 2 * start.residual)
        term = jnp.where(told > 0, seen**2 * start.residual / jnp.where(told > 0, told, 1), 0)
        null = _NullMass(seen, seen + beta * s.null.direction, s.null.total + term)
        better = ~singular | (residual < s.residual) | ((curvature < 0) & (s.count == 0) & ~flat)
        return _Iterate(
            x=x,
            r=r,
            p=_trees.add_scaled(z, beta, s.p),
            rho=rho,
            best=jax.tree.map(lambda new, old: jnp.where(better, new, old), x, s.best),
            residual=jnp.where(better, residual, s.residual),
            steepest=steepest,
            null=null,
            count=s.count + 1,
            broken=broken,
            negative=(curvature < 0) & ~flat,
        )

    def unfinished(s: _Iterate) -> jax.Array:
        return (s.residual > target) & (s.count < limit) & ~s.broken

    r = jax.tree.map(lambda g, ax: g - ax, g, ax)
    z, no = precondition(r), jnp.asarray(False)
    zero, count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    one = jnp.ones((), dtype)
    first = _NullMass(one, one, one)
    start = _Iterate(x, r, z, dot(r, z), x, dot(r, r), zero, first, count, no, no)
    return jax.lax.while_loop(unfinished, step, start)

"""The sample-space solver: the M x M Gram matrix in place of the P x P Fisher matrix."""

from typing import Any, NamedTuple

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

#: The subtraction of the formula may cost this share of the direction before more is done.
_LOST = 1e-4


class _Split(NamedTuple):
    phase: jax.Array
    repeated: jax.Array
    g: jax.Array
    outside: jax.Array
    inside: jax.Array
    d: jax.Array
    ratio: jax.Array


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
        rows = here.jacobian()
        gram = rows.gram()
        eps, size = jnp.finfo(here.dtype).eps, jnp.linalg.norm(gram)
        # A pivot within the rounding of the Gram matrix says that repeated rows, not the damping,
        # decide what the factor holds.
        factor = _symmetric.factorize(gram, damping, floor=10 * eps * size)
        inverse = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)
        norm = lambda v: jnp.sqrt(_trees.vdot(v, v, here.dtype))

        def left(y: jax.Array, w: jax.Array) -> jax.Array:
            """The residual in sample space."""
            return y - _symmetric.matvec(gram, w) - damping * w

        def damped_solve(y: jax.Array) -> jax.Array:
            w = factor.solve(y)
            return w + factor.solve(left(y, w)) if here.dtype == jnp.float32 else w

        def in_range(w: jax.Array, iterations: int = 64) -> jax.Array:
            """(R R^T)^+ w."""

            def by_eigen(w: jax.Array) -> jax.Array:
                values, vectors = factor.eigen
                modes = _symmetric.matvec(vectors.T, w)
                gains = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
                return _symmetric.matvec(vectors, gains * modes)

            def by_iteration(w: jax.Array) -> jax.Array:
                return _symmetric.solve_in_range(gram, factor.solve, w, iterations=iterations)

            return jax.lax.cond(factor.eigen_taken, by_eigen, by_iteration, w)

        def pseudo_inverse(y: jax.Array) -> jax.Array:
            """(R R^T)^+ y, which is w + damping (R R^T)^+ w for the damped solution w of y."""
            w = jnp.where(factor.eigen_taken, y, damped_solve(y))
            part = in_range(w)
            return jnp.where(factor.eigen_taken, part, w + damping * part)

        def split_step(s: _Split) -> _Split:
            """Phases 0 and 1 take the rows out of `outside`, 2 makes d, 3 measures what is left."""
            making, measuring = s.phase == 2, s.phase == 3
            x = jnp.where(measuring, s.d, s.outside)
            y = rows.product(_trees.unravel(x, here.params))
            kinds = [pseudo_inverse, lambda _: damped_solve(s.inside), lambda y: y]
            u = jax.lax.switch(jnp.maximum(s.phase - 1, 0), kinds, y)
            t = _trees.ravel(rows.transposed_product(u))
            outside = jnp.where(s.phase < 2, s.outside - t, s.outside)
            inside = jnp.where(s.phase < 2, s.inside + u, s.inside)
            d = jnp.where(making, s.d + t + inverse * outside, s.d)
            left = s.g - t - damping * d
            ratio = jnp.where(measuring, _solver.relative(left, s.g).astype(here.dtype), s.ratio)
            # What grew has met rounding divided by a tiny damping: more of it would not help.
            again = measuring & ~s.repeated & (ratio > _LOST) & (ratio < 1)
            return _Split(
                phase=jnp.where(again, 0, s.phase + 1),
                repeated=s.repeated | again,
                g=s.g,
                outside=jnp.where(again, left, outside),
                inside=jnp.where(again, 0, inside),
                d=d,
                ratio=ratio,
            )

        def split(g: Tree, d: Tree, ratio: jax.Array, needed: jax.Array) -> tuple[Tree, jax.Array]:
            """d = R^T a + outside / damping, with `outside` orthogonal to the rows.

            Two passes take the rows out of it: what one leaves by rounding would be divided by the
            damping alone. What the whole leaves of g is solved for once more. One product and one
            transposed product a step, on raveled vectors: the loop rarely runs, and compiles fast.
            """

            def run(carry: tuple[jax.Array, Tree, jax.Array]) -> tuple[jax.Array, Tree, jax.Array]:
                flat = _trees.ravel(g)
                start = _Split(
                    phase=jnp.zeros((), jnp.int32),
                    repeated=jnp.asarray(False),
                    g=flat,
                    outside=flat,
                    inside=jnp.zeros((gram.shape[0],), here.dtype),
                    d=jnp.zeros_like(flat),
                    ratio=ratio,
                )
                end = jax.lax.while_loop(lambda s: s.phase < 4, split_step, start)
                return jnp.asarray(False), _trees.unravel(end.d, here.params), end.ratio

            # A loop of at most one trip: what it needs is made only where it runs.
            _, d, ratio = jax.lax.while_loop(lambda c: c[0], run, (needed, d, ratio))
            return d, ratio

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            y = rows.product(g)
            w = damped_solve(y)
            d = _trees.add_scaled(rows.transposed_product(-inverse * w), inverse, g)
            # The residual is R^T r / damping for the sample-space residual r.
            r, g_norm = left(y, w), norm(g)
            spread = jnp.sqrt(jnp.maximum(jnp.dot(r, _symmetric.matvec(gram, r)), 0))
            ratio = inverse * spread / jnp.where(g_norm > 0, g_norm, 1)
            # What the subtraction may have lost, against what is left, ||g - R^T w||.
            lost = eps * (g_norm + jnp.sqrt(size) * jnp.linalg.norm(w))
            kept = g_norm**2 - 2 * jnp.dot(y, w) + jnp.dot(w, _symmetric.matvec(gram, w))
            needed = factor.eigen_taken | ~((lost / _LOST) ** 2 <= kept)
            d, ratio = split(g, d, ratio, needed)
            # R d = w, so the part of d in the row space is R^T (R R^T)^+ w. A diagnostic must stay
            # cheap beside the factorisation: where that is large, three iterations have to do, and
            # modes far below the damping count as outside.
            few = 64 if gram.shape[0] <= 256 else 3
            inside = jnp.dot(w, in_range(w, iterations=few))
            share = _solver.outside_share(inside, _trees.vdot(d, d, here.dtype))
            outcome = _solver.report(
                relative_residual=ratio,
                outside_row_space=share,
                eigen_taken=factor.eigen_taken,
            )
            return d, state, outcome

        return solve, state

    return Solver("woodbury", _solver.stateless, prepare, needs_rows=True)

"""The choice of an exact solver from static shapes, corrected by what the solve finds."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.solvers.cg import cg
from natgrad_jax.solvers.cholesky import dense
from natgrad_jax.solvers.qr import one_direction
from natgrad_jax.solvers.woodbury import sample_space

Tree = Any

#: The largest P for which F is formed, and the largest M for which R R^T is.
MAX_DENSE = 2048
MAX_GRAM = 4096

#: The largest M x P for which `qr` may take over, if the smaller one is at most MAX_DENSE.
MAX_ROWS = 2**22

#: The relative residual above which it does.
RESIDUAL = 1e-3


def choose(here: Curvature, *, decompose: bool = True) -> Solver:
    """The exact solver that shapes suggest.

    * dense (`cholesky`) when P <= MAX_DENSE and P is not above M, or F has no rows;
    * sample space (`woodbury`) while M <= MAX_GRAM;
    * conjugate gradients beyond, started cold.

    Without `decompose` the first two leave to the caller what needs an eigendecomposition.
    """
    size = _trees.size(here.params)
    rows = None if here.num_rows is None else here.num_rows()
    if size <= MAX_DENSE and (rows is None or size <= rows):
        return dense(decompose=decompose)
    if rows is not None and rows <= MAX_GRAM:
        return sample_space(decompose=decompose)
    return cg(warm_start=False)


def automatic() -> Solver:
    """What `solver=None` stands for: `choose` at every call, without state.

    The number of rows is not known when `init` runs, so there is no state to keep. Where the
    solver chosen leaves a residual above RESIDUAL or needs an eigendecomposition, and for damping
    0, `qr` takes over while rows of that size are affordable.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        corrected = _can_correct(here)
        here = _with_rows_at_hand(here) if corrected else here
        chosen = choose(here, decompose=not corrected)
        inner_solve, inner_state = chosen.prepare(here, damping, chosen.init(None, here.params))

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            d, _, outcome = inner_solve(g, inner_state)
            if corrected:
                d, outcome = _corrected(here, damping, g, d, outcome)
            return d, state, outcome

        return solve, state

    return Solver("automatic", _solver.stateless, prepare)


def _can_correct(here: Curvature) -> bool:
    if here.jacobian is None:
        return False
    size, rows = _trees.size(here.params), here.num_rows()
    return size * rows <= MAX_ROWS and min(size, rows) <= MAX_DENSE


def _with_rows_at_hand(here: Curvature) -> Curvature:
    """The model is read once for both solvers, and rows are formed once if the first does so."""
    rows = here.jacobian()
    if _trees.size(here.params) <= here.num_rows():
        matrix = rows.matrix()
        rows = rows._replace(matrix=lambda: matrix)
    return here._replace(jacobian=lambda: rows)


def _corrected(
    here: Curvature, damping: jax.Array, g: Tree, d: Tree, outcome: Report
) -> tuple[Tree, Report]:
    """The direction of `qr` where digits are missing: a branch that rarely runs."""
    lost = ~(outcome.relative_residual <= RESIDUAL) | outcome.eigen_taken
    has_slope = outcome.grad_dot_direction is not None

    def run(carry: tuple[jax.Array, Tree, Report]) -> tuple[jax.Array, Tree, Report]:
        d, outcome = one_direction(here, damping, g)
        slope = _trees.vdot(g, d, here.dtype) if has_slope else None
        return jnp.asarray(False), d, outcome._replace(grad_dot_direction=slope)

    start = (lost, d, outcome)
    return jax.lax.while_loop(lambda carry: carry[0], run, start)[1:]


AUTOMATIC = automatic()

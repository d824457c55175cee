"""The choice of an exact solver from static shapes."""

from typing import Any

import jax

from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.solvers.cg import cg
from natgrad_jax.solvers.cholesky import cholesky
from natgrad_jax.solvers.woodbury import woodbury

Tree = Any

#: The largest P for which F is formed, and the largest M for which R R^T is.
MAX_DENSE = 2048
MAX_GRAM = 4096


def choose(here: Curvature) -> Solver:
    """The exact solver that shapes suggest.

    * dense (`cholesky`) when P <= MAX_DENSE and P is not above M, or F has no rows;
    * sample space (`woodbury`) while M <= MAX_GRAM;
    * conjugate gradients beyond, started cold.
    """
    size = _trees.size(here.params)
    rows = None if here.num_rows is None else here.num_rows()
    if size <= MAX_DENSE and (rows is None or size <= rows):
        return cholesky()
    if rows is not None and rows <= MAX_GRAM:
        return woodbury()
    return cg(warm_start=False)


def automatic() -> Solver:
    """What `solver=None` stands for: `choose` at every call, without state.

    The number of rows is not known when `init` runs, so there is no state to keep.
    """

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        chosen = choose(here)
        inner_solve, inner_state = chosen.prepare(here, damping, chosen.init(None, here.params))

        def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
            direction, _, outcome = inner_solve(g, inner_state)
            return direction, state, outcome

        return solve, state

    return Solver("automatic", _solver.stateless, prepare)


AUTOMATIC = automatic()

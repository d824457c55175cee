"""What every solver of (F + damping I) d = g is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _records
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.metrics import Metric

Tree = Any

NOT_MEASURED = _records.NOT_MEASURED


class Report(NamedTuple):
    """How a solve went; the same fields and dtypes for every solver.

    Attributes:
      iterations: of an iterative solver (its last run), 0 for direct ones. int32.
      relative_residual: ||(F + damping I) d - g|| / ||g||, or -1 where not measured. float32.
      outside_row_space: the share of ||d|| outside the row space of R, where g was only divided by
        the damping, or -1 where it was not measured. float32.
      eigen_taken: whether an eigendecomposition was used. bool.
      negative_curvature: whether conjugate gradients met d^T (F + damping I) d <= 0. bool.
      grad_dot_direction: g^T d, or None from a solver that does not have it at hand.
    """

    iterations: jax.Array
    relative_residual: jax.Array
    outside_row_space: jax.Array
    eigen_taken: jax.Array
    negative_curvature: jax.Array
    grad_dot_direction: jax.Array | None


def report(
    *,
    iterations: jax.typing.ArrayLike = 0,
    relative_residual: jax.typing.ArrayLike = NOT_MEASURED,
    outside_row_space: jax.typing.ArrayLike = NOT_MEASURED,
    eigen_taken: jax.typing.ArrayLike = False,
    negative_curvature: jax.typing.ArrayLike = False,
    grad_dot_direction: jax.Array | None = None,
) -> Report:
    """A report in its fixed dtypes."""
    return Report(
        jnp.asarray(iterations).astype(jnp.int32),
        jnp.asarray(relative_residual).astype(jnp.float32),
        jnp.asarray(outside_row_space).astype(jnp.float32),
        jnp.asarray(eigen_taken).astype(jnp.bool_),
        jnp.asarray(negative_curvature).astype(jnp.bool_),
        grad_dot_direction,
    )


Solve = Callable[[Tree, Any], tuple[Tree, Any, Report]]


class Solver(NamedTuple):
    """A solver of (F + damping I) d = g, as a pair of functions.

    Attributes:
      name: the public function that made it.
      init: (metric, params) -> solver state. It may meet shapes or placeholders in place of arrays.
      prepare: (curvature, damping, state) -> (solve, state). Does once what does not depend on g;
        `solve(g, state) -> (d, state, report)` may then be called several times.
      needs_rows: whether it works on the rows R of F = R^T R.
      anew: (state, flag or None) -> a state whose next step, where the flag holds, reuses nothing
        that depends on an earlier damping.
      scales_entries: whether it takes an F whose entries are scaled one by one, which has rows but
        no Kronecker factors.
      approximates: whether another matrix stands for F by design.
      holds: the type of its state; None for a solver without a name for it.
    """

    name: str
    init: Callable[[Metric, Tree], Any]
    prepare: Callable[[Curvature, jax.Array, Any], tuple[Solve, Any]]
    needs_rows: bool = False
    anew: Callable[[Any, jax.typing.ArrayLike | None], Any] = lambda state, flag: state
    scales_entries: bool = True
    approximates: bool = False
    holds: type | None = None


def check_state(caller: str, solver: Solver, state: Any, params: Tree) -> None:
    """Raises where a state is that of another solver."""
    if not jax.tree.leaves(params):
        return
    foreign = solver.holds is not None and not isinstance(state, solver.holds)
    if foreign or (solver.init is stateless and state != ()):
        expected = "none" if solver.holds is None else f"a {solver.holds.__name__}"
        raise TypeError(
            f"{caller}: the state was made by another solver: {solver.name} keeps {expected}, got a"
            f" {type(state).__name__}; make a new state with `init`"
        )


def stateless(metric: Metric, params: Tree) -> tuple[()]:
    """The state of a solver that keeps none."""
    del metric, params
    return ()


def relative(residual: jax.Array, g: jax.Array) -> jax.Array:
    """||residual|| / ||g||, 0 for g = 0; g is scaled to order one before any solve."""
    size = jnp.linalg.norm(g)
    return jnp.where(size > 0, norm(residual) / jnp.where(size > 0, size, 1), 0)


def norm(v: jax.Array) -> jax.Array:
    """||v||, also where its squares overflow or underflow."""
    unit, size = _trees.normalised(v, v.dtype)
    return size * jnp.linalg.norm(unit)


def outside_share(inside_squared: jax.Array, total_squared: jax.Array) -> jax.Array:
    """sqrt(1 - inside / total) for squared norms, 0 for 0 / 0."""
    positive = total_squared > 0
    ratio = inside_squared / jnp.where(positive, total_squared, 1)
    return jnp.where(positive, jnp.sqrt(jnp.clip(1 - ratio, 0, 1)), 0)

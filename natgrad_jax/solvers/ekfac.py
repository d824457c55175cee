"""EKFAC: second moments in the eigenbasis of K-FAC's factors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax.curvature import Curvature
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.kronecker import Kronecker
from natgrad_jax.jacobian.kronecker import Used
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import _blocks
from natgrad_jax.solvers import _kronecker
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._blocks import Average
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


class EKFACState(NamedTuple):
    """State of :func:`ekfac`.

    Attributes:
      count: steps so far. int32.
      average: the factors, averaged over steps.
      bases: for each block and side that has a matrix its eigenvectors (B, n, n).
      squares: for each block the second moments in its basis (B, p, q), averaged over steps.
      weights: for each block what the weights of that average sum to, 0 before the first step,
        (blocks,).
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    average: Average
    bases: tuple[jax.Array, ...]
    squares: tuple[jax.Array, ...]
    weights: jax.Array


def ekfac(
    example_batch: Tree,
    *,
    example_params: Tree | None = None,
    weight_sharing: str = "expand",
    decay: float = 0.95,
    factors_every: int = 1,
    basis_every: int = 5,
) -> Solver:
    r"""Solves with a diagonal in the eigenbasis of K-FAC's factors: an approximation.

    .. math::
        F_l \approx (Q_B \otimes Q_A)\, \mathrm{diag}(s_l)\, (Q_B \otimes Q_A)^T, \qquad
        s_l = \mathbb{E}\left[ (Q_B^T\, \nabla_{W_l} \log p\; Q_A)^2 \right]

    with the eigenvectors :math:`Q_A, Q_B` of the factors that :func:`kfac` takes, and the second
    moments of every entry of per-example gradients in that basis. Of all matrices that are diagonal
    there it is, at one batch, the nearest to the block, so no farther than K-FAC's own. Averages
    over batches go on from one basis to the next without being turned with it: they lag while the
    basis moves.

    Args:
      example_batch: as for :func:`kfac`.
      example_params: as for :func:`kfac`.
      weight_sharing: as for :func:`kfac`; it concerns the basis. Second moments are those of
        per-example gradients, all positions summed.
      decay: of the exponential averages of factors and second moments, as for :func:`kfac`.
      factors_every: steps from one update of the factors to the next.
      basis_every: steps from one eigendecomposition of a factor to its next. Factors take turns.
        Second moments are taken on every step, and averaged on from one basis to the next.

    Returns:
      A :class:`Solver`, for metrics that have rows and are not centered. A change of the damping
      counts at once.

    Raises:
      ValueError: a choice, a period or the decay is none; `init` meets hidden parameters without
        ``example_params``.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p["w"] + p["b"], ng.Normal())
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> direction = lambda solver: ng.natural_gradient_direction(
      ...     metric, params, x, params, solver=solver, damping=0.1)[0]
      >>> exact = direction(ng.cholesky())
      >>> bool(jnp.allclose(direction(ng.ekfac(x))["w"], exact["w"], rtol=1e-3))
      True

    Notes:
      Memory as :func:`kfac`, and p q for a layer. A step costs four products with the bases and as
      many with what enters and leaves; an eigendecomposition costs many gradients.

    References:
      George et al., 2018, Fast approximate natural gradient descent in a Kronecker-factored
      eigenbasis.
    """
    name = "ekfac"
    _boundary.check_batch(f"{name}: example_batch", example_batch)
    _blocks.check_choice(name, "weight_sharing", weight_sharing, ("expand", "reduce"))
    _blocks.check_decay(name, decay)
    _boundary.check_count(name, "factors_every", factors_every)
    _boundary.check_count(name, "basis_every", basis_every)
    met: _blocks.Met = {}

    def init(metric: Metric, params: Tree) -> Any:
        found = _blocks.blocks_at_init(name, metric, params, example_batch, example_params, met)
        if found is None:
            return jnp.zeros(())  # a prefix of any state: optax asks with a placeholder
        blocks, dtype = found
        average = _blocks.start(*found)
        bases = tuple(
            jnp.zeros(m.shape, dtype) for own in average.moments for m in own if m.ndim == 3
        )
        squares = tuple(jnp.zeros(block.shape, dtype) for block in blocks)
        count = jnp.zeros((), jnp.int32)
        return EKFACState(count, average, bases, squares, jnp.zeros((len(blocks),), dtype))

    def prepare(here: Curvature, damping: jax.Array, state: EKFACState) -> tuple[Solve, EKFACState]:
        kronecker, average = _blocks.renewed(
            here, state.average, state.count, factors_every, decay, weight_sharing, keep_uses=True
        )
        bases = _renewed(state, average, basis_every)
        of_block = _by_block(average, bases)
        new = _squares(kronecker, of_block)
        # Squares are not negative: their sum is finite only if they are.
        sound = [jnp.isfinite(jnp.sum(s.reshape(-1))) for s in new]
        squares = tuple(map(functools.partial(_blocks.mixed, decay), sound, state.squares, new))
        ones = jnp.ones_like(state.weights)
        weights = _blocks.mixed(decay, jnp.asarray(sound, bool), state.weights, ones)

        def solve(g: Tree, state: EKFACState) -> tuple[Tree, EKFACState, Report]:
            bias = _kronecker.reciprocal(weights)
            means = [b * s for b, s in zip(bias, squares, strict=True)]
            apply = functools.partial(_apply, damping)
            each = lambda parts: list(map(apply, parts, of_block, means, weights > 0))
            alive = _blocks.alive(average)
            d, slope, unseen = _blocks.solved(here, kronecker, g, damping, each, alive)
            report = _solver.report(
                eigen_taken=True, grad_dot_direction=slope, outside_row_space=unseen
            )
            return d, state, report

        return solve, EKFACState(state.count + 1, average, tuple(bases), squares, weights)

    return Solver(
        name,
        init,
        prepare,
        needs_rows=True,
        scales_entries=False,
        approximates=True,
        holds=EKFACState,
    )


def _apply(
    damping: jax.Array,
    x: jax.Array,
    bases: list[jax.Array | None],
    squares: jax.Array,
    known: jax.Array,
) -> jax.Array:
    gains = jnp.where(known, _kronecker.damped_inverse(squares, damping), 0)
    return _kronecker.turned_back(bases, gains * _kronecker.turned(bases, x))


def _renewed(state: EKFACState, average: Average, period: int) -> list[jax.Array]:
    """The eigenvectors of all sides that have a matrix, in turns."""
    matrices = [m for own in average.moments for m in own if m.ndim == 3]
    unused = jnp.zeros((len(matrices), 1))
    vectors = _kronecker.eigenvectors
    old = list(state.bases)
    return _kronecker.in_turns(state.count, period, matrices, old, vectors, unused)


def _by_block(average: Average, bases: list[jax.Array]) -> list[list[jax.Array | None]]:
    """For each block its two bases; None for the identity."""
    left = iter(bases)
    result = []
    for own in average.moments:
        found = [next(left) if m.ndim == 3 else None for m in own]
        result.append(found if len(found) == 2 else [None, *found])
    return result


def _squares(kronecker: Kronecker, bases: list[list[jax.Array | None]]) -> list[jax.Array]:
    """The second moments of every block at this batch."""
    return [
        _row_squares(block, uses, own[1])
        if block.kind == "rows"
        else _kronecker.squares(block, uses, *own)
        for block, uses, own in zip(kronecker.blocks, kronecker.uses, bases, strict=True)
    ]


def _row_squares(block: Block, uses: list[Used], basis: jax.Array | None) -> jax.Array:
    rows = _kronecker.rows_of(uses)
    rows = rows if basis is None else _kronecker.product(rows[None], basis)[0]
    return jnp.sum(rows**2, axis=0).reshape(block.shape)

"""K-FAC: a Kronecker product for each linear use in place of its block of the Fisher matrix."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _boundary
from natgrad_jax import _symmetric
from natgrad_jax.curvature import Curvature
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import _blocks
from natgrad_jax.solvers import _inverse
from natgrad_jax.solvers import _kronecker
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._blocks import Average
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any


class KFACState(NamedTuple):
    """State of :func:`kfac`.

    Attributes:
      count: steps so far. int32.
      average: the factors, averaged over steps.
      inverses: for each block and side the damped inverse (B, n, n), or its diagonal (B, n); with
        the exact split eigenvalues (B, n) and eigenvectors (B, n, n).
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    average: Average
    inverses: tuple[Any, ...]


def kfac(
    example_batch: Tree,
    *,
    example_params: Tree | None = None,
    weight_sharing: str = "expand",
    damping_split: str = "factored",
    decay: float = 0.95,
    factors_every: int = 1,
    inverses_every: int = 5,
) -> Solver:
    r"""Solves with a Kronecker product for every linear use: an approximation.

    .. math::
        F_l \approx B_l \otimes A_l, \quad A_l = \mathbb{E}[a a^T], \quad B_l = \mathbb{E}[g g^T],
        \qquad
        D_l = (B_l + \tfrac{\sqrt\lambda}{\pi_l} I)^{-1}\, G_l\, (A_l + \pi_l \sqrt\lambda I)^{-1}

    for the gradient :math:`G_l` of a weight, what enters its use (a, with a one for the bias) and
    the cotangent of what leaves it (g), the damping :math:`\lambda` and
    :math:`\pi_l^2 = (\mathrm{tr} A_l / \dim A_l) / (\mathrm{tr} B_l / \dim B_l)`.

    Every linear use that the reader finds is a block, with the bias that is added to its result:
    dense, convolutional, looked up, stacked in a scan (one pair of factors for each layer).
    Parameters without linear use (elementwise scales and shifts, other nonlinear uses) get
    their exact block up to 256 entries, their exact diagonal beyond. Where examples mix (batch
    normalisation in training mode) the factors come from one backward pass of all rows at once,
    as is usual; `explain(..., solver=...)` tells which block every parameter is in.

    Args:
      example_batch: a batch as `update` will see, of any size. Only shapes and dtypes are read.
      example_params: all parameters, where `optax.masked` or `optax.partition` hide some from
        `init`. Only shapes and dtypes are read.
      weight_sharing: where an example uses a weight at several positions, "expand" counts each as
        an example (a loss at every position), "reduce" averages inputs and sums cotangents over
        positions first (a loss after pooling).
      damping_split: "factored" as above; "exact" for :math:`(B \otimes A + \lambda I)^{-1}` by the
        eigenvectors of both, at twice the products and several times the factorisation.
      decay: of the exponential averages of the factors, in [0, 1), which are corrected for their
        start; 0 for the current batch alone.
      factors_every: steps from one update of the factors to the next.
      inverses_every: steps from one inversion of a factor to its next. Factors take turns, so that
        no step but the first inverts all.

    Returns:
      A :class:`Solver`, for metrics that have rows and are not centered. With the factored split a
      change of the damping counts from the next inversion on; with the exact one at once.

    Raises:
      ValueError: a choice, a period or the decay is none; `init` meets hidden parameters without
        ``example_params``.

    Examples:
      A linear model with Gaussian outputs has this form exactly:

      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p["w"] + p["b"], ng.Normal())
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> direction = lambda solver: ng.natural_gradient_direction(
      ...     metric, params, x, params, solver=solver, damping=0.1)[0]
      >>> exact = direction(ng.cholesky())
      >>> close = lambda d: bool(jnp.allclose(d["w"], exact["w"], rtol=1e-3))
      >>> close(direction(ng.kfac(x, damping_split="exact"))), close(direction(ng.kfac(x)))
      (True, False)

    Notes:
      O(p^2 + q^2) memory and O(N (p^2 + q^2) + p q (p + q)) work for a layer of p inputs and q
      outputs, O(p^3 + q^3) for its inverses. Until a factor's second turn its inverse is that of
      the first batch alone: let that be large, or start with more damping. Under
      :func:`exact_fisher` the factors are exact expectations, one backward pass for each output
      column; with many take :func:`sampled_fisher`. Directions may differ between two spellings of
      one function, such as a physics-informed net by nested `jvp` or by `vmap(trace(hessian))`: a
      spelling may use a weight in other places, so that positions and factors differ, while exact
      solvers agree to rounding.

    References:
      Martens and Grosse, 2015, Optimizing neural networks with Kronecker-factored approximate
      curvature; Grosse and Martens, 2016 (convolutions); Eschenhagen et al., 2023 (weight sharing).
    """
    name = "kfac"
    _boundary.check_batch(f"{name}: example_batch", example_batch)
    _blocks.check_choice(name, "weight_sharing", weight_sharing, ("expand", "reduce"))
    _blocks.check_choice(name, "damping_split", damping_split, ("factored", "exact"))
    _blocks.check_decay(name, decay)
    _boundary.check_count(name, "factors_every", factors_every)
    _boundary.check_count(name, "inverses_every", inverses_every)
    exact = damping_split == "exact"
    met: _blocks.Met = {}

    def init(metric: Metric, params: Tree) -> Any:
        found = _blocks.blocks_at_init(name, metric, params, example_batch, example_params, met)
        if found is None:
            return jnp.zeros(())  # a prefix of any state: optax asks with a placeholder
        average = _blocks.start(*found)
        # Arrays of their own: a step that donates its state must not meet one twice.
        sides = [jnp.zeros(m.shape, found[1]) for own in average.moments for m in own]
        eigen = lambda m: m if m.ndim == 2 else _symmetric.Eigen(jnp.zeros(m.shape[:2], m.dtype), m)
        inverses = tuple(map(eigen, sides)) if exact else tuple(sides)
        return KFACState(jnp.zeros((), jnp.int32), average, inverses)

    def prepare(here: Curvature, damping: jax.Array, state: KFACState) -> tuple[Solve, KFACState]:
        kronecker, average = _blocks.renewed(
            here, state.average, state.count, factors_every, decay, weight_sharing
        )
        sides = [(b, s) for b, own in enumerate(average.moments) for s in range(len(own))]
        inverses = _renewed(state, average, sides, damping, inverses_every, exact=exact)
        of_block: list[list[Any]] = [[] for _ in kronecker.blocks]
        for (b, _), inverse in zip(sides, inverses, strict=True):
            of_block[b].append(inverse)

        def solve(g: Tree, state: KFACState) -> tuple[Tree, KFACState, Report]:
            more = (_blocks.known(average),) if exact else ()
            apply = functools.partial(_apply_exact, damping) if exact else _apply
            each = lambda parts: list(map(apply, kronecker.blocks, parts, of_block, *more))
            alive = _blocks.alive(average)
            d, slope, unseen = _blocks.solved(here, kronecker, g, damping, each, alive)
            report = _solver.report(
                eigen_taken=exact, grad_dot_direction=slope, outside_row_space=unseen
            )
            return d, state, report

        return solve, KFACState(state.count + 1, average, tuple(inverses))

    def anew(state: Any, flag: jax.typing.ArrayLike | None) -> Any:
        if exact or flag is None or not isinstance(state, KFACState):
            return state
        # At step 0 everything is renewed; the factors remain those averaged.
        return state._replace(count=jnp.where(flag, 0, state.count))

    return Solver(
        name,
        init,
        prepare,
        needs_rows=True,
        anew=anew,
        scales_entries=False,
        approximates=True,
        holds=KFACState,
    )


def _renewed(
    state: KFACState,
    average: Average,
    sides: list[tuple[int, int]],
    damping: jax.Array,
    period: int,
    *,
    exact: bool,
) -> list[Any]:
    """The inverses of all sides, those of matrices in turns."""
    if not sides:
        return []  # no output depends on a parameter
    moments = [average.moments[b][s] for b, s in sides]
    weights = average.weights
    # 0 for what was never finite: nothing is known of it, and its inverse is to be 0.
    bias = _kronecker.reciprocal(weights)
    shares = _shares(bias[:, None] * average.means, sides, damping)
    fresh = list(state.inverses)
    matrices = [i for i, m in enumerate(moments) if m.ndim == 3]
    for i, moment in enumerate(moments):
        if _kronecker.is_diagonal(moment):
            own = shares[i][: len(moment), None]
            now = bias[i] * moment
            inverse = jnp.where(weights[i] > 0, _kronecker.reciprocal(now + own), 0)
            fresh[i] = now if exact else inverse
    places = np.asarray(matrices, int)
    turns = functools.partial(
        _kronecker.in_turns,
        state.count,
        period,
        [moments[i] for i in matrices],
        [fresh[i] for i in matrices],
    )
    if exact:
        scales = jnp.broadcast_to(bias[:, None], shares.shape)
        made = turns(_kronecker.eigen, scales[places])
    else:
        # (M / w + d)^-1 = w (M + w d)^-1: averages are loaded as they are.
        damped = weights[:, None] * shares
        padded = _inverse.padded
        made = turns(_inverses, damped[places], gains=weights[places], padded=padded)
    for i, x in zip(matrices, made, strict=True):
        fresh[i] = x
    return fresh


def _shares(means: jax.Array, sides: list[tuple[int, int]], damping: jax.Array) -> jax.Array:
    """The damping of each side, (sides, B): pi sqrt(damping), sqrt(damping) / pi, or damping."""
    blocks = [b for b, _ in sides]
    alone = np.asarray([blocks.count(b) == 1 for b in blocks])
    partners = np.asarray([i + 1 if s == 0 else i - 1 for i, (_, s) in enumerate(sides)])
    others = means[np.where(alone, 0, partners)]
    usable = (means > 0) & (others > 0)
    ratio = jnp.where(usable, means / jnp.where(usable, others, 1), 1)
    return jnp.where(alone[:, None], damping, jnp.sqrt(damping) * jnp.sqrt(ratio))


def _inverses(moments: jax.Array, damping: jax.Array, order: jax.Array) -> jax.Array:
    one = lambda m, d: _inverse.inverse(m, d, order)
    if moments.shape[0] == 1:
        return one(moments[0], damping[0])[None]
    return jax.vmap(one)(moments, damping[: len(moments)])


def _apply(block: Block, x: jax.Array, inverses: list[jax.Array]) -> jax.Array:
    if block.kind != "rows":
        left = inverses[0]
        x = left[:, :, None] * x if left.ndim == 2 else _kronecker.product(left, x)
    right = inverses[-1]
    return x * right[:, None, :] if right.ndim == 2 else _kronecker.product(x, right)


def _apply_exact(
    damping: jax.Array, block: Block, x: jax.Array, sides: list[Any], known: jax.Array
) -> jax.Array:
    values = [s if isinstance(s, jax.Array) else s.values for s in sides]
    bases = [None if isinstance(s, jax.Array) else s.vectors for s in sides]
    product = values[-1][:, None, :]
    if block.kind != "rows":
        product = values[0][:, :, None] * product
    else:
        bases = [None, *bases]
    gains = jnp.where(known, _kronecker.reciprocal(product + damping), 0)
    return _kronecker.turned_back(bases, gains * _kronecker.turned(bases, x))

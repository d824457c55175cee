"""What the Kronecker-factored solvers share: blocks at `init`, averages, checks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.curvature import curvature
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.kronecker import Kronecker
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import _kronecker
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._kronecker import Moments

Tree = Any


class Average(NamedTuple):
    """Exponential averages of moments; divided by their weights they have no bias.

    Attributes:
      moments: for each block and side an array, or block rows on and above the diagonal.
      means: of the eigenvalues of each side, (sides, largest B).
      weights: for each side what the weights of its average sum to, 0 before the first step,
        (sides,).
    """

    moments: tuple[Moments, ...]
    means: jax.Array
    weights: jax.Array


#: For each metric the blocks that `init` has met, by what the form of a state depends on.
Met = dict[Metric, dict[Any, list[Block]]]


def blocks_at_init(
    caller: str,
    metric: Metric,
    params: Tree,
    example_batch: Tree,
    example_params: Tree | None,
    met: Met,
) -> tuple[list[Block], jnp.dtype] | None:
    """The blocks of the parameters and the working dtype; None where nothing tells of them.

    `optax.tree.map_params` asks with a placeholder, also for what a mask left visible of the
    parameters, and no argument says what that was. It stands for the parameters that `init` has met
    with this metric, unless they differed in their blocks, and before any for the example
    parameters.
    """
    masked, asked = _boundary.masked(params), bool(jax.tree.leaves(params))
    if not asked:
        before = list(met.get(metric, {}).values())
        if masked or len(before) > 1 or (not before and example_params is None):
            return None
        if before:
            return before[0], _trees.work_dtype(params)
        params = example_params
    if masked and example_params is None:
        raise ValueError(
            f"{caller}: some parameters are hidden (optax.MaskedNode), but the shapes of all are"
            " needed to find the blocks: pass example_params=params to the solver"
        )
    found: list[Block] = []

    def read(params: Tree, full: Tree, batch: Tree) -> jax.Array:
        key = jax.random.key(0) if metric.needs_key else None
        filled = _boundary.fill_masked(metric, params, full)
        kronecker = curvature(filled, params, batch, key).kronecker()
        found[:] = kronecker.blocks
        return jnp.zeros(())

    typed = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)  # keys
    dtype = lambda x: x.dtype if typed(x) else jax.dtypes.canonicalize_dtype(x.dtype)
    shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), dtype(x))
    full = jax.tree.map(shape, example_params) if masked else None
    try:
        jax.eval_shape(read, jax.tree.map(shape, params), full, jax.tree.map(shape, example_batch))
    except (TypeError, ValueError) as error:
        if jax.tree.leaves(example_batch):
            raise
        raise TypeError(
            f"{caller}: example_batch is {example_batch!r}, and the model cannot be read with that:"
            f" pass a batch as `update` will see, of which only shapes count ({error})"
        ) from error
    if asked:
        form = tuple((block.shape, block.kind) for block in found)
        met.setdefault(metric, {})[form] = found
    return found, _trees.work_dtype(params)


def start(blocks: list[Block], dtype: jnp.dtype) -> Average:
    """The average before the first step."""
    zeros = jax.tree.map(lambda x: x.astype(dtype), tuple(map(_kronecker.empty, blocks)))
    sides = [side for own in zeros for side in own]
    means = jnp.zeros((len(sides), max((side.shape[0] for side in sides), default=1)), dtype)
    return Average(zeros, means, jnp.zeros((len(sides),), dtype))


def renewed(
    here: Curvature,
    old: Average,
    count: jax.Array,
    every: int,
    decay: float,
    weight_sharing: str,
    *,
    keep_uses: bool = False,
) -> tuple[Kronecker, Average]:
    """The blocks, and their moments averaged with those of this batch on every so many steps.

    `keep_uses`: whether uses are wanted on every step; otherwise they may be those of none.
    """
    always = every == 1 or keep_uses
    found = [here.kronecker()] if always else []

    def step(old: Average) -> Average:
        kronecker = found[0] if always else here.kronecker()
        found[:] = [kronecker]
        new = _kronecker.moments(kronecker, weight_sharing)
        _check_same_blocks(here.name, old, new)
        return _averaged(decay, old, new)

    if every == 1:
        return found[0], step(old)
    # Not `cond`, which runs both branches under vmap.
    run = lambda carry: (jnp.asarray(False), step(carry[1]))
    _, average = jax.lax.while_loop(lambda c: c[0], run, (count % every == 0, old))
    # Of what was read in the body of a loop the blocks and their layout remain; arrays do not.
    return found[0] if always else found[0]._replace(uses=[]), average


def _check_same_blocks(name: str, old: Average, new: list[Moments]) -> None:
    shapes = lambda moments: [[m.shape for m in own] for own in moments]
    if shapes(old.moments) != shapes(new):
        raise ValueError(
            f"{name}: this batch puts the parameters in other blocks than the example_batch of the"
            f" solver: factors of shapes {shapes(new)}, the state has {shapes(old.moments)}"
        )


def _averaged(decay: float, old: Average, new: list[Moments]) -> Average:
    """The averages with one batch more, but for moments of it that are not finite.

    Each side goes by itself: its new moment need not be held until all are known.
    """
    # What is not finite in a second moment is so on its diagonal, too.
    means = [[_kronecker.mean_eigenvalues(side) for side in own] for own in new]
    sound = [[jnp.all(jnp.isfinite(mean)) for mean in own] for own in means]
    moments = tuple(
        tuple(map(functools.partial(mixed, decay), *sides))
        for sides in zip(sound, old.moments, new, strict=True)
    )
    table = _kronecker.table([mean for own in means for mean in own], old.means)
    kept = jnp.asarray([x for own in sound for x in own], bool)
    return Average(
        moments,
        mixed(decay, kept[:, None], old.means, table),
        mixed(decay, kept, old.weights, jnp.ones_like(old.weights)),
    )


def known(average: Average) -> list[jax.Array]:
    """For each block whether any batch has told of all its sides."""
    first, result = 0, []
    for own in average.moments:
        result.append(jnp.all(average.weights[first : first + len(own)] > 0))
        first += len(own)
    return result


def mixed(decay: float, sound: jax.Array, old: Tree, new: Tree) -> Tree:
    """One step of an exponential average, but where what is added is not sound."""
    mix = lambda a, b: jnp.where(sound, decay * a + (1 - decay) * b, a)
    return jax.tree.map(mix, old, new)


def solved(
    here: Curvature,
    kronecker: Kronecker,
    g: Tree,
    damping: jax.Array,
    each: Callable[[list[jax.Array]], list[jax.Array]],
    alive: list[jax.Array],
) -> tuple[Tree, jax.Array, jax.Array]:
    """A direction that is made block by block, g^T d, and the share of it without information.

    From the blocks: where they cover all parameters g need not be held until d is known.

    Args:
      here: the metric at a point.
      kronecker: the blocks.
      g: the gradient.
      damping: that g is divided by where no block tells more.
      each: arrays (B, p, q) of g -> those of d.
      alive: for each block whether its factors are other than zero.
    """
    parts = kronecker.split(g)
    found = each(parts)
    terms = jnp.stack([jnp.zeros((), here.dtype), *map(_kronecker.inner, parts, found)])
    d = kronecker.merge(found, outside(here, g, damping))
    slope = jnp.sum(terms) if kronecker.covers else _trees.vdot(g, d, here.dtype)
    seen = jnp.sum(jnp.where(jnp.stack([jnp.asarray(False), *alive]), terms, 0))
    return d, slope, _solver.outside_share(seen, slope)


def alive(average: Average) -> list[jax.Array]:
    """For each block whether none of its averages is zero."""
    first, result = 0, []
    for own in average.moments:
        result.append(jnp.all(jnp.any(average.means[first : first + len(own)] > 0, axis=1)))
        first += len(own)
    return result


def outside(here: Curvature, g: Tree, damping: jax.Array) -> Tree:
    """What parameters get that no output depends on: g / damping, 0 for damping 0."""
    gain = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)
    return _trees.scale(g, gain)


def check_choice(caller: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless a value is one of a few."""
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {choices}, got {value!r}")


def check_decay(caller: str, decay: Any) -> None:
    """Raises unless a decay lies in [0, 1)."""
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"{caller}: decay must be a Python number in [0, 1), got {decay!r}")

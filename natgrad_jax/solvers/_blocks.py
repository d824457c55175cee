"""What the Kronecker-factored solvers share: blocks at `init`, averages, checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.curvature import curvature
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.kronecker import Kronecker
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import _kronecker
from natgrad_jax.solvers._kronecker import Moments

Tree = Any


class Average(NamedTuple):
    """Exponential averages of moments; divided by `weight` they have no bias.

    Attributes:
      moments: for each block, one array for each of its sides.
      weight: what the weights of the average sum to, 0 before the first step.
    """

    moments: tuple[Moments, ...]
    weight: jax.Array


def blocks_at_init(
    caller: str, metric: Metric, params: Tree, example_batch: Tree, example_params: Tree | None
) -> tuple[list[Block], Any] | None:
    """The blocks of the parameters and the working dtype, from shapes; None without parameters.

    A placeholder (`optax.tree.map_params` asks with one) stands for the example parameters.
    """
    hidden = lambda x: isinstance(x, optax.MaskedNode)
    masked = any(map(hidden, jax.tree.leaves(params, is_leaf=hidden)))
    if not jax.tree.leaves(params):
        if masked or example_params is None:
            return None
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
    jax.eval_shape(read, jax.tree.map(shape, params), full, jax.tree.map(shape, example_batch))
    return found, _trees.work_dtype(params)


def start(blocks: list[Block], dtype: Any) -> Average:
    """The average before the first step."""
    zeros = tuple(tuple(x.astype(dtype) for x in _kronecker.empty(b)) for b in blocks)
    return Average(zeros, jnp.zeros((), dtype))


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
        # What is not finite in a second moment is so on its diagonal, too.
        sums = _kronecker.mean_eigenvalues([m for own in new for m in own])
        return Average(*mixed(decay, old, tuple(new), sums))

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


def mixed(decay: float, old: Any, new: Tree, sums: Tree) -> tuple[Tree, jax.Array]:
    """One step of an exponential average, (average, what its weights sum to).

    Args:
      decay: of the average.
      old: (average, what its weights sum to).
      new: what is added; nothing where one of `sums` is not finite, or averages would never be.
      sums: over `new`.
    """
    sound = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(sums)]))
    mix = lambda a, b: jnp.where(sound, decay * a + (1 - decay) * b, a)
    average, weight = old
    return jax.tree.map(mix, average, new), mix(weight, jnp.ones_like(weight))


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

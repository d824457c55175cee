"""Arrays spread over devices: dense linear algebra on them, and types given back as found."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

Tree = Any


def run(core: Callable[..., Tree], operands: tuple[Any, ...], like: Tree) -> Tree:
    """Calls `core(*operands)`; under Explicit sharding axes, with those axes automatic inside.

    `ravel`, `concatenate` and `vdot` of explicitly sharded arrays raise: inside, the compiler
    chooses, and what comes out is sharded like `like`, a tree with the structure of the result.
    """
    mesh = _explicit_mesh((operands, like))
    if mesh is None:
        return core(*operands)

    def sharding(leaf: jax.Array) -> NamedSharding:
        own = jax.typeof(leaf).sharding
        return own if own.mesh.axis_names else NamedSharding(mesh, PartitionSpec())

    arrays = jax.tree.map(jnp.asarray, operands)
    return jax.sharding.auto_axes(core, out_sharding=jax.tree.map(sharding, like))(*arrays)


def place_beside(state: Tree, params: Tree) -> Tree:
    """Replicates the scalars of a new state over the devices of sharded parameters.

    An update computes on all of them; a state that starts there keeps its sharding from the first
    update on.
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    named = [
        s
        for s in shardings
        if isinstance(s, NamedSharding) and isinstance(s.mesh, jax.sharding.Mesh)
    ]
    if not named or _traced(params):
        return state
    everywhere = NamedSharding(named[0].mesh, PartitionSpec())

    def leaf(x: jax.Array) -> jax.Array:
        return jax.device_put(x, everywhere) if len(x.sharding.device_set) == 1 else x

    return jax.tree.map(leaf, state)


def keep(new: Tree, old: Tree) -> Tree:
    """Puts concrete arrays back on the devices where `old` lies; traced ones are left alone."""

    def leaf(x: jax.Array, like: jax.Array) -> jax.Array:
        if isinstance(x, jax.core.Tracer) or not isinstance(like, jax.Array):
            return x
        if isinstance(like, jax.core.Tracer) or len(like.sharding.device_set) == 1:
            return x
        return x if x.sharding == like.sharding else jax.device_put(x, like.sharding)

    return jax.tree.map(leaf, new, old)


def _traced(tree: Tree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _explicit_mesh(tree: Tree) -> Any:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if any(kind == AxisType.Explicit for kind in mesh.axis_types or ()):
                return mesh
    return None

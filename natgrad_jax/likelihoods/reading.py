"""Reading and checking what is in output space."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _trees

Tree = Any


class NoDivergenceError(TypeError):
    """A likelihood has no KL divergence, and the exact Fisher matrix needs it."""

    def __init__(self, owner: object, remedy: str):
        needs = f"the exact Fisher of {type(owner).__name__} needs `kl`"
        super().__init__(f"{call(owner, 'kl')}: {needs}; {remedy}, or use sampled_fisher")


def call(likelihood: object, method: str) -> str:
    """`Class.method`, how errors name a call."""
    return f"{type(likelihood).__name__}.{method}"


def number_of_rows(call: str, outputs: Tree) -> int:
    """N, the leading axis of every leaf of the outputs."""
    rows = sorted({leaf.shape[0] for leaf in jax.tree.leaves(outputs)})
    if len(rows) != 1:
        raise ValueError(f"{call}: leaves of outputs must agree on the number of rows, got {rows}")
    return rows[0]


def one_a_row(call: str, values: jax.Array, outputs: Tree) -> jax.Array:
    """Values that must be one number a row, (N,)."""
    rows = number_of_rows(call, outputs)
    if jnp.shape(values) != (rows,):
        raise ValueError(
            f"{call}: must give one number a row, shape ({rows},) for outputs with {rows} rows, got"
            f" shape {jnp.shape(values)}; sum what follows the row axis, and give constants that"
            " belong to rows the shape of the outputs"
        )
    return values


def array(call: str, what: str, value: Any) -> jax.Array:
    """One array, or a TypeError."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{call}: {what} must be one array, got {type(value).__name__}: {value!r}")
    return jnp.asarray(value)


def targets(call: str, targets: Any, shape: tuple[int, ...], outputs: jax.Array) -> jax.Array:
    """Targets of the shape that outputs ask for."""
    y = array(call, "targets", targets)
    if y.shape != shape:
        needs = f"outputs of shape {outputs.shape} need targets of shape {shape}"
        raise ValueError(f"{call}: {needs}, got targets of shape {y.shape}")
    if jnp.iscomplexobj(y):
        raise TypeError(f"{call}: targets must be real, got dtype {y.dtype}")
    return y


def promote(call: str, outputs: Tree) -> Tree:
    """Outputs as real arrays with rows, in the dtype of the arithmetic."""

    def check(leaf: Any) -> jax.Array:
        leaf = array(call, "each leaf of outputs", leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{call}: outputs must be real floating point, got {leaf.dtype}")
        if leaf.ndim < 1:
            raise ValueError(f"{call}: outputs need a leading axis of rows, got shape ()")
        return leaf

    outputs = jax.tree.map(check, outputs)
    return _trees.cast(outputs, _trees.work_dtype(outputs))


def operands(call: str, outputs: Tree, vectors: Tree) -> tuple[Tree, Tree]:
    """Outputs promoted, and vectors (tangents or coefficients) in their structure and dtype."""
    outputs = promote(call, outputs)
    check_alike(call, outputs, vectors)
    vectors = _trees.cast(jax.tree.leaves(vectors), _trees.work_dtype(outputs))
    return outputs, jax.tree.unflatten(jax.tree.structure(outputs), vectors)


def check_alike(call: str, first: Tree, second: Tree) -> None:
    """Raises unless two trees have leaves of the same shapes."""
    a, b = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (first, second))
    if a != b:
        raise ValueError(f"{call}: both arguments must have the same shapes, got {a} and {b}")


def children(call: str, tree: Tree) -> tuple[dict[Any, Tree], Callable[[dict], Tree]]:
    """The children of a tuple, list or mapping by name, and the way back from such a dict."""
    if not isinstance(tree, tuple | list | Mapping):
        got = f"got {type(tree).__name__}: {tree!r}"
        raise TypeError(f"{call}: needs a tuple, list or dict with one entry a head, {got}")
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, lambda node: node is not tree)
    # Positions name the entries of sequences, named tuples included: any sequence fits another.
    named = {getattr(p[0], "key", i): child for i, (p, child) in enumerate(paths)}
    return named, lambda by_name: jax.tree.unflatten(structure, [by_name[k] for k in named])


def sum_trailing(values: jax.Array) -> jax.Array:
    """Sums everything but the row axis."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def several(call: str, outputs: Tree, names: tuple[str, ...]) -> Tree:
    """Outputs that are a tuple or list of so many arrays of one shape, promoted."""
    kinds = {2: "a pair", 3: "a triple"}
    listed = ", ".join(names)
    if not isinstance(outputs, tuple | list) or len(outputs) != len(names):
        got = jax.tree.structure(outputs)
        raise TypeError(f"{call}: outputs must be {kinds[len(names)]} ({listed}), got {got}")
    shapes = [array(call, " and ".join(names), leaf).shape for leaf in outputs]
    if len(set(shapes)) > 1:
        each = " and ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(f"{call}: {each} must have one shape")
    return promote(call, outputs)


def constant(call: str, name: str, value: Any, like: jax.Array) -> jax.Array:
    """A constant of the likelihood, for every position of an output."""
    shape = jnp.shape(value)
    aligned = zip(shape[::-1], like.shape[::-1], strict=False)
    if len(shape) > like.ndim or not all(a in (1, b) for a, b in aligned):
        raise ValueError(f"{call}: {name} {shape} does not broadcast to outputs {like.shape}")
    return jnp.broadcast_to(jnp.asarray(value).astype(like.dtype), like.shape)


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raises unless a constant is positive; a traced one has no value yet."""
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{owner}: {name} must be positive, got {value}")

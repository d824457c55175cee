"""Reading and checking what is in output space, and arithmetic that keeps its digits there."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from natgrad_jax import _trees


def call(likelihood, method):
    """`Class.method`, how errors name a call."""
    return f"{type(likelihood).__name__}.{method}"


def needs_kl(owner, remedy):
    """The message of a likelihood whose exact Fisher lacks its KL."""
    needs = f"the exact Fisher of {type(owner).__name__} needs `kl`"
    return f"{call(owner, 'kl')}: {needs}; {remedy}, or use sampled_fisher"


def array(call, what, value):
    """One array, or a TypeError."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{call}: {what} must be one array, got {type(value).__name__}: {value!r}")
    return jnp.asarray(value)


def targets(call, targets, shape, outputs):
    """Targets of the shape that outputs ask for."""
    y = array(call, "targets", targets)
    if y.shape != shape:
        needs = f"outputs of shape {outputs.shape} need targets of shape {shape}"
        raise ValueError(f"{call}: {needs}, got targets of shape {y.shape}")
    if jnp.iscomplexobj(y):
        raise TypeError(f"{call}: targets must be real, got dtype {y.dtype}")
    return y


def promote(call, outputs):
    """Outputs as real arrays with rows, in the dtype of the arithmetic."""

    def check(leaf):
        leaf = array(call, "each leaf of outputs", leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{call}: outputs must be real floating point, got {leaf.dtype}")
        if leaf.ndim < 1:
            raise ValueError(f"{call}: outputs need a leading axis of rows, got shape ()")
        return leaf

    outputs = jax.tree.map(check, outputs)
    return _trees.cast(outputs, _trees.work_dtype(outputs))


def operands(call, outputs, vectors):
    """Outputs promoted, and vectors (tangents or coefficients) in their structure and dtype."""
    outputs = promote(call, outputs)
    check_alike(call, outputs, vectors)
    vectors = _trees.cast(jax.tree.leaves(vectors), _trees.work_dtype(outputs))
    return outputs, jax.tree.unflatten(jax.tree.structure(outputs), vectors)


def check_alike(call, first, second):
    """Raises unless two trees have leaves of the same shapes."""
    a, b = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (first, second))
    if a != b:
        raise ValueError(f"{call}: both arguments must have the same shapes, got {a} and {b}")


def children(call, tree):
    """The children of a tuple, list or mapping by name, and the way back from such a dict."""
    if not isinstance(tree, tuple | list | Mapping):
        got = f"got {type(tree).__name__}: {tree!r}"
        raise TypeError(f"{call}: needs a tuple, list or dict with one entry a head, {got}")
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, lambda node: node is not tree)
    # Positions name the entries of sequences, named tuples included: any sequence fits another.
    named = {getattr(p[0], "key", i): child for i, (p, child) in enumerate(paths)}
    return named, lambda by_name: jax.tree.unflatten(structure, [by_name[k] for k in named])


def sum_trailing(values):
    """Sums everything but the row axis."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def times(weight, value):
    """weight * value with 0 * inf = 0; its derivative in weight is wrong at 0."""
    return weight * jnp.where(weight == 0, 0, value)


def log_softmax(logits):
    """Log-probabilities; -inf where logits are, also in rows of nothing else."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - jnp.where(peak == -jnp.inf, 0, peak)
    mass = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.where(mass > 0, mass, 1))


def subtract_mass(p, y):
    """(I - p 1^T) y along the last axis.

    The entry of the likeliest class is minus the sum of the others: y - p sum(y) would cancel
    there, and its rounding exceeds the whole Fisher matrix of a confident prediction.
    """
    top = jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=bool)
    others = jnp.where(top, 0, y - p * jnp.sum(y, axis=-1, keepdims=True))
    return jnp.where(top, -jnp.sum(others, axis=-1, keepdims=True), others)


def relative_entropy(log_p, log_q):
    """p log(p / q) - p + q >= 0 of masses given by their logarithms, zero mass included.

    The last two terms cancel in a sum over all classes. With them every term is of second order
    near p = q, so that small divergences keep their digits.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.where(p > 0, log_q - log_p, 0)
    near = (p > 0) & (jnp.abs(gap) < 1)
    small = jnp.where(near, gap, 0)  # the branch not taken must stay finite for the gradient
    return jnp.where(near, p * (jnp.expm1(small) - small), q - p - p * gap)

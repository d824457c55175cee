"""Targets drawn from a model, their scores in output space, and these as columns of a factor B."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.likelihoods import Joint
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.likelihoods import reading

Tree = Any


def output_scores(
    likelihood: Likelihood, outputs: Tree, key: jax.Array | None, num_samples: int
) -> Tree:
    """Scores in output space of drawn targets: a tree like `outputs`, leaves (S, L, ...)."""
    if len({leaf.shape[0] for leaf in jax.tree.leaves(outputs)}) > 1:
        if not isinstance(likelihood, Joint):
            shapes = jax.tree.map(lambda z: z.shape, outputs)
            raise ValueError(f"sampled_fisher: output leaves disagree on the rows: {shapes}")
        heads = likelihood.likelihoods
        names = sorted(heads) if isinstance(heads, dict) else range(len(heads))
        scores = {
            name: output_scores(heads[name], outputs[name], jax.random.fold_in(key, i), num_samples)
            for i, name in enumerate(names)
        }
        return scores if isinstance(heads, dict) else tuple(scores.values())
    wide = _trees.cast(outputs, _trees.work_dtype(outputs))
    targets = _draw(likelihood, wide, key, num_samples)

    def total(z: Tree, y: Tree) -> jax.Array:
        call = reading.call(likelihood, "log_prob")
        return jnp.sum(reading.one_a_row(call, likelihood.log_prob(z, y), z))

    try:
        return jax.vmap(jax.grad(total), in_axes=(None, 0))(wide, targets)
    except (TypeError, ValueError) as error:
        name, shapes = type(likelihood).__name__, jax.tree.map(lambda y: y.shape[1:], targets)
        raise type(error)(
            f"sampled_fisher: {name}.log_prob does not take what {name}.sample draws, targets of"
            f" shape {shapes}: {error}"
        ) from error


def _draw(likelihood: Likelihood, outputs: Tree, key: jax.Array, num_samples: int) -> Tree:
    """Targets with leading axes (S, L), drawn for all rows at once.

    Likelihoods with a closed form draw row r from `fold_in(key, r)`, whatever the other rows.
    """
    rows = jax.tree.leaves(outputs)[0].shape[0]
    split = lambda r: jax.random.split(jax.random.fold_in(key, r), num_samples)
    row_keys = jax.vmap(split, out_axes=1)(jnp.arange(rows))
    draw = lambda whole, by_row: likelihood._draw(whole, outputs, by_row)
    targets = jax.vmap(draw)(jax.random.split(key, num_samples), row_keys)
    shapes = jax.tree.map(lambda y: y.shape[1:], targets)
    if any(y.shape[1:2] != (rows,) for y in jax.tree.leaves(targets)):
        raise ValueError(
            f"sampled_fisher: {reading.call(likelihood, 'sample')} must draw targets for all rows,"
            f" leaves ({rows}, ...) for outputs with {rows} rows, got shape {shapes}"
        )
    return targets


def has_exact_fisher(likelihood: Likelihood, outputs: Tree) -> bool:
    """Whether the likelihood has an exact Fisher matrix at such outputs."""
    try:
        jax.eval_shape(likelihood.fisher_product, outputs, outputs)
    except reading.NoDivergenceError:
        return False
    return True


def distance_key() -> jax.Array:
    """The key of samples that measure distances; threefry, which every distribution can draw by."""
    return jax.random.key(1998, impl="threefry2x32")


def score_columns(root: Tree, scores: Tree) -> tuple[Callable[[Tree], Tree], Tree]:
    """B u = sum_s g_s u_s / sqrt(S), and the shapes of u: one leaf (L, S) for each distinct L."""
    leaves, treedef = jax.tree.flatten(scores)
    roots = jax.tree.leaves(root)
    columns = {g.shape[1]: (g.shape[1], g.shape[0]) for g in leaves}
    position = {rows: i for i, rows in enumerate(columns)}

    def factor_product(coefficients: tuple[jax.Array, ...]) -> Tree:
        def leaf(g: jax.Array, w: jax.Array) -> jax.Array:
            samples, rows = g.shape[:2]
            u = coefficients[position[rows]].T * (w / samples**0.5)[None, :]
            return jnp.sum(g * u.reshape(u.shape + (1,) * (g.ndim - 2)), axis=0)

        return jax.tree.unflatten(treedef, [leaf(g, w) for g, w in zip(leaves, roots, strict=True)])

    dtype = leaves[0].dtype
    return factor_product, tuple(jax.ShapeDtypeStruct(c, dtype) for c in columns.values())

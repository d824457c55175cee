"""The mean KL divergence over rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import examples
from natgrad_jax.likelihoods import Joint
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.likelihoods import reading

Tree = Any


def divergence(
    name: str,
    likelihood: Likelihood,
    weights: Callable[[Tree], jax.Array] | None,
    groups: Callable[[Tree], tuple[examples.Group, ...]],
) -> Callable[[Tree, Tree, Tree], jax.Array]:
    """(outputs p, outputs q, batch) -> the mean KL[p || q], averaged as the metric `name` does."""
    return lambda outputs_p, outputs_q, batch: mean_kl(
        name, likelihood, weights, groups(batch), outputs_p, outputs_q, batch
    )


def mean_kl(
    name: str,
    likelihood: Likelihood,
    weights: Callable[[Tree], jax.Array] | None,
    groups: tuple[examples.Group, ...],
    outputs_p: Tree,
    outputs_q: Tree,
    batch: Tree,
) -> jax.Array:
    """The mean KL[p || q] over output rows."""
    examples.check_outputs(name, outputs_p, groups)
    row_weights = examples.row_weights(name, weights, batch, outputs_p, groups)
    return _over_rows(likelihood, outputs_p, outputs_q, row_weights)


def _over_rows(
    likelihood: Likelihood, outputs_p: Tree, outputs_q: Tree, row_weights: Tree
) -> jax.Array:
    leaves = jax.tree.leaves(row_weights)
    if isinstance(likelihood, Joint) and len({w.shape for w in leaves}) > 1:
        # Heads with rows of their own: each is averaged over its own.
        heads = likelihood.likelihoods
        names = list(heads) if isinstance(heads, dict) else range(len(heads))
        parts = (outputs_p, outputs_q, row_weights)
        found = [_over_rows(heads[n], *(part[n] for part in parts)) for n in names]
        return sum(found[1:], found[0])
    call = reading.call(likelihood, "kl")
    rows = reading.one_a_row(call, likelihood.kl(outputs_p, outputs_q), outputs_p)
    return jnp.dot(leaves[0].astype(rows.dtype), rows, precision="highest")

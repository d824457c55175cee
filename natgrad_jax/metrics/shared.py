"""What constructors of metrics share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _reading
from natgrad_jax import examples
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.metrics import output_metrics
from natgrad_jax.metrics.output_metrics import OutputMetric

Tree = Any


def checked(
    caller: str, name: str, function: Callable[[Tree, Tree], Any], weights: object
) -> Callable[[Tree, Tree], Any]:
    """The function, which tells of the batch where it cannot read it."""
    if not callable(function):
        raise TypeError(f"{caller}: {name} must be a function of (params, batch), got {function!r}")
    if weights is not None and not callable(weights):
        raise TypeError(f"{caller}: weights must be a function of the batch, got {weights!r}")
    return _reading.told(caller, name, function)


def check_likelihood(caller: str, likelihood: object) -> None:
    """Raises TypeError where it is none."""
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"{caller}: likelihood must be a natgrad_jax.Likelihood such as Categorical(), got"
            f" {likelihood!r}"
        )


def groups_of(
    caller: str, batch_axes: Tree, *, several: bool = False
) -> Callable[[Tree], tuple[examples.Group, ...]]:
    """batch -> groups of its examples."""
    return lambda batch: examples.example_groups(caller, batch, batch_axes, several=several)


def exact_output_metric(
    name: str,
    likelihood: Likelihood,
    weights: Callable[[Tree], Tree] | None,
    groups: Callable[[Tree], tuple[examples.Group, ...]],
) -> Callable[..., OutputMetric]:
    """(outputs, batch, key) -> the Fisher matrices of a likelihood, row by row."""

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        del key
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        root = jax.tree.map(jnp.sqrt, row_weights)
        return OutputMetric(
            lambda v: examples.scale_rows(row_weights, likelihood.fisher_product(outputs, v)),
            lambda u: examples.scale_rows(root, likelihood.fisher_factor_product(outputs, u)),
            output_metrics.coefficients_like(outputs),
            row_weights,
        )

    return output_metric

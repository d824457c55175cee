"""Rows of a pull-back metric: read the model, pull cotangents back, gather the factors."""

from typing import Any

from natgrad_jax import _trees
from natgrad_jax.examples import Group
from natgrad_jax.jacobian import parts
from natgrad_jax.jacobian import plan
from natgrad_jax.jacobian import reader
from natgrad_jax.jacobian.interface import Jacobian
from natgrad_jax.jacobian.products import jacobian_of_factors

Tree = Any


def jacobian(
    caller: str,
    function: Any,
    params: Tree,
    batch: Tree,
    output_metric: Any,
    groups: tuple[Group, ...],
    independent: bool | None = None,
) -> Jacobian:
    """The rows R of a pull-back metric, in factored form where the model allows it.

    Args:
      caller: public name for messages.
      function: (params, batch) -> outputs.
      params: pytree of real arrays, P numbers.
      batch: pytree of arrays.
      output_metric: the `OutputMetric` at the outputs of this batch.
      groups: the groups of examples of this batch.
      independent: whether the user claims that examples do not mix.

    Returns:
      A :class:`Jacobian`.
    """
    model = plan.flatten(caller, function, params, batch, groups)
    made = plan.plan(model, output_metric.coefficients, independent)
    if made.reason is not None:
        reader.warn(caller, made.reason)
    dtype = _trees.work_dtype(params)
    made, factors = parts.factors_of(model, made, output_metric, dtype)
    joined = made.readings[0].joined
    return jacobian_of_factors(factors, made.rows, output_metric, params, joined, dtype)

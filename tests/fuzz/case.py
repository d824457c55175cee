"""What a row of the table is."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from tests.fuzz.operands import Operand


class Case(NamedTuple):
    """A function that leads to a primitive.

    Attributes:
      function: of as many arrays as there are operands, to one floating array. It takes one
        example, or all of them along a leading axis where `batched`.
      operands: shapes and domains.
      complex: whether operands may be complex.
      loose: how many times the tolerance is wider: the condition of the function.
      batched: whether the first operand holds all examples along its leading axis, and the others
        are of no example. A function of one operand takes it with and without that axis.
      refused: what JAX itself says where it, or some version of it, does not differentiate this in
        reverse mode, or does not map what it made.
    """

    function: Callable
    operands: tuple[Operand, ...]
    complex: bool = False
    loose: float = 1.0
    batched: bool = False
    refused: str = ""


def case(function, *operands, **options) -> Case:
    """A case of real operands."""
    return Case(function, operands, **options)


def either(function, *operands, **options) -> Case:
    """A case of real or complex operands."""
    return Case(function, operands, complex=True, **options)


def batched(function, *operands, **options) -> Case:
    """A case written for all examples at once."""
    return Case(function, operands, batched=True, **options)


def gated(x, mask):
    """What has no derivative of its own, as a factor."""
    return x * mask.astype(x.dtype)


def joined(*arrays):
    """All entries of several arrays as one vector."""
    dtype = jnp.result_type(*arrays)
    return jnp.concatenate([x.reshape(-1).astype(dtype) for x in arrays])


def whole(x):
    """Integers that follow a real array."""
    return jnp.floor(8 * x).astype(jnp.int32)

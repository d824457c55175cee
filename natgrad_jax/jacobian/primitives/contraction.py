"""Contractions: `dot_general`, and products with ragged groups of rows."""

from typing import Any

import jax

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import uses
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require
from natgrad_jax.jacobian.uses import MisfitError
from natgrad_jax.jacobian.uses import Record
from natgrad_jax.jacobian.uses import Use


def _dot(equation: Any, labels: list[Label]) -> Label:
    contract, batch = _jaxpr.parameter(equation, "dimension_numbers")
    ranks = [len(shape) for shape in _jaxpr.shapes_in(equation)[:2]]
    found: list[Label] = []
    for side, label in enumerate(labels[:2]):
        if label is None:
            continue
        require(isinstance(label, Axis) and label.is_plain)
        assert isinstance(label, Axis)
        require(label.dim not in contract[side])
        if label.dim in batch[side]:
            found.append(move(label, list(batch[side]).index(label.dim)))
            continue
        require(labels[1 - side] is None)
        free = [d for d in range(ranks[side]) if d not in (*contract[side], *batch[side])]
        first = len(batch[0])
        if side == 1:
            first += ranks[0] - len(contract[0]) - len(batch[0])
        found.append(move(label, first + free.index(label.dim)))
    return axis(found)


def _use(equation: Any, operands: list[Any], at: int, label: Axis) -> Use:
    """`dot_general` of a parameter (operand `at`) with what depends on examples."""
    contract, batch = _jaxpr.parameter(equation, "dimension_numbers")
    view, other = operands[at].view, operands[1 - at]
    rank = len(view.dims), other.array.ndim
    own_contract, a_contract = tuple(contract[at]), tuple(contract[1 - at])
    own_batch, a_batch = tuple(batch[at]), tuple(batch[1 - at])
    own_free = [d for d in range(rank[0]) if d not in own_contract + own_batch]
    a_free = [d for d in range(rank[1]) if d not in a_contract + a_batch]
    count = len(own_batch)
    # Results are laid out (batch, free of the left operand, free of the right operand).
    first, second = (own_free, a_free) if at == 0 else (a_free, own_free)
    z_first = tuple(range(count, count + len(first)))
    z_second = tuple(range(count + len(first), count + len(first) + len(second)))
    z_own, z_a = (z_first, z_second) if at == 0 else (z_second, z_first)
    shared = [k for k in range(count) if views.is_broadcast(view.dims[own_batch[k]])]
    copies = [k for k in range(count) if k not in shared]
    if label.dim in copies:
        raise MisfitError(uses.PER_EXAMPLE)
    a_copies, a_shared = (tuple(a_batch[k] for k in ks) for ks in (copies, shared))
    a_label = other.label

    def left(a: jax.Array) -> jax.Array:
        return uses.laid_out(a, a_label, a_copies, (*a_shared, *a_free), a_contract)

    def right(_: Record, g: jax.Array) -> jax.Array:
        return uses.laid_out(g, label, tuple(copies), (*shared, *z_a), z_own)

    b = views.joined(view, [own_batch[k] for k in copies])
    p, q = views.joined(view, own_contract), views.joined(view, own_free)
    return Use("dot_general", left, right, b, p, q, other.array, own=(*copies, *z_own))


def _sums(equation: Any, labels: list[Label]) -> bool:
    """Whether the product sums over examples, the same ones on both sides."""
    contract, _ = _jaxpr.parameter(equation, "dimension_numbers")
    positions = set()
    for side, label in enumerate(labels[:2]):
        if label is None:
            continue
        if not isinstance(label, Axis) or not label.is_plain or label.dim not in contract[side]:
            return False
        positions.add(list(contract[side]).index(label.dim))
    return (
        len(positions) == 1
        and join("", labels[:2]) is not None
        and len({label._replace(dim=0) for label in labels[:2] if isinstance(label, Axis)}) == 1
    )


def _ragged(equation: Any, labels: list[Label]) -> Label:
    """Examples are rows of the left operand, in groups of the same sizes for every batch."""
    numbers = _jaxpr.parameter(equation, "ragged_dot_dimension_numbers")
    (contract, _), (batch, _) = numbers.dot_dimension_numbers
    require(all(label is None for label in labels[1:]) and not batch)
    label = axis(labels)
    require(label.dim not in contract)
    return move(label, label.dim - sum(d < label.dim for d in contract))


register(
    "dot_general",
    Rule(examples=one(_dot), use=_use, contracts=True, linear=True, sums=_sums),
)
register("ragged_dot_general", Rule(examples=one(_ragged)))

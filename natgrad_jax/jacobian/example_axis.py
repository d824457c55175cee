"""Follows the example axis through a program, and so shows that examples do not mix.

Every value carries a label: where its examples lie, that it is the same for all of them, or that
some equation mixed them. Nothing is inferred from sizes.
"""

from collections.abc import Callable
from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import axis_rules
from natgrad_jax.jacobian.labels import OWN as OWN
from natgrad_jax.jacobian.labels import Axis as Axis
from natgrad_jax.jacobian.labels import Label as Label
from natgrad_jax.jacobian.labels import Mixed as Mixed
from natgrad_jax.jacobian.labels import join as join
from natgrad_jax.jacobian.labels import move as move


def propagate(equation: Any, labels: list[Label], known: list[Any] | None = None) -> list[Label]:
    """The labels of an equation's results.

    Args:
      equation: the equation.
      labels: of its operands.
      known: integer operands whose values are known, as masked arrays; None for the others.
    """
    count, name = len(equation.outvars), _jaxpr.name(equation)
    present = [label for label in labels if label is not None]
    if not present:
        return [None] * count
    if OWN in present:
        return [OWN] * count
    try:
        if name in _PER_RESULT:
            return _PER_RESULT[name](equation, labels)
        for label in present:
            if isinstance(label, Mixed):
                return [label] * count
        if name in axis_rules.ELEMENTWISE:
            return [axis_rules.elementwise(equation, labels)] * count
        if name == "gather":
            return [axis_rules.gather(equation, labels, known)]
        if name in axis_rules.RULES:
            return [axis_rules.RULES[name](equation, labels)] * count
    except axis_rules.BlendError:
        pass
    return [Mixed(name)] * count


def propagate_through(program: _jaxpr.Program, labels: list[Label]) -> list[Label]:
    """The labels of a program's outputs."""
    values: dict[Any, Label] = dict(zip(program.inputs, labels, strict=True))
    read = lambda v: None if _jaxpr.is_literal(v) else values.get(v)
    for equation in program.equations:
        results = propagate(equation, [read(v) for v in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in program.outputs]


def _call(equation: Any, labels: list[Label]) -> list[Label]:
    body = _jaxpr.call_body(equation)
    assert body is not None
    return propagate_through(body, labels)


def _custom(equation: Any, labels: list[Label]) -> list[Label]:
    return propagate_through(_jaxpr.custom_body(equation), labels)


def _cond(equation: Any, labels: list[Label]) -> list[Label]:
    axis_rules.require(labels[0] is None)
    ends = [propagate_through(branch, labels[1:]) for branch in _jaxpr.branches(equation)]
    return [join("cond", list(each)) for each in zip(*ends, strict=True)]


def _while(equation: Any, labels: list[Label]) -> list[Label]:
    condition, cond_count, body, body_count = _jaxpr.while_parts(equation)
    fixed = labels[cond_count : cond_count + body_count]
    carried = settle(
        "while", labels[cond_count + body_count :], lambda c: propagate_through(body, fixed + c)
    )
    (proceed,) = propagate_through(condition, labels[:cond_count] + carried)
    axis_rules.require(proceed is None)
    return carried


def _scan(equation: Any, labels: list[Label]) -> list[Label]:
    loop = _jaxpr.loop(equation)
    return scan_labels(loop, labels)[1]


def scan_labels(loop: _jaxpr.Loop, labels: list[Label]) -> tuple[list[Label], list[Label]]:
    """Labels of the body's operands at rest, and of the results of a scan."""
    first, last = loop.num_constants, loop.num_constants + loop.num_carries
    fixed, scanned = labels[:first], [unstacked(label) for label in labels[last:]]
    run = lambda carried: propagate_through(loop.body, fixed + carried + scanned)
    carried = settle("scan", labels[first:last], lambda c: run(c)[: loop.num_carries])
    results = [stacked(label) for label in run(carried)[loop.num_carries :]]
    return fixed + carried + scanned, carried + results


def stacked(label: Label) -> Label:
    """The label of values stacked along a new leading dimension."""
    return move(label, label.dim + 1) if isinstance(label, Axis) else label


def unstacked(label: Label) -> Label:
    """The label of one slice along the leading dimension."""
    if not isinstance(label, Axis) or label.dim == -1:
        return label
    return Mixed("scan") if label.dim == 0 else move(label, label.dim - 1)


def settle(
    name: str, carried: list[Label], step: Callable[[list[Label]], list[Label]]
) -> list[Label]:
    """The labels of carried values that one more step leaves alone."""
    while True:
        pairs = zip(carried, step(carried), strict=True)
        joined = [join(name, [before, after]) for before, after in pairs]
        if joined == carried:
            return carried
        carried = joined


_PER_RESULT: dict[str, Callable[[Any, list[Label]], list[Label]]] = {
    **dict.fromkeys(_jaxpr.TRANSPARENT, _call),
    **dict.fromkeys(_jaxpr.CUSTOM, _custom),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "optimization_barrier": lambda equation, labels: labels,
}

"""Calls, loops and branches: labels are those of the programs inside."""

import contextvars
from collections.abc import Callable
from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Mixed
from natgrad_jax.jacobian.labels import Pass
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import propagate_through
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require

#: Whether a derivative is being looked through: what it calls is evaluated, and differentiated no
#: more. Forward rules often call the very function that they are rules of.
_in_derivative: contextvars.ContextVar[bool] = contextvars.ContextVar("derivative", default=False)


def _call(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    return propagate_through(_jaxpr.call_body(equation), labels)


def _custom(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    """As its body does, if its own derivative, which is what counts, does the same."""
    found = propagate_through(_jaxpr.custom_body(equation), labels)
    if not _in_derivative.get() and any(isinstance(label, Axis) for label in found):
        require(_derivative_keeps(equation, labels, found))
    return found


def _derivative_keeps(equation: Any, labels: list[Label], found: list[Label]) -> bool:
    """Whether the derivative keeps examples where the function does."""
    moving = [i for i, v in enumerate(equation.invars) if _jaxpr.is_inexact(v)]
    results = [i for i, v in enumerate(equation.outvars) if _jaxpr.is_inexact(v)]
    shapes = [_jaxpr.shaped(v.aval) for v in equation.invars]
    backwards = _jaxpr.name(equation).startswith("custom_vjp")
    if backwards:
        moving = _jaxpr.differentiable(equation, moving, results, shapes)
    before, after = [labels[i] for i in moving], [found[i] for i in results]
    if backwards:
        program = _jaxpr.pullback(equation, moving, results, shapes)
        given, wanted = after, before
    else:
        program = _jaxpr.pushforward(equation, moving, results, shapes)
        given, wanted = before, after
    if program is None:
        return False
    token = _in_derivative.set(True)
    try:
        ends = propagate_through(program, given + labels)
    finally:
        _in_derivative.reset(token)
    # Backwards, what all examples share collects a sum over all of them.
    collects = lambda end: wanted is before and isinstance(end, Mixed) and end.summed
    return all(
        (label is None and collects(end)) or join("", [end, label]) == label
        for end, label in zip(ends, wanted, strict=True)
    )


def _cond(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    require(labels[0] is None)
    ends = [propagate_through(branch, labels[1:]) for branch in _jaxpr.branches(equation)]
    return [join("cond", list(each)) for each in zip(*ends, strict=True)]


def _while(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    """A loop of all examples at once, or, under vmap, of each until its own condition fails."""
    condition, cond_count, body, body_count = _jaxpr.while_parts(equation)
    fixed, lanes = labels[cond_count : cond_count + body_count], _jaxpr.rank(condition.outputs[0])

    def proceeds(carried: list[Label]) -> Label:
        (label,) = propagate_through(condition, labels[:cond_count] + carried)
        require(label is None or (isinstance(label, Axis) and label.dim < lanes))
        return label

    def step(carried: list[Label]) -> list[Label]:
        # The condition's dimensions lead those of all that is carried, and choose among them.
        label, ends = proceeds(carried), propagate_through(body, fixed + carried)
        return [join("while", [end, label]) for end in ends]

    carried = settle("while", labels[cond_count + body_count :], step)
    proceeds(carried)
    return carried


def _scan(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    return scan_labels(_jaxpr.loop(equation), labels)[1]


def scan_labels(loop: _jaxpr.Loop, labels: list[Label]) -> tuple[list[Label], list[Label]]:
    """Labels of the body's operands at rest, and of the results of a scan."""
    first, last = loop.num_constants, loop.num_constants + loop.num_carries
    over = runs_over_examples(labels[last:])
    depth = depth_of(labels)
    fixed, scanned = (
        labels[:first],
        [unstacked(label, depth, loop.length) for label in labels[last:]],
    )
    run = lambda carried: propagate_through(loop.body, fixed + carried + scanned)

    def step(carried: list[Label]) -> list[Label]:
        # What one pass leaves of its examples to the next is mixed with them.
        ends = run(carried)[: loop.num_carries]
        return [Mixed("scan") if _of_pass(x, depth) else x for x in ends] if over else ends

    carried = settle("scan", labels[first:last], step)
    results = [stacked(label, depth) for label in run(carried)[loop.num_carries :]]
    return fixed + carried + scanned, carried + results


def depth_of(labels: list[Label]) -> int:
    """A number for the passes of a loop that no label among its operands bears."""
    held = [h for x in labels if isinstance(x, Axis) for h in x.held]
    return 1 + max((h.depth for h in held if isinstance(h, Pass)), default=-1)


def _of_pass(label: Label, depth: int) -> bool:
    return isinstance(label, Axis) and any(h[0] == depth for h in label.held if isinstance(h, Pass))


def runs_over_examples(scanned: list[Label]) -> bool:
    """Whether a scan takes examples one by one, or in groups, from any of what it scans over."""
    return any(
        isinstance(label, Axis) and (label.dim == 0 or (label.slow and label.dim == 1))
        for label in scanned
    )


def stacked(label: Label, depth: int) -> Label:
    """The label of values stacked along a new leading dimension."""
    if not _of_pass(label, depth):
        return move(label, label.dim + 1) if isinstance(label, Axis) else label
    assert isinstance(label, Axis)
    last = label.held[-1]
    if not isinstance(last, Pass) or last.depth != depth or (label.outer, label.inner) != (1, 1):
        return Mixed("scan")
    whole = label._replace(held=label.held[:-1])
    if label.dim == -1:
        return whole._replace(dim=0)
    return Mixed("scan") if label.dim else whole._replace(dim=1, slow=last.length)


def unstacked(label: Label, depth: int, length: int) -> Label:
    """The label of one slice along the leading dimension."""
    if not isinstance(label, Axis) or label.dim == -1:
        return label
    inside = label._replace(held=(*label.held, Pass(depth, length)))
    if label.dim == 0:
        alone = label.outer == label.inner == 1
        return inside._replace(dim=-1) if alone else Mixed("scan")
    if label.slow:
        return inside._replace(dim=0, slow=0) if label.dim == 1 else move(label, label.dim - 1)
    return move(label, label.dim - 1)


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


def _barrier(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    return labels


register(
    "jit pjit closed_call core_call remat remat2 checkpoint composite custom_vmap_call",
    Rule(examples=_call, body=_jaxpr.call_body),
)
register("custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr", Rule(examples=_custom))
register("cond", Rule(examples=_cond, linearize=False))
register("while", Rule(examples=_while, linearize=False))
register("scan", Rule(examples=_scan, loops=True))
register("optimization_barrier", Rule(examples=_barrier, passes=True))

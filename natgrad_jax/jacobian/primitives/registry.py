"""The registry of primitives, and the one interpreter of labels that reads it.

A primitive says in one :class:`Rule` what it does with the example axis, with a view of a
parameter and with a linear use, and says nothing where it does not know. What nothing is said about
is unknown: examples that enter it count as mixed, a parameter that meets examples in it has dense
rows. Families of primitives register their rules in the other files of this folder.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Mixed
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.uses import Use
from natgrad_jax.jacobian.view import View

#: (equation, labels of operands, known integer values of operands) -> labels of results.
Examples = Callable[[Any, list[Label], list[Any]], list[Label]]


class Rule(NamedTuple):
    """What is known of a primitive; None where nothing is.

    Attributes:
      examples: where examples lie in its results; raises BlendError where it mixes them.
      view: (equation, view of the first operand, known values) -> views that the results are of
        the same parameter, or None.
      use: (equation, operands, position of the parameter, label of the result) -> the linear use
        of a parameter that meets examples; raises MisfitError.
      entrywise: whether entry i of the result depends on entry i of each operand alone, so that a
        parameter may be followed to where it enters, broadcast.
      scale: (equation, operands) -> the scalar multiple of a view that the result is, or None.
      join: equation -> how it joins whole arrays, (whether a dimension is new, the dimension).
      complex_parts: (a, b) where the result is a x + b y of its operands, so that it may be a
        complex array made of two real ones.
      origin: (equation, dimensions of the operand) -> for each dimension of the result the one
        that it was, -1 for new ones; None where entries are changed.
      fold: (equation, known values with masked entries) -> known values of the results.
      body: equation -> the program that it means, no more and no less.
      contracts: whether it is a sum of products, so that a parameter times a constant may be
        followed to where the product enters.
      linearize: whether the program of its derivative is of simpler equations than itself.
      loops: whether it is a scan.
      passes: whether each result is the operand of the same number.
      linear: whether it is linear in each operand, or in the first alone ("first").
      sums: whether it may sum over examples: (equation, labels) -> whether it does just that.
    """

    examples: Examples | None = None
    view: Callable[[Any, View, list[Any]], list[View] | None] | None = None
    use: Callable[[Any, list[Any], int, Axis], Use] | None = None
    entrywise: bool = False
    scale: Callable[[Any, list[Any]], View | None] | None = None
    join: Callable[[Any], tuple[bool, int]] | None = None
    complex_parts: tuple[complex, ...] = ()
    origin: Callable[[Any, tuple[int, ...]], tuple[int, ...] | None] | None = None
    fold: Callable[[Any, list[Any]], list[Any]] | None = None
    body: Callable[[Any], _jaxpr.Program] | None = None
    contracts: bool = False
    linearize: bool = True
    loops: bool = False
    passes: bool = False
    linear: bool | str = False
    sums: Callable[[Any, list[Label]], bool] | None = None


class BlendError(Exception):
    """Raised by a rule when an equation mixes examples."""


UNKNOWN = Rule()

#: Primitive name -> what is known of it.
RULES: dict[str, Rule] = {}


def register(names: str, rule: Rule) -> None:
    """Adds a rule for each of these names, once."""
    for name in names.split():
        if name in RULES:
            raise ValueError(f"the primitive {name!r} has a rule already")
        RULES[name] = rule


def rule_of(equation: Any) -> Rule:
    """What is known of an equation's primitive."""
    return RULES.get(_jaxpr.name(equation), UNKNOWN)


def require(condition: bool) -> None:
    """Mixes unless the condition holds."""
    if not condition:
        raise BlendError


def propagate(equation: Any, labels: list[Label], known: list[Any] | None = None) -> list[Label]:
    """The labels of an equation's results.

    Args:
      equation: the equation.
      labels: of its operands.
      known: integer operands whose values are known, as masked arrays; None for the others.

    Raises:
      UnreadableError: it works on mutable references.
    """
    _jaxpr.check_readable(equation)
    count, name = len(equation.outvars), _jaxpr.name(equation)
    present = [label for label in labels if label is not None]
    if not present:
        return [None] * count
    if any(isinstance(label, Axis) and label.dim == -1 for label in present):
        return [join(name, present)] * count  # all of one example: nothing can mix
    rule = rule_of(equation)
    try:
        if rule.examples is not None:
            return rule.examples(equation, labels, known or [None] * len(labels))
    except BlendError:
        pass
    return [_blended(equation, rule, labels, present)] * count


def _blended(equation: Any, rule: Rule, labels: list[Label], present: list[Label]) -> Mixed:
    """The label of mixed examples, which says where they are a sum over examples and no more."""
    mixed = [label for label in present if isinstance(label, Mixed)]
    if not mixed:
        own = Mixed(_jaxpr.name(equation))
        return own._replace(summed=rule.sums is not None and rule.sums(equation, labels))
    alone = len(present) == 1 and (rule.linear is True or labels[0] is not None)
    together = _jaxpr.name(equation) in ("add", "add_any", "sub") and len(present) == len(labels)
    stays = all(label.summed for label in mixed) and len(mixed) == len(present)
    return mixed[0]._replace(summed=stays and bool(rule.linear) and (alone or together))


def propagate_through(program: _jaxpr.Program, labels: list[Label]) -> list[Label]:
    """The labels of a program's outputs."""
    values: dict[Any, Label] = dict(zip(program.inputs, labels, strict=True))
    read = lambda v: None if _jaxpr.is_literal(v) else values.get(v)
    for equation in program.equations:
        results = propagate(equation, [read(v) for v in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in program.outputs]


def one(rule: Callable[[Any, list[Label]], Label]) -> Examples:
    """A rule for primitives whose results all have one label; operands must not be mixed."""

    def examples(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
        del known
        require(not any(isinstance(label, Mixed) for label in labels))
        return [rule(equation, labels)] * len(equation.outvars)

    return examples


def axis(labels: list[Label]) -> Axis:
    """The one label among operands that must agree on it, along a single dimension."""
    label = join("", labels)
    require(isinstance(label, Axis) and label.is_plain)
    return label  # type: ignore[return-value]


def over(key: str) -> Examples:
    """Works along the dimensions in a parameter, and leaves the others alone."""

    def rule(equation: Any, labels: list[Label]) -> Label:
        label, dims = axis(labels), _jaxpr.parameter(equation, key)
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        require(label.dim not in [int(d) % len(shape_of(equation, labels)) for d in dims])
        return label

    return one(rule)


def leading(trailing: int) -> Examples:
    """Works on the last dimensions of every operand, batched over the others."""

    def rule(equation: Any, labels: list[Label]) -> Label:
        label = axis(labels)
        for shape, own in zip(_jaxpr.shapes_in(equation), labels, strict=True):
            require(own is None or label.dim < len(shape) - trailing)
        return label

    return one(rule)


def shape_of(equation: Any, labels: list[Label]) -> tuple[int, ...]:
    """The shape of the first operand that holds examples."""
    return next(
        s for s, label in zip(_jaxpr.shapes_in(equation), labels, strict=True) if label is not None
    )

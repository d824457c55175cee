"""Finds every linear use of every parameter in a model, by evaluating its program once more.

A value is one of three things: the same for all examples and free of parameters; computed from
parameters alone, then a view of a parameter (or of an array derived from parameters); or dependent
on examples. Where the second meets the third, a parameter is used. A zero probe, one for each
example, is added to what leaves the use, so that its cotangent can be read off.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import capture_scan
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Mixed
from natgrad_jax.jacobian.primitives.registry import propagate
from natgrad_jax.jacobian.primitives.registry import rule_of
from natgrad_jax.jacobian.tape import Origin
from natgrad_jax.jacobian.tape import Tape
from natgrad_jax.jacobian.tape import Value
from natgrad_jax.jacobian.tape import arrays_of
from natgrad_jax.jacobian.tape import attach
from natgrad_jax.jacobian.uses import MisfitError

Tree = Any

_FOLDED = 2**16


def read(
    program: _jaxpr.Program,
    values: list[Value],
    tape: Tape,
    *,
    constants: Callable[[Any], Label] = lambda constant: None,
) -> list[Value]:
    """Evaluates a program on values; `constants` gives the labels of its constants."""
    env: dict[Any, Value] = {
        # As arrays: a rule of the user's may index what it was given by traced numbers.
        v: Value(_array(c), constants(c), known=_known(c))
        for v, c in program.constants
    }
    env.update(zip(program.inputs, values, strict=True))

    taken = collections.Counter(v for e in program.equations for v in e.invars if _variable(v))
    taken.update(v for v in program.outputs if _variable(v))

    def operand(atom: Any) -> Value:
        if _jaxpr.is_literal(atom):
            return Value(jnp.asarray(atom.val, atom.aval.dtype), known=_known(atom.val))
        value = env[atom]
        return value if taken[atom] == 1 else value._replace(origin=None)

    last = {v: i for i, e in enumerate(program.equations) for v in e.invars if _variable(v)}
    keep = {v for v in program.outputs if _variable(v)}
    for i, equation in enumerate(program.equations):
        results = _evaluate(equation, [operand(v) for v in equation.invars], tape)
        env.update(zip(equation.outvars, results, strict=True))
        for v in {v for v in equation.invars if _variable(v)}:
            if last[v] == i and v not in keep:
                del env[v]
    return [operand(v) for v in program.outputs]


def _array(constant: Any) -> Any:
    return jnp.asarray(constant) if isinstance(constant, np.ndarray | np.generic) else constant


def _variable(atom: Any) -> bool:
    return not _jaxpr.is_literal(atom)


def _known(value: Any) -> Any:
    """An integer or boolean constant, or any one number, as a masked array with nothing masked."""
    if isinstance(value, jax.core.Tracer):
        return None
    dtype, size = jnp.result_type(value), np.size(value)
    small = size <= _FOLDED if _is_integer(dtype) else size == 1
    return np.ma.asarray(np.asarray(value)) if small and _is_number(dtype) else None


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_


def _is_number(dtype: Any) -> bool:
    return _is_integer(dtype) or jnp.issubdtype(dtype, jnp.inexact)


def _evaluate(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    _jaxpr.check_readable(equation)
    rule = rule_of(equation)
    if rule.body is not None:
        return read(rule.body(equation), operands, tape)
    if all(v.view is None for v in operands):
        return _plain(equation, operands, tape)
    if rule.passes and len(operands) == len(equation.outvars):
        arrays = _jaxpr.bind(equation, *arrays_of(operands))
        return [v._replace(array=a) for v, a in zip(operands, arrays, strict=True)]
    if _ends(equation):
        return _plain(equation, [v._replace(view=None) for v in operands], tape)
    if all(v.label is None for v in operands):
        return _of_parameters(equation, operands, tape)
    return _joint(equation, operands, tape)


def _ends(equation: Any) -> bool:
    """Whether no result has a derivative by its operands: the one place where a trail ends."""
    return _jaxpr.name(equation) == "stop_gradient" or not any(
        _jaxpr.is_inexact(v) for v in equation.outvars
    )


def _plain(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    """An equation that no parameter enters."""
    labels = propagate(equation, [v.label for v in operands], [v.known for v in operands])
    if tape.guess is not None and labels == [None]:
        labels = [_guessed(equation, tape.guess)]
    folded = _folded(equation, operands)
    arrays = _jaxpr.bind(equation, *arrays_of(operands))
    origin = _moved_origin(equation, operands[0]) if len(operands) == 1 else None
    return [
        Value(a, label, None, known, origin)
        for a, label, known in zip(arrays, labels, folded, strict=True)
    ]


def _guessed(equation: Any, size: int) -> Label:
    """The label of a constant spread over a new dimension as large as the batch."""
    if _jaxpr.name(equation) != "broadcast_in_dim":
        return None
    kept = _jaxpr.parameter(equation, "broadcast_dimensions")
    (shape,) = _jaxpr.shapes_out(equation)
    new = [d for d, n in enumerate(shape) if n == size and d not in kept]
    return Axis(new[0]) if len(new) == 1 else None


def _folded(equation: Any, operands: list[Value]) -> list[Any]:
    """Integer results whose values are known, evaluated now."""
    none: list[Any] = [None] * len(equation.outvars)
    small = all(
        _is_integer(v.aval.dtype) and math.prod(v.aval.shape) <= _FOLDED for v in equation.outvars
    )
    if not small or equation.effects:
        return none
    known, fold = [v.known for v in operands], rule_of(equation).fold
    if fold is not None and any(k is not None for k in known):
        return fold(equation, known)
    if any(k is None or np.ma.is_masked(k) for k in known):
        return none
    with jax.ensure_compile_time_eval():
        pairs = zip(known, equation.invars, strict=True)
        values = [jnp.asarray(np.asarray(k), v.aval.dtype) for k, v in pairs]
        return [_known(x) for x in _jaxpr.bind(equation, *values)]


def _of_parameters(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    """An equation of parameters and what all examples share: a view stays one where it can."""
    arrays, rule = _jaxpr.bind(equation, *arrays_of(operands)), rule_of(equation)
    followed = None
    held = [v for v in operands if v.view is not None]
    if len(held) == 1 and rule.scale is not None:
        scaled = rule.scale(equation, operands)
        followed = None if scaled is None else [scaled]
    if len(held) == 1 and followed is None and rule.view is not None and held[0] is operands[0]:
        followed = rule.view(equation, held[0].view, [v.known for v in operands])
    if followed is not None:
        return [Value(a, None, view) for a, view in zip(arrays, followed, strict=True)]
    return [
        Value(a, None, tape.derive(operands, a, equation) if _jaxpr.is_inexact(v) else None)
        for a, v in zip(arrays, equation.outvars, strict=True)
    ]


def _joint(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    """An equation where parameters meet examples."""
    name, rule = _jaxpr.name(equation), rule_of(equation)
    if rule.loops:
        return capture_scan.scan(equation, operands, tape, read)
    labels = propagate(equation, [v.label for v in operands], [v.known for v in operands])
    held = [i for i, v in enumerate(operands) if v.view is not None]
    try:
        if any(isinstance(label, Mixed) for label in labels):
            raise MisfitError(f"meets examples in {name}")
        if any(isinstance(label, Axis) and label.slow for label in labels):
            raise MisfitError("meets examples that lie over two dimensions")
        if rule.use is not None and len(held) == 1:
            return _linear(equation, operands, held[0], labels[0], tape)
        if rule.entrywise or (rule.join is not None and not rule.join(equation)[0]):
            return _at_operands(equation, operands, held, labels[0], tape)
        return _linearized(equation, operands, held, labels, tape)
    except MisfitError as misfit:
        for i in held:
            tape.fail(operands[i].view, str(misfit))
    arrays = _jaxpr.bind(equation, *arrays_of(operands))
    return [Value(a, label) for a, label in zip(arrays, labels, strict=True)]


def _linear(equation: Any, operands: list[Value], at: int, label: Any, tape: Tape) -> list[Value]:
    make_use = rule_of(equation).use
    assert make_use is not None
    use = make_use(equation, operands, at, label)
    (result,) = _jaxpr.bind(equation, *arrays_of(operands))
    probed = tape.probe(use, operands[at].view, label, result)
    if operands[at].view.scale is not None:  # its cotangent is not that of what is added
        return [Value(probed, label)]
    origin = Origin(tape, len(tape.sites) - 1, tuple(range(result.ndim)))
    return [Value(probed, label, origin=origin)]


def _at_operands(
    equation: Any, operands: list[Value], held: list[int], label: Any, tape: Tape
) -> list[Value]:
    """Probes parameters where they enter, broadcast to the shape of the result."""
    name, (shape,) = _jaxpr.name(equation), _jaxpr.shapes_out(equation)
    entrywise, arrays = rule_of(equation).entrywise, arrays_of(operands)
    for i in held:
        view = operands[i].view
        assert view is not None
        if entrywise and arrays[i].shape != shape:
            padding = ((),) * (len(shape) - len(view.dims))
            view = view._replace(dims=padding + view.dims)
            arrays[i] = jnp.broadcast_to(arrays[i], shape)
        view, use = tape.operand_use(name, view, label, shape)
        arrays[i] = tape.probe(use, view, label, arrays[i])
        if name in ("add", "add_any") and view.scale is None and len(operands) == 2:
            _note_bias(tape, operands[1 - i])
    return [Value(a, label) for a in _jaxpr.bind(equation, *arrays)]


def _note_bias(tape: Tape, other: Value) -> None:
    """Marks the last site as what is added to the result of a linear use."""
    if other.origin is not None and other.origin.tape is tape:
        distance = len(tape.sites) - 1 - other.origin.number
        dims = other.origin.dims
        tape.sites[-1] = tape.sites[-1]._replace(bias_of=distance, bias_dims=dims)


def _moved_origin(equation: Any, value: Value) -> Origin | None:
    """The origin of the result of an equation that moves dimensions about, or casts."""
    origin, moved = value.origin, rule_of(equation).origin
    if origin is None or moved is None:
        return None
    dims = moved(equation, origin.dims)
    return None if dims is None else origin._replace(dims=dims)


def _linearized(
    equation: Any, operands: list[Value], held: list[int], labels: list[Label], tape: Tape
) -> list[Value]:
    """Reads parameters out of the derivative of an equation, which is linear in their tangents.

    With tangents zero it adds nothing but the probes within. It is the derivative that JAX takes:
    rules given by `custom_jvp` and `custom_vjp` count, not what they are rules of.
    """
    name = _jaxpr.name(equation)
    if tape.linearizing > 2 or not rule_of(equation).linearize:
        raise MisfitError(f"enters {name}")
    fixed = jax.lax.stop_gradient(arrays_of(operands))
    tangents = [jnp.zeros_like(operands[i].array) for i in held]
    floating = [i for i, v in enumerate(equation.outvars) if _jaxpr.is_inexact(v)]
    program = _jaxpr.pushforward(equation, held, floating, fixed)
    if program is None:
        raise MisfitError(f"enters {name}, which has no forward mode")
    inputs = [Value(t, None, operands[i].view) for t, i in zip(tangents, held, strict=True)]
    inputs += [Value(x, v.label, None, v.known) for x, v in zip(fixed, operands, strict=True)]
    tape.linearizing += 1
    try:
        moved = read(program, inputs, tape)
    finally:
        tape.linearizing -= 1
    arrays = _jaxpr.bind(equation, *arrays_of(operands))
    for i, change in zip(floating, moved, strict=True):
        if change.view is not None:
            label = labels[i]
            if not isinstance(label, Axis):
                raise MisfitError(f"one result of {name} holds no examples")
            change = attach(change, label, tape)
        if change.label is not None and change.label != labels[i]:
            raise MisfitError(f"enters {name}, whose derivative mixes examples")
        arrays[i] = arrays[i] + change.array
    return [Value(a, label) for a, label in zip(arrays, labels, strict=True)]

"""Finds every linear use of every parameter in a model, by evaluating its program once more.

A value is one of three things: the same for all examples and free of parameters; computed from
parameters alone, then a view of a parameter (or of an array derived from parameters); or dependent
on examples. Where the second meets the third, a parameter is used. A zero probe, one for each
example, is added to what leaves the use, so that its cotangent can be read off.
"""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import axis_rules
from natgrad_jax.jacobian import capture_scan
from natgrad_jax.jacobian import example_axis
from natgrad_jax.jacobian import uses
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.example_axis import OWN
from natgrad_jax.jacobian.example_axis import Label
from natgrad_jax.jacobian.example_axis import Mixed
from natgrad_jax.jacobian.tape import Origin
from natgrad_jax.jacobian.tape import Tape
from natgrad_jax.jacobian.tape import Value
from natgrad_jax.jacobian.tape import arrays_of
from natgrad_jax.jacobian.tape import attach
from natgrad_jax.jacobian.uses import MisfitError
from natgrad_jax.jacobian.view import View

Tree = Any

_FOLDED = 2**16


def read(
    program: _jaxpr.Program, values: list[Value], tape: Tape, *, share_constants: bool = True
) -> list[Value]:
    """Evaluates a program on values.

    Constants are what all examples share, or, where the batch is one piece, its own.
    """
    own = lambda c: None if share_constants or not np.ndim(c) else OWN
    env: dict[Any, Value] = {v: Value(c, own(c), known=_known(c)) for v, c in program.constants}
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


def _variable(atom: Any) -> bool:
    return not _jaxpr.is_literal(atom)


def _known(value: Any) -> Any:
    """An integer or boolean constant as a masked array without masked entries."""
    if isinstance(value, jax.core.Tracer) or np.size(value) > _FOLDED:
        return None
    if not _is_integer(jnp.result_type(value)):
        return None
    return np.ma.asarray(np.asarray(value))


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_


def _evaluate(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    body = _jaxpr.call_body(equation)
    if body is not None:
        return read(body, operands, tape)
    if all(v.view is None for v in operands):
        return _plain(equation, operands, tape)
    if not any(_floating(v) for v in equation.outvars) or _jaxpr.name(equation) == "stop_gradient":
        return _plain(equation, [v._replace(view=None) for v in operands], tape)
    if all(v.label is None for v in operands):
        return _of_parameters(equation, operands, tape)
    return _joint(equation, operands, tape)


def _floating(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _plain(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    """An equation that no parameter enters."""
    labels = example_axis.propagate(
        equation, [v.label for v in operands], [v.known for v in operands]
    )
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
    return example_axis.Axis(new[0]) if len(new) == 1 else None


def _folded(equation: Any, operands: list[Value]) -> list[Any]:
    """Integer results whose values are known, evaluated now."""
    none: list[Any] = [None] * len(equation.outvars)
    small = all(
        _is_integer(v.aval.dtype) and math.prod(v.aval.shape) <= _FOLDED for v in equation.outvars
    )
    if not small or equation.effects:
        return none
    known = [v.known for v in operands]
    if _jaxpr.name(equation) == "concatenate" and any(k is not None for k in known):
        pieces = [
            np.ma.masked_all(v.array.shape, int) if v.known is None else v.known for v in operands
        ]
        return [np.ma.concatenate(pieces, axis=_jaxpr.parameter(equation, "dimension"))]
    if any(k is None or np.ma.is_masked(k) for k in known):
        return none
    with jax.ensure_compile_time_eval():
        pairs = zip(known, equation.invars, strict=True)
        values = [jnp.asarray(np.asarray(k), v.aval.dtype) for k, v in pairs]
        return [_known(x) for x in _jaxpr.bind(equation, *values)]


def _of_parameters(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    """An equation of parameters and what all examples share: a view stays one where it can."""
    arrays = _jaxpr.bind(equation, *arrays_of(operands))
    followed = _scaled(equation, operands)
    if followed is None and operands[0].view is not None:
        others = [v.known for v in operands]
        if all(v.view is None for v in operands[1:]):
            followed = views.follow(equation, operands[0].view, others)
    if followed is not None:
        return [Value(a, None, view) for a, view in zip(arrays, followed, strict=True)]
    return [
        Value(a, None, tape.derive(operands, a, equation) if _floating(v) else None)
        for a, v in zip(arrays, equation.outvars, strict=True)
    ]


def _scaled(equation: Any, operands: list[Value]) -> list[View] | None:
    """The view that a scalar multiple of a view is."""
    name = _jaxpr.name(equation)
    if name == "neg":
        factor, view = jnp.asarray(-1.0, operands[0].array.dtype), operands[0].view
    elif name in ("mul", "div"):
        at = 0 if operands[0].view is not None else 1
        other = operands[1 - at]
        if other.view is not None or other.array.ndim or (name == "div" and at == 1):
            return None
        view, factor = operands[at].view, other.array
        factor = 1 / factor if name == "div" else factor
    else:
        return None
    assert view is not None
    scale = factor if view.scale is None else factor * view.scale.astype(factor.dtype)
    return [view._replace(scale=scale)]


def _joint(equation: Any, operands: list[Value], tape: Tape) -> list[Value]:
    """An equation where parameters meet examples."""
    name = _jaxpr.name(equation)
    if name == "scan":
        return capture_scan.scan(equation, operands, tape, read)
    labels = example_axis.propagate(
        equation, [v.label for v in operands], [v.known for v in operands]
    )
    held = [i for i, v in enumerate(operands) if v.view is not None]
    try:
        if any(isinstance(label, Mixed) for label in labels):
            raise MisfitError(f"meets examples in {name}")
        if name in uses.LINEAR and len(held) == 1:
            return _linear(equation, operands, held[0], labels[0], tape)
        if name in axis_rules.ELEMENTWISE or name == "concatenate":
            return _at_operands(equation, operands, held, labels[0], tape)
        return _linearized(equation, operands, held, labels, tape)
    except MisfitError as misfit:
        for i in held:
            tape.fail(operands[i].view, str(misfit))
    arrays = _jaxpr.bind(equation, *arrays_of(operands))
    return [Value(a, label) for a, label in zip(arrays, labels, strict=True)]


def _linear(equation: Any, operands: list[Value], at: int, label: Any, tape: Tape) -> list[Value]:
    use = uses.LINEAR[_jaxpr.name(equation)](equation, operands, at, label)
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
    arrays = arrays_of(operands)
    for i in held:
        view = operands[i].view
        assert view is not None
        if name != "concatenate" and arrays[i].shape != shape:
            padding = ((),) * (len(shape) - len(view.dims))
            view = view._replace(dims=padding + view.dims)
            arrays[i] = jnp.broadcast_to(arrays[i], shape)
        use = uses.operand(name, view, label)
        arrays[i] = tape.probe(use, view, label, arrays[i])
        if name in ("add", "add_any") and view.scale is None:
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
    origin, name = value.origin, _jaxpr.name(equation)
    if origin is None or len(equation.outvars) != 1:
        return None
    (shape,) = _jaxpr.shapes_out(equation)
    if name == "convert_element_type":
        return origin
    if name == "transpose":
        order = _jaxpr.parameter(equation, "permutation")
        return origin._replace(dims=tuple(origin.dims[d] for d in order))
    before = [d for d, n in enumerate(value.array.shape) if n != 1]
    after = [d for d, n in enumerate(shape) if n != 1]
    same = [value.array.shape[d] for d in before] == [shape[d] for d in after]
    if name not in ("reshape", "squeeze", "expand_dims") or not same:
        return None
    place = dict(zip(after, before, strict=True))
    dims = tuple(origin.dims[place[d]] if d in place else -1 for d in range(len(shape)))
    return origin._replace(dims=dims)


def _linearized(
    equation: Any, operands: list[Value], held: list[int], labels: list[Label], tape: Tape
) -> list[Value]:
    """Reads parameters out of the derivative of an equation, which is linear in their tangents.

    With tangents zero it adds nothing but the probes within. It is the derivative that JAX takes:
    rules given by `custom_jvp` and `custom_vjp` count, not what they are rules of.
    """
    name = _jaxpr.name(equation)
    if tape.linearizing > 2 or name in ("cond", "while"):
        raise MisfitError(f"enters {name}")
    fixed = jax.lax.stop_gradient(arrays_of(operands))
    tangents = [jnp.zeros_like(operands[i].array) for i in held]
    floating = [i for i, v in enumerate(equation.outvars) if _floating(v)]

    def derivative(tangents: list[jax.Array], fixed: list[jax.Array]) -> list[jax.Array]:
        def call(moved: list[jax.Array]) -> list[jax.Array]:
            arrays = list(fixed)
            for i, x in zip(held, moved, strict=True):
                arrays[i] = x
            results = _jaxpr.bind(equation, *arrays)
            return [results[i] for i in floating]

        at = [fixed[i] for i in held]
        if not name.startswith("custom_vjp"):
            return jax.jvp(call, (at,), (tangents,))[1]
        results, pull = jax.vjp(call, at)
        return jax.linear_transpose(pull, results)((tangents,))

    program, _ = _jaxpr.trace(derivative, tangents, fixed)
    inputs = [Value(t, None, operands[i].view) for t, i in zip(tangents, held, strict=True)]
    inputs += [Value(x, v.label, None, v.known) for x, v in zip(fixed, operands, strict=True)]
    tape.linearizing += 1
    moved = read(program, inputs, tape)
    tape.linearizing -= 1
    arrays = _jaxpr.bind(equation, *arrays_of(operands))
    for i, change in zip(floating, moved, strict=True):
        if change.view is not None:
            change = attach(change, labels[i], tape)  # type: ignore[arg-type]
        if change.label is not None and change.label != labels[i]:
            raise MisfitError(f"enters {name}, whose derivative mixes examples")
        arrays[i] = arrays[i] + change.array
    return [Value(a, label) for a, label in zip(arrays, labels, strict=True)]

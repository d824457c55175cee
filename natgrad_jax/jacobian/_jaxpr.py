"""The one file that reads jaxprs. It asks for features, not versions.

Everything else sees a :class:`Program`: inputs, constants, live equations and outputs. What JAX
keeps inside an equation is asked for by name. A name that is missing raises
:class:`UnreadableError`: rows then become dense, with a warning that names the primitive.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

Tree = Any


class UnreadableError(Exception):
    """An equation whose form this reader does not know."""

    def __init__(self, primitive: str, what: str) -> None:
        super().__init__(f"the primitive {primitive!r} {what}")
        self.primitive = primitive


class Program(NamedTuple):
    """A jaxpr with its constants and without the equations that no output needs.

    Attributes:
      inputs: variables.
      constants: pairs (variable, value).
      equations: in order of evaluation.
      outputs: variables or literals.
    """

    inputs: list[Any]
    constants: list[tuple[Any, Any]]
    equations: list[Any]
    outputs: list[Any]


class Loop(NamedTuple):
    """A `scan`: operands are constants, then carries, then arrays that are scanned over."""

    body: Program
    num_constants: int
    num_carries: int
    length: int
    reverse: bool


#: Effects that no result depends on.
_HARMLESS = {"debug_callback", "debug_print"}
#: Calls that mean nothing but their body.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
#: Calls whose derivative is not that of their body.
CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def trace(function: Callable[..., Tree], *args: Tree) -> tuple[Program, Tree]:
    """The program of a function at these arguments, and the shapes of what it returns."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return program(closed), shapes


def program(jaxpr: Any) -> Program:
    """Reads a jaxpr, open or closed."""
    constants = list(getattr(jaxpr, "consts", ()))
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # since jax 0.11 a closed jaxpr is its own `jaxpr`
    needed = {v for v in inner.outvars if not is_literal(v)}
    live: list[Any] = []
    for equation in reversed(inner.eqns):
        if equation.effects or any(v in needed for v in equation.outvars):
            live.append(equation)
            needed.update(v for v in equation.invars if not is_literal(v))
    pairs = list(zip(inner.constvars, constants, strict=True))
    return Program(list(inner.invars), pairs, live[::-1], list(inner.outvars))


def is_literal(atom: Any) -> bool:
    """Whether an operand is a constant written into the equation."""
    return isinstance(atom, core.Literal)


def name(equation: Any) -> str:
    """The name of an equation's primitive."""
    return equation.primitive.name


def parameter(equation: Any, key: str) -> Any:
    """A parameter of an equation; UnreadableError where it has another name today."""
    if key not in equation.params:
        raise UnreadableError(name(equation), f"has no parameter {key!r} in this version of JAX")
    return equation.params[key]


def shapes_in(equation: Any) -> list[tuple[int, ...]]:
    """Shapes of the operands."""
    return [tuple(v.aval.shape) for v in equation.invars]


def shapes_out(equation: Any) -> list[tuple[int, ...]]:
    """Shapes of the results."""
    return [tuple(v.aval.shape) for v in equation.outvars]


def rank(atom: Any) -> int:
    """The number of dimensions of a variable or literal."""
    return len(atom.aval.shape)


def call_body(equation: Any) -> Program:
    """The body of a call that means nothing but its body."""
    key = next((k for k in ("call_jaxpr", "call") if k in equation.params), "jaxpr")
    return program(parameter(equation, key))


def linear_solve_parts(equation: Any) -> tuple[list[int], list[Program | None]]:
    """Of a `custom_linear_solve` the programs of its operator, its transpose, and their solvers.

    Returns:
      For each the number of its constants, which the operands begin with, and its program.
    """
    lengths, jaxprs = parameter(equation, "const_lengths"), parameter(equation, "jaxprs")
    return list(lengths), [None if x is None else program(x) for x in jaxprs]


def is_inexact(variable: Any) -> bool:
    """Whether a variable holds real or complex floating point numbers: it has a derivative."""
    return jnp.issubdtype(getattr(variable.aval, "dtype", None), jnp.inexact)


def check_readable(equation: Any) -> None:
    """Raises UnreadableError where an equation works on mutable references.

    What is written to a mutable reference is read again where no operand shows it.
    """
    variables = (*equation.invars, *equation.outvars)
    reference = any(hasattr(v.aval, "inner_aval") for v in variables)
    hidden = equation.effects and not inner_programs(equation) and name(equation) not in _HARMLESS
    if reference or hidden:
        raise UnreadableError(name(equation), "works on mutable references")


def pushforward(
    equation: Any, moving: list[int], results: list[int], operands: list[Any]
) -> Program | None:
    """The derivative that JAX takes of an equation, forwards: (tangents, operands) -> tangents.

    Rules given by `custom_jvp` and `custom_vjp` count, not what they are rules of. Without forward
    mode it is the transpose of the backward pass.

    Args:
      equation: the equation.
      moving: operands that have tangents.
      results: results whose tangents are wanted.
      operands: arrays, or their shapes.

    Returns:
      The program, or None where the derivative has no such form.
    """

    def tangents_of(tangents: list[jax.Array], operands: list[jax.Array]) -> list[jax.Array]:
        call, at = _function_of(equation, moving, results, operands)
        if not name(equation).startswith("custom_vjp"):
            return jax.jvp(call, (at,), (tangents,))[1]
        values, pull = jax.vjp(call, at)
        return jax.linear_transpose(pull, values)((tangents,))

    return _attempt(tangents_of, [operands[i] for i in moving], operands)


def pullback(
    equation: Any, moving: list[int], results: list[int], operands: list[Any]
) -> Program | None:
    """The derivative backwards: (cotangents of results, operands) -> cotangents of operands."""

    def cotangents_of(cotangents: list[jax.Array], operands: list[jax.Array]) -> list[jax.Array]:
        return jax.vjp(*_function_of(equation, moving, results, operands))[1](cotangents)[0]

    ends = [equation.outvars[i].aval for i in results]
    return _attempt(cotangents_of, [shaped(x) for x in ends], operands)


def differentiable(
    equation: Any, moving: list[int], results: list[int], operands: list[Any]
) -> list[int]:
    """The operands of a `custom_vjp` by which JAX has a derivative: not those that it closes over.

    They are found once for each call: a derivative that is refused empties what JAX keeps of others
    that it has traced ("Store empty").
    """
    call = parameter(equation, "out_trees")
    if call not in _DIFFERENTIABLE:
        refused = pullback(equation, moving, results, operands) is None
        kept = lambda i: not (refused and _is_closed_over(equation, i, results, operands))
        _DIFFERENTIABLE[call] = [i for i in moving if kept(i)]
    return _DIFFERENTIABLE[call]


#: What `differentiable` found, while the call is alive.
_DIFFERENTIABLE: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()


def _is_closed_over(equation: Any, at: int, results: list[int], operands: list[Any]) -> bool:
    pull = lambda own: jax.vjp(*_function_of(equation, [at], results, own))
    try:
        jax.eval_shape(lambda own: pull(own)[0], operands)
    except Exception as trouble:  # a derivative rule of the user's may raise anything
        return "closed-over value" in str(trouble)
    return False


def _function_of(
    equation: Any, moving: list[int], results: list[int], operands: list[jax.Array]
) -> tuple[Callable[[list[jax.Array]], list[jax.Array]], list[jax.Array]]:
    """An equation as a function of some operands, and these."""

    def call(own: list[jax.Array]) -> list[jax.Array]:
        full = list(operands)
        for i, x in zip(moving, own, strict=True):
            full[i] = x
        values = bind(equation, *full)
        return [values[i] for i in results]

    return call, [operands[i] for i in moving]


def shaped(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array or of what stands for one."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _attempt(function: Callable[..., Tree], *args: Tree) -> Program | None:
    try:
        return trace(function, *args)[0]
    except Exception:  # a derivative rule of the user's may raise anything
        return None


def custom_body(equation: Any) -> Program:
    """What a call with its own derivative computes."""
    return program(parameter(equation, CUSTOM[name(equation)]))


def branches(equation: Any) -> list[Program]:
    """The branches of a `cond`."""
    return [program(branch) for branch in parameter(equation, "branches")]


def loop(equation: Any) -> Loop:
    """Reads a `scan`."""
    if "ft_in" in equation.params:  # since jax 0.11
        constants, carries, _ = equation.params["ft_in"].unpack()
        counts = len(constants), len(carries)
    else:
        counts = parameter(equation, "num_consts"), parameter(equation, "num_carry")
    body = program(parameter(equation, "jaxpr"))
    length, reverse = parameter(equation, "length"), parameter(equation, "reverse")
    return Loop(body, *counts, length, reverse)


def hoisted(this: Loop) -> tuple[Program, Loop]:
    """Takes out of a scan what does not change from pass to pass.

    Returns:
      A program of the loop's constants, and the loop whose body has its outputs as further
      constants.
    """
    body, first = this.body, this.num_constants
    still = set(body.inputs[:first]) | {v for v, _ in body.constants}
    out: list[Any] = []
    for equation in body.equations:
        operands = [v for v in equation.invars if not is_literal(v)]
        if operands and not equation.effects and all(v in still for v in operands):
            out.append(equation)
            still.update(equation.outvars)
    taken = {id(equation) for equation in out}
    rest = [equation for equation in body.equations if id(equation) not in taken]
    used = {v for e in rest for v in e.invars if not is_literal(v)}
    used.update(v for v in body.outputs if not is_literal(v))
    results = [v for equation in out for v in equation.outvars if v in used]
    fixed = Program(body.inputs[:first], body.constants, out, results)
    inputs = [*body.inputs[:first], *results, *body.inputs[first:]]
    moved = this._replace(
        body=Program(inputs, body.constants, rest, body.outputs),
        num_constants=first + len(results),
    )
    return fixed, moved


def while_parts(equation: Any) -> tuple[Program, int, Program, int]:
    """Condition and body of a `while`, each with its number of constants."""
    return (
        program(parameter(equation, "cond_jaxpr")),
        parameter(equation, "cond_nconsts"),
        program(parameter(equation, "body_jaxpr")),
        parameter(equation, "body_nconsts"),
    )


def bind(equation: Any, *operands: jax.Array) -> list[jax.Array]:
    """Evaluates an equation at other operands."""
    bound = equation.primitive.get_bind_params(equation.params)
    # A dict since jax 0.9.2, functions apart from parameters before.
    functions, params = ((), bound) if isinstance(bound, dict) else bound
    results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def inner_programs(equation: Any) -> list[Program]:
    """Every program among an equation's parameters."""
    return [body for value in equation.params.values() for body in inner_programs_of(value)]


def inner_programs_of(value: Any) -> list[Program]:
    """The programs that one parameter of an equation holds."""
    candidates = value if isinstance(value, tuple | list) else [value]
    return [program(c) for c in candidates if hasattr(c, "eqns")]


def rounding_unit(function: Callable[..., Tree], *args: Tree) -> float:
    """That of the coarsest floating point type among all values of a function, at any depth."""
    return _coarsest(trace(function, *args)[0])


def _coarsest(this: Program) -> float:
    variables = [*this.inputs, *(v for equation in this.equations for v in equation.outvars)]
    own = [float(jnp.finfo(v.aval.dtype).eps) for v in variables if is_inexact(v)]
    inner = [_coarsest(body) for equation in this.equations for body in inner_programs(equation)]
    return max([*own, *inner], default=0.0)


def unused_inputs(function: Callable[..., Tree], *args: Tree) -> list[int]:
    """Leaves of the arguments, by their number, that no result of a function depends on.

    In calls by name it looks; whatever else takes a leaf counts as using it, `stop_gradient` too.
    """
    this, _ = trace(function, *args)
    used = _used_inputs(this, [True] * len(this.outputs))
    return [i for i, flag in enumerate(used) if not flag]


def _used_inputs(this: Program, wanted: list[bool]) -> list[bool]:
    needed = {v for v, w in zip(this.outputs, wanted, strict=True) if w and not is_literal(v)}
    for equation in reversed(this.equations):
        results = [v in needed for v in equation.outvars]
        if equation.effects or any(results):
            flags = _used_operands(equation, results)
            pairs = zip(equation.invars, flags, strict=True)
            needed.update(v for v, flag in pairs if flag and not is_literal(v))
    return [v in needed for v in this.inputs]


def _used_operands(equation: Any, results: list[bool]) -> list[bool]:
    everything = [True] * len(equation.invars)
    if equation.effects or name(equation) not in _CALLS:
        return everything
    body = call_body(equation)
    fits = len(body.inputs) == len(everything) and len(body.outputs) == len(results)
    return _used_inputs(body, results) if fits else everything


def has_forward_mode(function: Callable[..., Tree], *args: Tree) -> bool:
    """Whether a function has no `custom_vjp` and no mutable reference at any depth.

    With these it passes `jvp` and `linearize`; what they give fails only where it is compiled, or
    transposed.
    """
    return not _resists(trace(function, *args)[0])


def _resists(this: Program) -> bool:
    return any(
        name(equation).startswith("custom_vjp")
        or any(hasattr(v.aval, "inner_aval") for v in (*equation.invars, *equation.outvars))
        or any(map(_resists, inner_programs(equation)))
        for equation in this.equations
    )

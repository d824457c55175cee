"""Reads a model once at a batch: which parameters factor, how, and whether examples mix."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import capture
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.labels import OWN
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Mixed
from natgrad_jax.jacobian.tape import Site
from natgrad_jax.jacobian.tape import Survey
from natgrad_jax.jacobian.tape import Tape
from natgrad_jax.jacobian.tape import Value
from natgrad_jax.jacobian.tape import attach
from natgrad_jax.jacobian.uses import PER_EXAMPLE
from natgrad_jax.jacobian.uses import MisfitError

Tree = Any
#: (parameter leaves, batch leaves) -> output leaves
Flat = Callable[[list[jax.Array], list[jax.Array]], list[jax.Array]]


class ExamplesMixError(Exception):
    """The reader cannot show that examples are independent; its message says where."""


class Reading(NamedTuple):
    """A model's program at a batch, and what was found in it.

    Attributes:
      program: of (parameter leaves, batch leaves) -> output leaves.
      labels: where examples lie in each batch leaf.
      outputs: the label that each output leaf must have.
      opaque: for each parameter leaf that does not factor, why.
      sites: the uses of the others.
      sources: the parameter leaves behind every root.
      derived: roots in `sites` that are computed from parameters, and their shapes.
      leaves: shapes of the parameter leaves.
      joined: roots that join whole parameters, used by nothing else: their factors need no rows.
      guess: the size of the batch where constants of that size are taken for examples'.
      spread: constants with one dimension of this size hold something for each example.
    """

    program: _jaxpr.Program
    labels: list[Label]
    outputs: list[Axis]
    opaque: dict[int, str]
    sites: list[Site]
    sources: dict[int, frozenset[int]]
    derived: dict[int, jax.ShapeDtypeStruct]
    leaves: list[Any]
    joined: dict[int, Joined] = {}  # noqa: RUF012  # a NamedTuple's default, never written to
    guess: int | None = None
    spread: int | None = None


def read(
    function: Flat,
    params: list[Any],
    batch: list[Any],
    labels: list[Label],
    outputs: list[Axis],
    spread: int | None = None,
) -> Reading:
    """Reads a model; the arguments are the fields of :class:`Reading`.

    Raises:
      ExamplesMixError: an output depends on several examples, or may.
      UnreadableError: an equation has a form that the reader does not know.
    """
    program, _ = _jaxpr.trace(function, params, batch)
    plain = Reading(program, labels, outputs, {}, [], {}, {}, params, spread=spread)
    reading = _settled(plain, params, batch)
    if PER_EXAMPLE not in reading.opaque.values():
        return reading
    along = [label.dim if isinstance(label, Axis) and label.dim >= 0 else None for label in labels]
    sizes = {x.shape[d] for x, d in zip(batch, along, strict=True) if d is not None}
    if len(sizes) != 1:
        return reading
    try:
        other = _settled(plain._replace(guess=sizes.pop()), params, batch)
    except ExamplesMixError:
        return reading
    return other if len(other.opaque) < len(reading.opaque) else reading


def unread(params: list[Any], reason: str) -> Reading:
    """The reading of a model that cannot be read: all of it is dense."""
    nothing = _jaxpr.Program([], [], [], [])
    return Reading(nothing, [], [], dict.fromkeys(range(len(params)), reason), [], {}, {}, params)


def _settled(reading: Reading, params: list[Any], batch: list[Any]) -> Reading:
    """Gives up on parameters until all that is left factors."""
    while True:
        tape = _survey(reading, params, batch)
        if not set(tape.failed) - set(reading.opaque):
            break
        reading = reading._replace(opaque=reading.opaque | tape.failed)
    derived = {
        s.view.root: tape.derived[s.view.root] for s in tape.sites if s.view.root in tape.derived
    }
    joined = _exclusive(tape)
    return reading._replace(
        sites=tape.sites,
        sources=tape.sources,
        derived={root: shape for root, shape in derived.items() if root not in joined},
        joined=joined,
    )


def apart(reading: Reading) -> Reading:
    """The reading with joined roots as any other array derived from parameters."""
    shapes = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in reading.leaves]
    derived = {root: jax.eval_shape(joint.gather, shapes) for root, joint in reading.joined.items()}
    return reading._replace(derived=reading.derived | derived, joined={})


def _exclusive(tape: Survey) -> dict[int, Joined]:
    """The joined roots whose parameters are used through them alone."""
    used: dict[int, set[int]] = {}
    for site in tape.sites:
        for leaf in tape.sources[site.view.root]:
            used.setdefault(leaf, set()).add(site.view.root)
    roots = {site.view.root for site in tape.sites}
    return {
        root: joined
        for root, joined in tape.joined.items()
        if root in roots and all(used[view.root] == {root} for view in joined.views)
    }


def _survey(reading: Reading, params: list[Any], batch: list[Any]) -> Survey:
    found = []

    def run(params: list[jax.Array], batch: list[jax.Array]) -> list[jax.Array]:
        tape = _tape(reading, None)
        results = _run(reading, tape, params, batch)
        found.append(tape.summary())
        return results

    jax.eval_shape(run, params, batch)
    return found[0]


def _tape(reading: Reading, probes: list[jax.Array] | None) -> Tape:
    shapes = {i: leaf.shape for i, leaf in enumerate(reading.leaves)}
    return Tape(shapes, frozenset(reading.opaque), probes, guess=reading.guess)


def _run(reading: Reading, tape: Tape, params: list[Any], batch: list[Any]) -> list[jax.Array]:
    values = [
        Value(p, None, None if i in reading.opaque else views.whole(i, p.shape))
        for i, p in enumerate(params)
    ]
    values += [Value(x, label) for x, label in zip(batch, reading.labels, strict=True)]
    constants = functools.partial(_label_of_constant, reading)
    results = capture.read(reading.program, values, tape, constants=constants)
    arrays = []
    for value, label in zip(results, reading.outputs, strict=True):
        if isinstance(value.label, Mixed):
            raise ExamplesMixError(f"the primitive {value.label.primitive!r} may mix examples")
        if value.label is not None and value.label != label:
            raise ExamplesMixError("examples do not lie along the leading axis of the outputs")
        if value.view is not None:
            try:
                value = attach(value, label, tape)
            except MisfitError as misfit:
                tape.fail(value.view, str(misfit))
        arrays.append(value.array)
    return arrays


def _label_of_constant(reading: Reading, constant: Any) -> Label:
    """Constants are what all examples share; of a batch that is one piece they are its own."""
    if any(label == OWN for label in reading.outputs):
        return OWN if jnp.ndim(constant) else None
    dim = None if reading.spread is None else dimension_of(constant, reading.spread)
    return None if dim is None else Axis(dim)


def dimension_of(x: Any, size: int) -> int | None:
    """The only dimension of this size, or None."""
    dims = [d for d, n in enumerate(jnp.shape(x)) if n == size]
    return dims[0] if len(dims) == 1 else None


def pull_back(
    reading: Reading, params: list[jax.Array], batch: list[jax.Array]
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[jax.Array]], list[Any]]:
    """Outputs, the map from their cotangents to those of every site, and what enters the sites."""

    def evaluate(probes: list[jax.Array]) -> tuple[list[jax.Array], list[Any]]:
        tape = _tape(reading, probes)
        return _run(reading, tape, params, batch), tape.records

    probes = [jnp.zeros(site.shape, site.dtype) for site in reading.sites]
    outputs, pull, records = jax.vjp(evaluate, probes, has_aux=True)
    return outputs, lambda cotangents: pull(cotangents)[0], records


def derived_arrays(
    reading: Reading, params: list[jax.Array], batch: list[jax.Array]
) -> list[jax.Array]:
    """The arrays derived from parameters that sites use, in the order of `reading.derived`."""
    tape = _tape(reading, None)
    _run(reading, tape, params, batch)
    return [tape.derived[root] for root in reading.derived]


def warn(caller: str, reason: str) -> None:
    """The one warning of a model whose rows cannot be taken example by example."""
    warnings.warn(
        f"{caller}: cannot show that examples are independent: {reason}. Rows come from the"
        " whole batch, one backward pass for each: exact, and expensive (see `explain`). If output"
        " row n depends on example n alone, claim it with `independent=True` at the metric.",
        stacklevel=2,
    )

"""Reads a model once at a batch: which parameters factor, how, and whether examples mix."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import capture
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.example_axis import OWN
from natgrad_jax.jacobian.example_axis import Axis
from natgrad_jax.jacobian.example_axis import Label
from natgrad_jax.jacobian.example_axis import Mixed
from natgrad_jax.jacobian.tape import Site
from natgrad_jax.jacobian.tape import Tape
from natgrad_jax.jacobian.tape import Value
from natgrad_jax.jacobian.tape import attach
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
      derived: roots in `sites` that are computed from parameters.
      leaves: shapes of the parameter leaves.
    """

    program: _jaxpr.Program
    labels: list[Label]
    outputs: list[Axis]
    opaque: dict[int, str]
    sites: list[Site]
    sources: dict[int, frozenset[int]]
    derived: dict[int, tuple[int, ...]]
    leaves: list[Any]


def read(
    function: Flat, params: list[Any], batch: list[Any], labels: list[Label], outputs: list[Axis]
) -> Reading:
    """Reads a model.

    Raises:
      ExamplesMixError: an output depends on several examples, or may.
      UnreadableError: an equation has a form that the reader does not know.
    """
    program, _ = _jaxpr.trace(function, params, batch)
    opaque: dict[int, str] = {}
    while True:
        reading = Reading(program, labels, outputs, opaque, [], {}, {}, params)
        tape = _survey(reading, params, batch)
        if not set(tape.failed) - set(opaque):
            break
        opaque = opaque | tape.failed
    derived = {
        s.view.root: tape.derived[s.view.root].shape
        for s in tape.sites
        if s.view.root in tape.derived
    }
    return reading._replace(sites=tape.sites, sources=tape.sources, derived=derived)


def _survey(reading: Reading, params: list[Any], batch: list[Any]) -> Tape:
    tape = _tape(reading, None)
    jax.eval_shape(lambda p, b: _run(reading, tape, p, b), params, batch)
    return tape


def _tape(reading: Reading, probes: list[jax.Array] | None) -> Tape:
    return Tape(len(reading.leaves), frozenset(reading.opaque), probes)


def _run(reading: Reading, tape: Tape, params: list[Any], batch: list[Any]) -> list[jax.Array]:
    values = [
        Value(p, None, None if i in reading.opaque else views.whole(i, p.shape))
        for i, p in enumerate(params)
    ]
    values += [Value(x, label) for x, label in zip(batch, reading.labels, strict=True)]
    whole = any(label == OWN for label in reading.outputs)
    results = capture.read(reading.program, values, tape, share_constants=not whole)
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
        f"{caller}: cannot show that examples are independent: {reason}. Rows are taken from the"
        " whole batch, one backward pass for each: exact, and expensive (see `explain`). If output"
        " row n depends on example n alone, vouch for it with `independent=True` at the metric.",
        stacklevel=2,
    )

"""Uses of parameters within `scan`: probes are scanned over, what enters is stacked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Pass
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.primitives import control_flow
from natgrad_jax.jacobian.tape import EXAMPLES
from natgrad_jax.jacobian.tape import PARAMETER
from natgrad_jax.jacobian.tape import POSITIONS
from natgrad_jax.jacobian.tape import Survey
from natgrad_jax.jacobian.tape import Tape
from natgrad_jax.jacobian.tape import Value
from natgrad_jax.jacobian.tape import arrays_of
from natgrad_jax.jacobian.tape import attach
from natgrad_jax.jacobian.uses import PER_EXAMPLE
from natgrad_jax.jacobian.uses import MisfitError
from natgrad_jax.jacobian.view import View

#: Scans whose body cannot be read as it stands are written out up to this length.
MAX_UNROLLED = 64


#: (program, values, tape) -> values: evaluates a program, writing uses on the tape.
Read = Callable[[_jaxpr.Program, list[Value], Tape], list[Value]]


def scan(equation: Any, operands: list[Value], tape: Tape, read: Read) -> list[Value]:
    """A scan over a body that uses parameters: sites of all its passes, stacked."""
    loop = _Scan(_jaxpr.loop(equation), operands, tape, read)
    found = loop.survey()
    failed = set(found.failed) - set(tape.failed)
    if failed and 0 < loop.parts.length <= MAX_UNROLLED and not loop.over_examples:
        return loop.unrolled()
    return loop.run(found)


class _Scan:
    """One scan equation at its operands."""

    def __init__(self, parts: _jaxpr.Loop, operands: list[Value], tape: Tape, read: Read) -> None:
        fixed, parts = _jaxpr.hoisted(parts)
        constants = operands[: parts.num_constants - len(fixed.outputs)]
        moved = read(fixed, constants, tape)
        operands = [*constants, *moved, *operands[len(constants) :]]
        self.parts, self.tape, self.read = parts, tape, read
        first, last = parts.num_constants, parts.num_constants + parts.num_carries
        outputs = parts.body.outputs
        # What a body carries unchanged is a constant.
        self.still = [parts.body.inputs[first + k] is outputs[k] for k in range(parts.num_carries)]
        labels, _ = control_flow.scan_labels(parts, [v.label for v in operands])
        self.constants, self.scanned = operands[:first], operands[last:]
        self.rest, self.slices = labels[first:last], labels[last:]
        self.over_examples = control_flow.runs_over_examples([v.label for v in self.scanned])
        # The passes of this loop, as labels name them.
        self.depth = control_flow.depth_of([v.label for v in operands])
        self.carries = [
            v if still or v.view is None else self._entering(v, label)
            for v, still, label in zip(operands[first:last], self.still, self.rest, strict=True)
        ]

    def _entering(self, value: Value, label: Label) -> Value:
        """A carry that starts as a function of parameters alone."""
        try:
            if not isinstance(label, Axis):
                raise MisfitError("carried through a scan")
            return attach(value, label, self.tape)
        except MisfitError as misfit:
            self.tape.fail(value.view, str(misfit))
            return value._replace(view=None)

    def _moving(self) -> list[int]:
        return [k for k, still in enumerate(self.still) if not still]

    def body(self, tape: Tape, carried: list[jax.Array], slices: list[jax.Array]) -> list[Value]:
        """One pass; `carried` are the carries that move."""
        moving = dict(zip(self._moving(), carried, strict=True))
        carries = [
            Value(moving[k], self.rest[k]) if k in moving else v for k, v in enumerate(self.carries)
        ]
        scanned = [
            Value(x, label, self._scanned_view(v, tape))
            for x, v, label in zip(slices, self.scanned, self.slices, strict=True)
        ]
        results = self.read(self.parts.body, [*self.constants, *carries, *scanned], tape)
        return [
            self._leaving(v, k, tape) if v.view is not None and not self._is_still(k) else v
            for k, v in enumerate(results)
        ]

    def _scanned_view(self, value: Value, tape: Tape) -> View | None:
        if value.view is None:
            return None
        if self.over_examples:
            tape.fail(value.view, PER_EXAMPLE)
            return None
        return views.scanned_over(value.view, tape.depth)

    def _is_still(self, k: int) -> bool:
        return k < len(self.still) and self.still[k]

    def _leaving(self, value: Value, k: int, tape: Tape) -> Value:
        """A result of the body that is a function of parameters alone."""
        label = self.rest[k] if k < len(self.rest) else None
        try:
            if not isinstance(label, Axis):
                raise MisfitError("leaves a scan")
            return attach(value, label, tape)
        except MisfitError as misfit:
            tape.fail(value.view, str(misfit))
            return value._replace(view=None)

    def survey(self) -> Survey:
        """The sites of one pass."""
        found: list[Survey] = []

        def run(carried: list[jax.Array], slices: list[jax.Array]) -> list[jax.Array]:
            tape = self.tape.child(None)
            results = self.body(tape, carried, slices)
            found.append(tape.summary())
            return arrays_of(results)

        shapes = [jax.ShapeDtypeStruct(v.array.shape[1:], v.array.dtype) for v in self.scanned]
        start = [self.carries[k].array for k in self._moving()]
        jax.eval_shape(run, start, shapes)
        return found[0]

    def run(self, found: Survey) -> list[Value]:
        """Evaluates the scan, probes scanned over with everything else."""
        length, outer = self.parts.length, self.tape
        outer.failed.update({k: v for k, v in found.failed.items() if k not in outer.failed})
        for site in found.sites:
            over = any(depth == outer.depth + 1 for depth, _ in site.view.scanned)
            inside = any(isinstance(h, Pass) and h.depth == self.depth for h in site.label.held)
            kind = PARAMETER if over else EXAMPLES if inside else POSITIONS
            shape = (length, *site.shape)
            outer.sites.append(site._replace(shape=shape, loops=(kind, *site.loops)))
        probes = None
        if outer.probes is not None:
            probes = [next(outer.probes) for _ in found.sites]
        moving = self._moving()
        labels: list[Label] = []

        def step(carried: Any, slices: Any) -> Any:
            xs, drops = slices
            tape = outer.child(drops)
            results = self.body(tape, carried, xs)
            labels[:] = [v.label for v in results]
            ends = [results[k].array for k in moving]
            return ends, (arrays_of(results[len(self.still) :]), tape.records)

        ends, (stacked, records) = jax.lax.scan(
            step,
            [self.carries[k].array for k in moving],
            (arrays_of(self.scanned), probes),
            length=length,
            reverse=self.parts.reverse,
        )
        outer.records += records
        carried = list(self.carries)
        for k, array in zip(moving, ends, strict=True):
            carried[k] = Value(array, self.rest[k])
        return carried + [
            Value(a, control_flow.stacked(label, self.depth))
            for a, label in zip(stacked, labels[len(self.still) :], strict=True)
        ]

    def unrolled(self) -> list[Value]:
        """The same, written out pass by pass, where counters are known numbers."""
        order = range(self.parts.length)
        # What starts the same for all examples, zeros say, belongs to them from the start.
        carries = [
            v if v.view is not None or not isinstance(label, Axis) else v._replace(label=label)
            for v, label in zip(self.carries, self.rest, strict=True)
        ]
        rows = {}
        for t in reversed(order) if self.parts.reverse else order:
            scanned = [self._slice(v, t) for v in self.scanned]
            results = self.read(self.parts.body, [*self.constants, *carries, *scanned], self.tape)
            carries = results[: len(carries)]
            rows[t] = results[len(carries) :]
        stacked = []
        for column in zip(*(rows[t] for t in order), strict=True):
            array = jnp.stack(arrays_of(list(column)))
            held = [v for v in column if v.view is not None]
            label = control_flow.stacked(join("scan", [v.label for v in column]), self.depth)
            if held and label is not None:
                for v in held:
                    self.tape.fail(v.view, "leaves a scan")
                held = []
            view = self.tape.derive(held, array) if held else None
            stacked.append(Value(array, label, view))
        return carries + stacked

    def _slice(self, value: Value, t: int) -> Value:
        view = value.view
        if view is not None:
            row = views.window_at(view, t)
            view = self.tape.derive([value], value.array[t]) if row is None else row
        known = None if value.known is None else value.known[t]
        label = control_flow.unstacked(value.label, self.depth, self.parts.length)
        return Value(value.array[t], label, view, known)

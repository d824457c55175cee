"""What the reader knows of a value, and what one evaluation of a program writes down."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import uses
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.contracted import Contracted
from natgrad_jax.jacobian.contracted import contracted_by
from natgrad_jax.jacobian.contracted import contracted_use
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.joined import joined
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.uses import MisfitError
from natgrad_jax.jacobian.uses import Use
from natgrad_jax.jacobian.view import View

PARAMETER, EXAMPLES, POSITIONS = "parameter", "examples", "positions"


class Value(NamedTuple):
    """What the reader knows of a value.

    Attributes:
      array: the value itself.
      label: where its examples lie.
      view: set when it is computed from parameters alone.
      known: its entries, where they are integers known now; a masked array for some of them.
      origin: the linear use that it is the result of, if nothing else takes that result.
    """

    array: jax.Array
    label: Label = None
    view: View | None = None
    known: Any = None
    origin: "Origin | None" = None


class Origin(NamedTuple):
    """A linear use, seen from its result.

    Attributes:
      tape: that wrote it down.
      number: of its site there.
      dims: for each dimension of the value the dimension of the probed result; -1 for new ones.
    """

    tape: "Tape"
    number: int
    dims: tuple[int, ...]


class Site(NamedTuple):
    """A use and its probe.

    Attributes:
      use: what it is; `record` is read at evaluation.
      view: of the parameter.
      label: where examples lie in the probed value.
      shape: of the probe, enclosing scans first.
      dtype: of the probe.
      loops: for each enclosing scan, outermost first, what it runs over: the PARAMETER, EXAMPLES,
        or POSITIONS where an example uses the parameter again.
      bias_of: what is added to the result of a linear use, and to nothing else, has the cotangent
        of that use: so many sites before this one. 0 for none.
      bias_dims: for each dimension of the probed value that of the value of the linear use.
    """

    use: Use
    view: View
    label: Axis
    shape: tuple[int, ...]
    dtype: jnp.dtype
    loops: tuple[str, ...] = ()
    bias_of: int = 0
    bias_dims: tuple[int, ...] = ()


class Survey(NamedTuple):
    """What one evaluation of a program found.

    Attributes:
      sites: uses of parameters, in order.
      failed: parameters that do not factor, and why.
      sources: the parameters behind every root.
      derived: shapes of arrays computed from parameters alone.
      joined: those that join whole parameters.
    """

    sites: list[Site]
    failed: dict[int, str]
    sources: dict[int, frozenset[int]]
    derived: dict[int, jax.ShapeDtypeStruct]
    joined: dict[int, Joined]


class Tape:
    """What one evaluation of a program writes down."""

    def __init__(
        self,
        leaves: dict[int, tuple[int, ...]],
        opaque: frozenset[int],
        probes: list[jax.Array] | None,
        *,
        depth: int = 0,
        guess: int | None = None,
    ) -> None:
        # `guess`: constants spread over a new dimension of this size are taken to hold something
        # for each example. A wrong guess shows in labels that disagree.
        self.guess = guess
        self.probes = None if probes is None else iter(probes)
        self.opaque, self.depth = opaque, depth
        self.sites: list[Site] = []
        self.records: list[Any] = []
        self.failed: dict[int, str] = {}
        self.sources: dict[int, frozenset[int]] = {i: frozenset([i]) for i in leaves}
        self.leaves = leaves
        self.derived: dict[int, jax.Array] = {}
        self.joined: dict[int, Joined] = {}
        self.contracted: dict[int, Contracted] = {}
        self.tangents: set[int] = set()
        # Within a scan only roots from outside of it are known outside.
        self.shared: set[int] = set(self.sources)
        self.linearizing = 0

    def summary(self) -> "Survey":
        """What was found, without arrays: it may outlive the trace that found it."""
        static = lambda site: site._replace(
            use=site.use._replace(record=None), view=site.view._replace(scale=None)
        )
        shapes = {root: jax.ShapeDtypeStruct(x.shape, x.dtype) for root, x in self.derived.items()}
        bare = lambda joint: joint._replace(
            views=tuple(view._replace(scale=None) for view in joint.views)
        )
        return Survey(
            [static(site) for site in self.sites],
            dict(self.failed),
            dict(self.sources),
            shapes,
            {root: bare(joint) for root, joint in self.joined.items()},
        )

    def child(self, probes: list[jax.Array] | None) -> "Tape":
        """The tape of one pass through the body of a scan."""
        tape = Tape({}, self.opaque, probes, depth=self.depth + 1, guess=self.guess)
        tape.sources, tape.tangents = dict(self.sources), set(self.tangents)
        tape.shared = self.shared if self.depth else set(self.sources)
        tape.linearizing = self.linearizing
        return tape

    def derive(self, operands: list[Value], array: jax.Array, equation: Any = None) -> View:
        """A new root: an array computed from parameters alone, by this equation if by one."""
        root = len(self.sources)
        roots = [v.view.root for v in operands if v.view is not None]
        self.sources[root] = frozenset().union(*(self.sources[r] for r in roots))
        self.derived[root] = array
        if self.linearizing:
            self.tangents.add(root)
        elif equation is not None and not self.depth:
            joint = joined(equation, operands, self.leaves)
            if joint is not None:
                self.joined[root] = joint
            contracted = contracted_by(equation, operands)
            if contracted is not None:
                self.contracted[root] = contracted
        return views.whole(root, array.shape)

    def operand_use(
        self, name: str, view: View, label: Axis, shape: tuple[int, ...]
    ) -> tuple[View, Use]:
        """The use of what enters an equation entry by entry, and the view that it is a use of."""
        contracted = self.contracted.get(view.root)
        if contracted is not None:
            use = contracted_use(contracted, view, label, shape)
            if use is not None:
                own = contracted.view
                return own._replace(scale=view.scale, factor=view.factor), use
        return view, uses.operand(name, view, label)

    def fail(self, view: View, reason: str) -> None:
        """Gives up on the parameters behind a view."""
        for leaf in self.sources[view.root]:
            self.failed.setdefault(leaf, reason)

    def probe(self, use: Use, view: View, label: Axis, array: jax.Array) -> jax.Array:
        """Adds the probe of a new site to an array."""
        if self.depth and view.root not in self.shared:
            raise MisfitError("computed from parameters within a scan")
        copies = [*use.b, *(piece for _, pieces in view.scanned for piece in pieces)]
        if use.left is not None and any(not stride for _, stride in copies):
            raise MisfitError("one parameter stands for several copies")
        if view.root in self.tangents:
            raise MisfitError("enters a derivative after other parameters")
        self.sites.append(Site(use, view, label, array.shape, array.dtype))
        self.records.append(use.record)
        if self.probes is None:
            return array
        drop = next(self.probes)
        return array + (drop if view.scale is None else view.scale.astype(drop.dtype) * drop)


def arrays_of(operands: list[Value]) -> list[jax.Array]:
    """The arrays of values."""
    return [v.array for v in operands]


def attach(value: Value, label: Axis, tape: Tape) -> Value:
    """Makes a value of parameters alone one of examples, by a probe on it."""
    assert value.view is not None
    view, use = tape.operand_use("output", value.view, label, value.array.shape)
    return Value(tape.probe(use, view, label, value.array), label)

"""Labels: where in a value the examples lie."""

import itertools
import math
from typing import NamedTuple

Shape = tuple[int, ...]


class Slice(NamedTuple):
    """Only some of the examples: those at start, start + 1, ..., stop - 1 of `total`."""

    start: int
    stop: int
    total: int


class Pass(NamedTuple):
    """Only the examples of one pass of a loop over examples; `depth` names the loop."""

    depth: int
    length: int


class Axis(NamedTuple):
    """Examples lie along one dimension, of size outer * N * inner.

    Attributes:
      dim: the dimension; -1 when the whole value belongs to one example.
      outer: what varies slower than the example within that dimension.
      inner: what varies faster.
      slow: 0, or the size of the dimension before `dim`, when examples run over both (row-major).
      held: which of the examples, where not all: a slice of them, then passes of loops over them.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    slow: int = 0
    held: tuple[Slice | Pass, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether examples lie along a single dimension, or the value belongs to one example."""
        return not self.slow


class Mixed(NamedTuple):
    """Examples were mixed, or may have been, by this primitive.

    `summed`: the value is a sum over examples of what each gives by itself.
    """

    primitive: str
    summed: bool = False


#: The whole value belongs to the one example there is: nothing can mix.
OWN = Axis(-1)

Label = Axis | Mixed | None


def join(primitive: str, labels: list[Label]) -> Label:
    """The label of a value made of values that must agree on where examples lie."""
    known = list(dict.fromkeys(label for label in labels if label is not None))
    mixed = [label for label in known if isinstance(label, Mixed)]
    if mixed:
        return mixed[0]._replace(summed=len(known) == 1 and mixed[0].summed)
    if len(known) > 1:
        return Mixed(primitive)
    return known[0] if known else None


def move(label: Label, dim: int) -> Label:
    """The same examples along another dimension."""
    return label._replace(dim=dim) if isinstance(label, Axis) and label.dim != -1 else label


def reshaped(label: Axis, before: Shape, after: Shape) -> Label:
    """Where examples lie after a row-major reshape."""
    first = label.dim - 1 if label.slow else label.dim
    slower = math.prod(before[:first]) * label.outer
    size = before[label.dim] // (label.outer * label.inner) * (label.slow or 1)
    if not size:  # of no example: any empty dimension will do
        empty = [dim for dim, length in enumerate(after) if not length]
        return label._replace(dim=empty[0], outer=1, inner=1, slow=0) if empty else Mixed("reshape")
    start = 1
    for dim, length in enumerate(after):
        if slower % start == 0:
            outer = slower // start
            if outer * size <= length and length % (outer * size) == 0:
                return label._replace(dim=dim, outer=outer, inner=length // (outer * size), slow=0)
        start *= length
    return _split(label, slower, size, after)


def _split(label: Axis, slower: int, size: int, after: Shape) -> Label:
    """Examples that come to lie over two neighbouring dimensions, in full."""
    for dim in range(1, len(after)):
        if math.prod(after[: dim - 1]) == slower and after[dim - 1] * after[dim] == size:
            return label._replace(dim=dim, outer=1, inner=1, slow=after[dim - 1])
    return Mixed("reshape")


def sliced(label: Axis, start: int, stop: int, count: int) -> Label:
    """The label of examples start to stop of `count` along a dimension that holds nothing else."""
    if label.held and (len(label.held) > 1 or not isinstance(label.held[0], Slice)):
        return Mixed("slice")
    if not label.held:
        return label._replace(held=(Slice(start, stop, count),))
    (outer,) = label.held
    assert isinstance(outer, Slice)
    return label._replace(held=(Slice(outer.start + start, outer.start + stop, outer.total),))


def chained(labels: list[Axis]) -> Label:
    """The label of slices of the examples, joined again in their order; Mixed for anything else."""
    slices = [label.held[0] for label in labels if len(label.held) == 1]
    alike = len({label._replace(held=()) for label in labels}) == 1
    if not alike or len(slices) < len(labels):
        return Mixed("concatenate")
    for one, two in itertools.pairwise(slices):
        if isinstance(one, Pass) or isinstance(two, Pass) or one.stop != two.start:
            return Mixed("concatenate")
    first, last = slices[0], slices[-1]
    if isinstance(first, Pass) or isinstance(last, Pass):
        return Mixed("concatenate")
    everything = first.start == 0 and last.stop == last.total
    held = () if everything else (Slice(first.start, last.stop, first.total),)
    return labels[0]._replace(held=held)

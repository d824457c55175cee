"""Labels: where in a value the examples lie."""

import math
from typing import NamedTuple

Shape = tuple[int, ...]


class Axis(NamedTuple):
    """Examples lie along one dimension, of size outer * N * inner.

    Attributes:
      dim: the dimension; -1 when the whole value belongs to one example.
      outer: what varies slower than the example within that dimension.
      inner: what varies faster.
    """

    dim: int
    outer: int = 1
    inner: int = 1


class Mixed(NamedTuple):
    """Examples were mixed, or may have been, by this primitive."""

    primitive: str


#: The whole value belongs to the one example there is: nothing can mix.
OWN = Axis(-1)

Label = Axis | Mixed | None


def join(primitive: str, labels: list[Label]) -> Label:
    """The label of a value made of values that must agree on where examples lie."""
    known = list(dict.fromkeys(label for label in labels if label is not None))
    mixed = [label for label in known if isinstance(label, Mixed)]
    if mixed:
        return mixed[0]
    if len(known) > 1:
        return Mixed(primitive)
    return known[0] if known else None


def move(label: Label, dim: int) -> Label:
    """The same examples along another dimension."""
    return label._replace(dim=dim) if isinstance(label, Axis) and label.dim != -1 else label


def reshaped(label: Axis, before: Shape, after: Shape) -> Label:
    """Where examples lie after a row-major reshape."""
    slower = math.prod(before[: label.dim]) * label.outer
    size = before[label.dim] // (label.outer * label.inner)
    start = 1
    for dim, length in enumerate(after):
        if slower % start == 0:
            outer = slower // start
            if outer * size <= length and length % (outer * size) == 0:
                return Axis(dim, outer, length // (outer * size))
        start *= length
    return Mixed("reshape")

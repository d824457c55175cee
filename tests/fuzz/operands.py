"""Operands of a case: a shape, and where its values may lie."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Operand(NamedTuple):
    """Values of one operand.

    Every domain is closed under entrywise products and means, so that x * p and (x + p) / 2 lie in
    it as x and p do.

    Attributes:
      shape: of one example.
      draw: (generator, shape) -> values.
      hermitian: whether imaginary parts must be antisymmetric.
    """

    shape: tuple[int, ...]
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    hermitian: bool = False

    def real(self, rng, leading=()):
        """Real values, each of a leading axis on its own."""
        return self._stacked(rng, leading, self.draw)

    def imaginary(self, rng, leading=()):
        """Imaginary parts small enough to leave the real ones in charge."""
        return self._stacked(rng, leading, self._small)

    def _small(self, rng, shape):
        values = rng.uniform(0.1, 0.3, size=shape) * rng.choice([-1, 1], size=shape)
        return (values - values.swapaxes(-1, -2)) / 2 if self.hermitian else values

    def _stacked(self, rng, leading, draw):
        if not leading:
            return draw(rng, self.shape)
        return np.stack([draw(rng, self.shape) for _ in range(leading[0])])


def _between(low, high):
    return lambda *shape: Operand(shape, lambda rng, shape: rng.uniform(low, high, shape))


def _signed(low, high):
    draw = lambda rng, shape: rng.uniform(low, high, shape) * rng.choice([-1, 1], shape)
    return lambda *shape: Operand(shape, draw)


def _definite(rng, shape):
    a = rng.uniform(-0.5, 0.5, size=shape)
    return a @ a.T + np.diag(1 + np.arange(shape[0]))  # eigenvalues stay apart


def _dominated(rng, shape):
    return rng.uniform(-0.5, 0.5, size=shape) + np.diag(2 + np.arange(shape[0]))


real = _signed(0.3, 1.6)
positive = _between(0.5, 1.5)
unit = _between(0.2, 0.9)
signed_unit = _signed(0.2, 0.9)
above_one = _between(1.1, 1.6)
definite = lambda n: Operand((n, n), _definite, hermitian=True)
dominated = lambda n: Operand((n, n), _dominated)

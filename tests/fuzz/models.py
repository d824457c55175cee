"""Models of a case: a parameter goes through its primitive before or after it meets examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

N = 4
POSITIONS = ("before", "after", "together", "swapped")


class Built(NamedTuple):
    """A model at a point.

    Attributes:
      function: (params, batch) -> real outputs (N, k).
      params: lists of operands, a complex one as a dict of its parts.
      batch: likewise, with a leading axis of N examples.
      other: another batch of the same shapes.
    """

    function: object
    params: list
    batch: list
    other: list


def positions(case) -> tuple[str, ...]:
    """Where a parameter may stand in a case."""
    if len(case.operands) == 1:
        return POSITIONS[:3]
    return ("after", "together") if case.batched else POSITIONS


def works_across(case) -> bool:
    """Whether the examples can lie along the first axis that the function itself works on."""
    shape = case.operands[0].shape
    return not case.batched and bool(shape) and shape[0] > 1


def build(case, position, dtype, *, is_complex=False, mixing=False) -> Built:
    """The model of a case at one position."""
    rng = np.random.default_rng(0)
    leading = () if position == "across" else (N,)
    draw = lambda leading: [_drawn(o, rng, leading, dtype, is_complex) for o in case.operands]
    params, batch, other = draw(()), draw(leading), draw(leading)
    if position == "across":
        batch, other = batch[:1], other[:1]

    def function(params, batch):
        p, x = [_joined(a) for a in params], [_joined(a) for a in batch]
        if mixing:
            x = [(a + a.mean(0, keepdims=True)) / 2 for a in x]
        return _outputs(SPELLINGS[position](case, p, x))

    return Built(function, params, batch, other)


def _drawn(operand, rng, leading, dtype, is_complex):
    values = jnp.asarray(operand.real(rng, leading), dtype)
    if not is_complex:
        return values
    return {"re": values, "im": jnp.asarray(operand.imaginary(rng, leading), dtype)}


def _joined(leaf):
    return lax.complex(leaf["re"], leaf["im"]) if isinstance(leaf, dict) else leaf


def _outputs(y):
    """Real outputs whose derivative depends on where they are."""
    y = y.reshape(y.shape[0], -1)
    if jnp.iscomplexobj(y):
        y = jnp.concatenate([y.real, y.imag], axis=1)
    return y + y * y / 4


def _before(case, p, x):
    """x @ g(p)"""
    h = case.function(*p)
    h = h.reshape(h.shape[0] if h.ndim else 1, -1)
    x = x[0].reshape(N, -1)
    mix = np.random.default_rng(1).uniform(0.5, 1.5, (x.shape[1], h.shape[0])).astype(x.real.dtype)
    return (x @ mix.astype(x.dtype)) @ h if h.shape[1] > 1 else (x @ mix.astype(x.dtype)) * h[:, 0]


def _after(case, p, x):
    """g(x * p)"""
    if case.batched:
        return case.function(x[0] * p[0], *p[1:])
    return jax.vmap(case.function)(*(a * b for a, b in zip(x, p, strict=True)))


def _together(case, p, x):
    """g(x, p), or g of a mean of both where it takes one operand"""
    over = (lambda f: f) if case.batched else jax.vmap
    if len(p) == 1:
        return over(case.function)((x[0] + p[0]) / 2)
    return over(lambda x: case.function(x, *p[1:]))(x[0])


def _swapped(case, p, x):
    """g(p, x)"""
    return jax.vmap(lambda *x: case.function(p[0], *x))(*x[1:])


def _across(case, p, x):
    """g(x * p[0]) with each entry along the first axis an example: most primitives mix them"""
    y = case.function(x[0] * p[0].reshape(-1)[0], *p[1:])
    n = x[0].shape[0]
    kept = y.ndim and y.shape[0] == n
    return y if kept else jnp.broadcast_to(y.reshape(1, -1), (n, y.size)) * _row(x[0])


def _row(x):
    """One number of each example."""
    return 1 + x.reshape(x.shape[0], -1)[:, :1]


SPELLINGS = {
    "before": _before,
    "after": _after,
    "together": _together,
    "swapped": _swapped,
    "across": _across,
}

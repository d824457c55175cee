"""Labels: where examples lie after each primitive, found by moving an array of example numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import capture
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Mixed
from natgrad_jax.jacobian.labels import Slice
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.tape import Tape
from natgrad_jax.jacobian.tape import Value

pytestmark = pytest.mark.usefixtures("standard_promotion")
N = 5
W = jnp.ones((3, 4))
FIRST = (Slice(0, 4, N),)

#: name: (function of x (N, 3), where examples lie in its result)
INDEPENDENT = {
    "elementwise": (lambda x: jnp.tanh(x) * 2, Axis(0)),
    "dot": (lambda x: x @ W, Axis(0)),
    "dot from the left": (lambda x: W.T @ x.T, Axis(1)),
    "transpose": (lambda x: x.T, Axis(1)),
    "merged": (lambda x: jnp.stack([x, x], axis=1).reshape(-1, 3), Axis(0, 1, 2)),
    "merged behind": (lambda x: x.T.reshape(-1), Axis(0, 3, 1)),
    "merged and back": (lambda x: x.T.reshape(-1).reshape(3, N).T, Axis(0)),
    "reduction": (lambda x: x.sum(1), Axis(0)),
    "sorting within": (lambda x: jnp.sort(x, axis=1), Axis(0)),
    "padding within": (lambda x: jnp.pad(x, ((0, 0), (1, 2))), Axis(0)),
    "scan over features": (
        lambda x: lax.scan(lambda c, t: (c + t, c * t), jnp.zeros(N), x.T)[1],
        Axis(1),
    ),
    "loop": (lambda x: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h), x), Axis(0)),
    "picked": (lambda x: x[jnp.arange(N), jnp.argmax(x, axis=1)], Axis(0)),
    "along an axis": (lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1)[:, None], 1), Axis(0)),
    "updated column": (lambda x: x.at[:, 0].set(1.0), Axis(0)),
    "batched product": (lambda x: jnp.einsum("ni,nj->nij", x, x), Axis(0)),
    "one by one": (lambda x: lax.map(lambda row: jnp.sort(row), x), Axis(0)),
    "a few at a time": (lambda x: lax.map(jnp.sin, x[:4], batch_size=2), Axis(0, held=FIRST)),
    "a few at a time and the rest": (lambda x: lax.map(jnp.sin, x, batch_size=2), Axis(0)),
    "slices put together": (lambda x: jnp.concatenate([x[:2], x[2:]]), Axis(0)),
    "bits": (lambda x: (lax.bitcast_convert_type(x, jnp.int32) >> 31) * x, Axis(0)),
    "scattered to its own row": (
        lambda x: jnp.zeros((N, 3)).at[jnp.arange(N), jnp.argmax(x, 1)].add(x[:, 0]),
        Axis(0),
    ),
    "vmapped solve": (
        lambda x: lax.linalg.cholesky(jnp.eye(3) + jnp.einsum("ni,nj->nij", x, x)),
        Axis(0),
    ),
}

MIXING = {
    "sum": lambda x: x.sum(0),
    "mean subtracted": lambda x: x - x.mean(0),
    "outer": lambda x: x @ x.T,
    "reversed": lambda x: x[::-1],
    "shifted": lambda x: jnp.roll(x, 1, axis=0),
    "cumulative": lambda x: jnp.cumsum(x, axis=0),
    "scan over examples": lambda x: lax.scan(lambda c, t: (c + t, c), jnp.zeros(3), x)[1],
    "slices of different examples": lambda x: x[1:] - x[:-1],
    "slices in another order": lambda x: jnp.concatenate([x[2:], x[:2]]),
    "one example for all": lambda x: x + x[:1],
    "carried from example to example": lambda x: lax.scan(lambda c, t: (t, c + t), jnp.zeros(3), x)[
        1
    ],
    "the whole batch in each pass": lambda x: lax.map(lambda row: row * x, x)[:, 0],
    "counted wrongly": lambda x: x[jnp.arange(N)[::-1], jnp.argmax(x, axis=1)],
    "kernel over examples": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"),
}


def label_of(function):
    program, _ = _jaxpr.trace(function, jnp.ones((N, 3)))
    found = []

    def run(x):
        (value,) = capture.read(program, [Value(x, Axis(0))], Tape({}, frozenset(), None))
        found.append(value.label)
        return value.array

    shape = jax.eval_shape(run, jnp.ones((N, 3)))
    return found[0], shape.shape


@pytest.mark.parametrize("name", INDEPENDENT)
def test_examples_are_followed(name):
    function, expected = INDEPENDENT[name]
    label, shape = label_of(function)
    assert label == expected
    # The derivative by one example is zero off that label.
    x = jax.random.normal(jax.random.key(0), (N, 3))
    change = jax.jvp(function, (x,), (jnp.zeros((N, 3)).at[2].set(1.0),))[1]
    count = label.held[0].stop if label.held else N
    parts = (*shape[: label.dim], label.outer, count, label.inner, *shape[label.dim + 1 :])
    others = np.delete(np.asarray(change).reshape(parts), 2, axis=label.dim + 1)
    np.testing.assert_array_equal(others, 0)


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_found(name):
    label, _ = label_of(MIXING[name])
    assert isinstance(label, Mixed)
    assert join("", [label, Axis(0)]) == Mixed(label.primitive)

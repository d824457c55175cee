"""Strided views: every entry of a view is the entry of the parameter that numpy's view holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.primitives.registry import rule_of

SHAPE = (4, 6)
FLAT = np.arange(24)

CASES = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(2, 12),
    "split and merge": lambda w: w.reshape(4, 2, 3).transpose(1, 0, 2).reshape(8, 3),
    "slice": lambda w: w[1:3, ::2],
    "slice of a transpose": lambda w: w.T[2:5],
    "row": lambda w: w[2],
    "broadcast": lambda w: jnp.broadcast_to(w[:, None], (4, 3, 6)),
    "split": lambda w: jnp.split(w, 3, axis=1)[1],
}


def followed(function):
    """The view that a chain of structural equations ends in."""
    program, _ = _jaxpr.trace(function, jnp.zeros(SHAPE))
    known = {program.inputs[0]: views.whole(0, SHAPE)}

    def walk(program, known):
        for equation in program.equations:
            if rule_of(equation).body is not None:
                body = rule_of(equation).body(equation)
                inner = dict(zip(body.inputs, (known[v] for v in equation.invars), strict=True))
                results = walk(body, inner)
            else:
                results = rule_of(equation).view(equation, known[equation.invars[0]], [None])
            known.update(zip(equation.outvars, results, strict=True))
        return [known[v] for v in program.outputs]

    return walk(program, known)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_view_knows_its_entries(name):
    view = followed(CASES[name])
    pieces = tuple(piece for dim in view.dims for piece in dim)
    expected = np.asarray(CASES[name](jnp.asarray(FLAT.reshape(SHAPE))))
    assert tuple(views.size(dim) for dim in view.dims) == expected.shape
    np.testing.assert_array_equal(views.indices(view.offset, pieces), expected.reshape(-1))


@pytest.mark.parametrize("name", [name for name in CASES if name != "broadcast"])
def test_take_and_place_are_transposes(name):
    view = followed(CASES[name])
    pieces = tuple(piece for dim in view.dims for piece in dim)
    array = jnp.asarray(FLAT.reshape(SHAPE), jnp.float32)
    taken = views.take(array, view.offset, pieces)
    np.testing.assert_array_equal(taken, views.indices(view.offset, pieces))
    (expected,) = jax.linear_transpose(lambda x: views.take(x, view.offset, pieces), array)(taken)
    np.testing.assert_array_equal(views.place(taken, SHAPE, view.offset, pieces), expected)


def test_control_what_reorders_entries_is_no_view():
    program, _ = _jaxpr.trace(lambda w: jnp.flip(w, 0), jnp.zeros(SHAPE))
    assert rule_of(program.equations[-1]).view is None

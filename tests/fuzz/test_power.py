"""The check has power: a rule that is missing costs nothing but speed, and a wrong one is found."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from tests.fuzz import checks
from tests.fuzz import models
from tests.fuzz.cases import present

registry = pytest.importorskip("natgrad_jax.jacobian.primitives.registry")

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
ALL = int(os.environ.get("NATGRAD_FUZZ", "0")) > 0
BOTH = sorted(set(registry.RULES) & set(present()))
NAMES = BOTH if ALL else BOTH[::6]
N, D = 4, 4  # as many features as examples: a wrong label then fits every shape
RNG = np.random.default_rng(3)
P, X, OTHER = (RNG.uniform(0.5, 1.5, size=(N, D)) for _ in range(3))


def _mode(function):
    """The mode of a model's rows, once they are checked."""
    return checks.check(function, *map(jnp.asarray, (P, X)), 1e-10, jnp.asarray(OTHER))


@pytest.mark.parametrize("name", NAMES)
def test_without_the_rule_of_a_primitive_rows_stay_exact(name, monkeypatch):
    monkeypatch.delitem(registry.RULES, name)
    case = present()[name][0]
    built = models.build(case, "after", jnp.float64)
    if case.refused and checks.refusal(*built[:3], case.refused):
        pytest.skip("JAX itself has no rows of this")
    function, params, batch, other = built
    checks.check(function, params, batch, 1e-10 * case.loose, other)


def _change(monkeypatch, name, **fields):
    monkeypatch.setitem(registry.RULES, name, registry.RULES[name]._replace(**fields))


def _stays(monkeypatch, name):
    """A rule that says of every result that examples lie where they lay."""

    def examples(equation, labels, known):
        return [next(label for label in labels if label is not None)] * len(equation.outvars)

    _change(monkeypatch, name, examples=examples)


# Each mixes the examples, and returns an array of the shape that it took.
MIXING = {
    "cumprod": lambda x: jnp.cumprod(x, axis=0),
    "cumsum": lambda x: jnp.cumsum(x, axis=0),
    "reduce_sum": lambda x: x * x.sum(0)[:, None],
    "rev": lambda x: x[::-1],
    "sort": lambda x: jnp.sort(x, axis=0),
}


def _of_examples(name):
    return lambda p, x: MIXING[name](jnp.tanh(x * p[0]))


@pytest.mark.parametrize("name", MIXING)
def test_a_primitive_that_mixes_has_the_rows_of_reverse_mode(name):
    assert _mode(_of_examples(name)) == "whole"


@pytest.mark.parametrize("name", MIXING)
def test_a_rule_that_misses_how_examples_mix_is_found(name, monkeypatch):
    _stays(monkeypatch, name)
    with pytest.raises(AssertionError):
        _mode(_of_examples(name))


def _turned(p, x):
    return jnp.tanh(x @ p.T)


def test_a_weight_that_is_turned_over_has_the_rows_of_reverse_mode():
    assert _mode(_turned) == "examples"


def test_a_view_that_forgets_a_transpose_is_found(monkeypatch):
    _change(monkeypatch, "transpose", view=lambda equation, view, known: [view])
    with pytest.raises(AssertionError):
        _mode(_turned)


def test_a_contraction_with_its_sides_exchanged_is_found(monkeypatch):
    right = registry.RULES["dot_general"].use

    def exchanged(*args):
        use = right(*args)
        return use._replace(p=use.q, q=use.p)

    _change(monkeypatch, "dot_general", use=exchanged)
    with pytest.raises(AssertionError):
        _mode(lambda p, x: jnp.tanh(x @ p))

"""When JAX changes what the reader relies on, rows become dense, with one warning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.primitives import registry
from tests.models import oracle

RNG = np.random.default_rng(0)
P = {"w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


def model(p, x):
    return jnp.tanh(jax.jit(lambda p, x: x @ p["w"])(p, x))


def rows_with_warnings():
    gram, warned = oracle.quietly(ng.gram_matrix, ng.gauss_newton(lambda p, x: model(p, x)), P, X)
    rows = np.asarray(oracle.gauss_newton_rows(model, P, X))
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-4, atol=1e-5)
    return warned


@pytest.mark.smoke
def test_control_nothing_is_said_today():
    assert rows_with_warnings() == []


@pytest.mark.parametrize(
    ("primitive", "key"), [("dot_general", "dimension_numbers"), ("jit", "jaxpr")]
)
def test_a_renamed_parameter_degrades_to_dense_rows_with_one_warning(monkeypatch, primitive, key):
    real = _jaxpr.parameter

    def renamed(equation, wanted):
        if _jaxpr.name(equation) in (primitive, "pjit") and wanted == key:
            raise _jaxpr.UnreadableError(primitive, f"has no parameter {wanted!r}")
        return real(equation, wanted)

    monkeypatch.setattr(_jaxpr, "parameter", renamed)
    warned = rows_with_warnings()
    assert len(warned) == 1
    assert repr(primitive) in warned[0]


def test_a_primitive_without_a_rule_degrades_with_one_warning(monkeypatch):
    monkeypatch.delitem(registry.RULES, "tanh")
    warned = rows_with_warnings()
    assert len(warned) == 1
    assert "'tanh'" in warned[0]

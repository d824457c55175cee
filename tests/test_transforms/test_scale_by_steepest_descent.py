"""T6: argmin over unit vectors of the linear model, for the 1-norm, the 2-norm and d^T H d."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax_contract import cases
from optax_contract import oracle

import natgrad_jax as ng

EPS = np.finfo(np.float64).eps
ORDER = {"l1": 1, "l2": 2}


def direction(norm, grads):
    return ng.scale_by_steepest_descent(norm).update(grads, optax.EmptyState())[0]


@pytest.mark.parametrize("norm", ORDER)
def test_t6_no_unit_vector_descends_more_steeply(norm, x64):
    _, grads, _ = cases.arrays()
    g, d = oracle.ravel(grads), -oracle.ravel(direction(norm, grads))
    np.testing.assert_allclose(np.linalg.norm(d, ORDER[norm]), 1, rtol=10 * EPS)
    others = np.random.default_rng(0).normal(size=(10_000, g.size))
    # The unit ball of the 1-norm has its extremes at the corners.
    others = np.concatenate([others, np.eye(g.size), -np.eye(g.size), -g[None], g[None]])
    others /= np.linalg.norm(others, ORDER[norm], axis=1, keepdims=True)
    assert g @ d <= np.min(others @ g) + 10 * EPS * abs(g @ d)


def test_t6_the_norms_have_different_answers(x64):
    """The control: the steepest of one norm is not the steepest of the other."""
    _, grads, _ = cases.arrays()
    g = oracle.ravel(grads)
    first, second = (-oracle.ravel(direction(norm, grads)) for norm in ORDER)
    assert g @ second < 1.1 * (g @ first) / np.linalg.norm(first)
    assert g @ first < 1.1 * (g @ second) / np.linalg.norm(second, 1)


def test_t6_newton_is_the_steepest_direction_of_the_hessian_norm(x64):
    """For d^T H d = 1 with a positive definite H: the metric `hessian`, up to length."""
    rng = np.random.default_rng(1)
    root, g = rng.normal(size=(4, 4)), rng.normal(size=4)
    hessian = root @ root.T + np.eye(4)
    metric = ng.hessian(lambda p, batch: 0.5 * p @ batch @ p)
    tx, params = ng.scale_by_natural_gradient(metric, damping=0.0), jnp.zeros(4)
    updates, _ = tx.update(jnp.asarray(g), tx.init(params), params, batch=jnp.asarray(hessian))
    d = -np.asarray(updates)
    oracle.close(d, -np.linalg.solve(hessian, g), EPS, np.linalg.cond(hessian))
    others = rng.normal(size=(10_000, 4))
    length = lambda v: np.sqrt(np.einsum("...i,ij,...j", v, hessian, v))
    assert g @ d / length(d) <= np.min(others @ g / length(others))


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_zero_gradient_gives_a_zero_step(norm, dtype):
    grads = {"a": jnp.zeros((2, 3), dtype), "b": jnp.zeros((), dtype)}
    got = direction(norm, grads)
    np.testing.assert_array_equal(oracle.ravel(got), 0)
    assert got["a"].dtype == dtype


def test_the_first_of_equals_moves_alone():
    got = direction("l1", {"a": jnp.array([1.0, -2.0]), "b": jnp.array([2.0, 0.5])})
    np.testing.assert_array_equal(oracle.ravel(got), [0, -1, 0, 0])


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_gradients_that_are_not_finite_do_not_pass_for_steps(norm, bad):
    got = oracle.ravel(direction(norm, jnp.array([1.0, bad, 3.0])))
    if norm == "l1" and np.isinf(bad):
        # The steepest of all coordinates is well defined.
        np.testing.assert_array_equal(got, [0, 1, 0])
    else:
        assert not np.all(np.isfinite(got))


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("exponent", [-37, 37])
def test_lengths_near_the_limits_of_float32_are_one(norm, exponent):
    got = oracle.ravel(direction(norm, jnp.float32([1.0, 2.0, -2.0]) * 10.0**exponent))
    expected = [0, 1, 0] if norm == "l1" else [1 / 3, 2 / 3, -2 / 3]
    np.testing.assert_allclose(got, expected, atol=1e-6)

"""Symmetric matrices by what stands on and above the diagonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax.solvers import _upper

RNG = np.random.default_rng(0)
ORDERS = [1, 2, 767, 768, 801]


def rows(order):
    return RNG.normal(size=(3, 1, 1, 2, order))


@pytest.mark.parametrize("order", ORDERS)
def test_a_second_moment_has_every_entry_on_and_above_the_diagonal(order, x64):
    x, weights = rows(order), RNG.uniform(size=3)
    found = _upper.second_moment(jnp.asarray(x), jnp.sqrt(weights).reshape(3, 1, 1, 1, 1))
    expected = np.einsum("n,ncbti,ncbtj->ij", weights, x, x)
    np.testing.assert_allclose(_upper.whole(found)[0], expected, atol=1e-12)
    filled = _upper.padded(found, order + 3)[0]
    np.testing.assert_allclose(np.triu(filled), np.triu(np.pad(expected, (0, 3))), atol=1e-12)
    pieces = np.concatenate(_upper.diagonal(found), axis=1)
    np.testing.assert_allclose(pieces[0], np.diag(expected), atol=1e-12)
    unweighted = _upper.whole(_upper.second_moment(jnp.asarray(x)))[0]
    assert np.abs(unweighted - expected).max() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_zeros_have_the_form_of_moments(order):
    moment, zeros = _upper.second_moment(jnp.asarray(rows(order))), _upper.zeros(1, order)
    shapes = lambda m: jax.tree.map(jnp.shape, m)
    assert shapes(zeros) == shapes(moment)
    assert zeros.shape == moment.shape == (1, order, order)
    assert all(isinstance(_upper.zeros(copies, order), jax.Array) for copies in (0, 2))


def test_large_ones_take_three_quarters_of_the_memory():
    held = lambda order: sum(x.size for x in jax.tree.leaves(_upper.zeros(1, order)))
    assert held(900) == 900**2 * 3 // 4
    assert held(300) == 300**2


@pytest.mark.parametrize("solver", [ng.kfac, ng.ekfac])
@pytest.mark.parametrize("width", [40, 801])
def test_a_layer_of_any_width_is_solved_with(solver, width):
    """One linear layer with Gaussian outputs, B = I: (B (x) A + damping)^-1 g = g (A + damping)^-1.

    Wide factors stand in block rows, narrow ones whole.
    """
    x = RNG.normal(size=(50, width)).astype(np.float32) / 20
    metric = ng.gauss_newton(lambda w, x: x @ w)
    w, g = jnp.ones((width, 3)), RNG.normal(size=(width, 3)).astype(np.float32)
    split = {"damping_split": "exact"} if solver is ng.kfac else {}
    d, info = ng.natural_gradient_direction(metric, w, x, g, solver=solver(x, **split), damping=0.1)
    a = x.T.astype(np.float64) @ x / 50
    expected = np.linalg.solve(a + 0.1 * np.eye(width), g)
    np.testing.assert_allclose(d, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(info.grad_dot_direction, np.sum(g * expected), rtol=1e-4)
    assert np.abs(d - g / 0.1).max() > 0.1

"""Inverses of many orders by one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.solvers import _inverse

LARGEST = 600  # eight tiles of 96
RNG = np.random.default_rng(0)
INVERSE = jax.jit(_inverse.inverse)
VMAPPED = jax.jit(jax.vmap(_inverse.inverse))


def matrix(order, rank):
    factor = RNG.normal(size=(order, rank)) / np.sqrt(rank)
    return factor @ factor.T


def padded(own):
    rest = _inverse.padded(LARGEST) - len(own)
    return np.pad(own, ((0, rest), (0, rest)))


@pytest.mark.parametrize("order", [1, 95, 96, 97, 192, 193, 384, 385, 600, 768])
def test_a_matrix_of_any_order_is_inverted_in_its_corner(order, x64):
    own = matrix(order, 2 * order)
    found = INVERSE(padded(own), jnp.asarray(0.1), order)[:order, :order]
    expected = np.linalg.inv(own + 0.1 * np.eye(order))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    undamped = np.linalg.inv(own + 1e-3 * np.eye(order))
    assert np.abs(found - undamped).max() > 0.1


@pytest.mark.parametrize("order", [40, 200])
def test_singular_matrices_take_the_pseudo_inverse_without_damping(order, x64):
    own = matrix(order, 7)
    found = INVERSE(padded(own), jnp.asarray(0.0), order)[:order, :order]
    expected = np.linalg.pinv(own, hermitian=True, rcond=1e-10)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("damping", [0.1, 0.0])
@pytest.mark.parametrize("order", [95, 600])
def test_what_stands_below_the_diagonal_does_not_count(order, damping, x64):
    own = padded(matrix(order, 7 if damping == 0 else 2 * order))
    spoiled = np.triu(own) + np.tril(RNG.normal(size=own.shape), -1)
    found = INVERSE(spoiled, jnp.asarray(damping), order)[:order, :order]
    expected = INVERSE(own, jnp.asarray(damping), order)[:order, :order]
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())
    above = INVERSE(spoiled.T, jnp.asarray(damping), order)[:order, :order]
    assert not np.allclose(above, expected)


def test_a_factor_that_rounding_spoils_is_replaced():
    """Eigenvalues that are rounding count as zero where the damping is smaller than rounding."""
    own, damping = matrix(200, 7).astype(np.float32), np.float32(1e-9)
    found = np.asarray(INVERSE(padded(own), damping, 200)[:200, :200])
    values, vectors = np.linalg.eigh(own.astype(np.float64))
    values[:-7] = 0
    expected = vectors / (values + damping) @ vectors.T
    error = lambda x: np.abs(x - expected).max() / np.abs(expected).max()
    assert error(found) < 1e-4
    halves, _ = _inverse._by_halves(padded(own), np.full(_inverse.padded(LARGEST), damping), 200)
    assert not error(np.asarray(halves)[:200, :200]) < 0.5


@pytest.mark.smoke
def test_a_batch_of_many_orders_runs_under_vmap(x64):
    orders = [30, 161, 500, 600]
    own = [matrix(order, 2 * order) for order in orders]
    found = VMAPPED(np.stack([padded(m) for m in own]), jnp.full((4,), 0.1), jnp.asarray(orders))
    for m, x in zip(own, found, strict=True):
        expected = np.linalg.inv(m + 0.1 * np.eye(len(m)))
        np.testing.assert_allclose(x[: len(m), : len(m)], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", [1, 32, 33, 256, 257, 512, 1001, 1025, 5000])
def test_padding_adds_less_than_one_multiple_a_tile(order):
    size = _inverse.padded(order)
    tiles = 1
    while size // tiles > 128:
        tiles *= 2
    assert order <= size < order + 32 * tiles + tiles

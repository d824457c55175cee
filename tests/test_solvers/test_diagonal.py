"""The diagonal solver."""

import jax
import numpy as np
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(11)
DIAGONAL = ng.diagonal()
PARAMS = {"a": RNG.normal(size=(2,)), "b": RNG.normal(size=(2, 2))}
GRADIENT = {"a": RNG.normal(size=(2,)), "b": RNG.normal(size=(2, 2))}
METRIC = ng.exact_fisher(lambda p, x: x @ p["b"] + p["a"][None], ng.Bernoulli())


def solve(metric, batch, damping, params=PARAMS, g=GRADIENT):
    return ng.natural_gradient_direction(metric, params, batch, g, solver=DIAGONAL, damping=damping)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_each_entry_is_divided_by_its_own(damping):
    x = RNG.normal(size=(5, 2))
    d, info = solve(METRIC, x, damping)
    entries = np.diag(ng.fisher_matrix(METRIC, PARAMS, x))
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    np.testing.assert_allclose(flat(d), flat(GRADIENT) / (entries + damping), rtol=1e-10)
    assert not info.eigen_taken


def test_without_damping_null_entries_give_zero():
    x = np.array([[1.0, 0.0], [2.0, 0.0]])
    d, _ = solve(METRIC, x, 0.0)
    np.testing.assert_array_equal(d["b"][1], 0)
    assert np.all(np.asarray(d["b"][0]) != 0)


def test_entries_of_a_hessian_keep_their_sign():
    metric = ng.hessian(lambda p, b: b @ p**2 / 2)
    g = np.array([1.0, 2.0])
    d, _ = solve(metric, np.array([2.0, -4.0]), 0.0, np.ones(2), g)
    np.testing.assert_allclose(d, [0.5, -0.5])


def test_the_euclidean_metric_gives_the_gradient_back():
    d, _ = solve(ng.euclidean(), None, 1.0)
    np.testing.assert_allclose(d["b"], GRADIENT["b"] / 2)

"""The block-diagonal solver."""

import numpy as np
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(12)
BLOCKS = ng.block_diagonal()
PARAMS = {"a": RNG.normal(size=(2,)), "b": RNG.normal(size=(2, 2))}
GRADIENT = {"a": RNG.normal(size=(2,)), "b": RNG.normal(size=(2, 2))}
METRIC = ng.exact_fisher(lambda p, x: x @ p["b"] + p["a"][None], ng.Categorical())


def solve(metric, batch, damping, params=PARAMS, g=GRADIENT):
    return ng.natural_gradient_direction(metric, params, batch, g, solver=BLOCKS, damping=damping)


# Logits are known up to a constant, so that every block is singular.
@pytest.mark.parametrize("damping", [0.3, 0.0])
def test_each_leaf_is_solved_with_its_own_block(damping):
    x = RNG.normal(size=(5, 2))
    d, info = solve(METRIC, x, damping)
    fisher = np.asarray(ng.fisher_matrix(METRIC, PARAMS, x))
    for name, part in (("a", np.s_[:2]), ("b", np.s_[2:])):
        block = fisher[part, part] + damping * np.eye(len(fisher[part, part]))
        inverse = np.linalg.pinv(block, rcond=1e-12, hermitian=True)
        np.testing.assert_allclose(np.ravel(d[name]), inverse @ GRADIENT[name].ravel(), rtol=1e-8)
    assert bool(info.eigen_taken) == (damping == 0)


def test_with_one_leaf_it_is_exact():
    x, g = RNG.normal(size=(5, 3)), RNG.normal(size=3)
    metric = ng.gauss_newton(lambda p, x: x @ p)
    d, _ = solve(metric, x, 0.1, np.zeros(3), g)
    np.testing.assert_allclose(d, np.linalg.solve(x.T @ x / 5 + 0.1 * np.eye(3), g), rtol=1e-10)


def test_blocks_of_an_indefinite_hessian_keep_their_signs():
    metric = ng.hessian(lambda p, _: p["a"][0] ** 2 - 2 * p["a"][1] ** 2 + 5 * p["a"][0] * p["b"])
    params = {"a": np.zeros(2), "b": np.zeros(())}
    d, _ = solve(metric, None, 0.0, params, {"a": np.ones(2), "b": np.ones(())})
    np.testing.assert_allclose(d["a"], [0.5, -0.25])
    np.testing.assert_allclose(d["b"], 0)


def test_leaves_without_numbers_and_scalars():
    metric = ng.gauss_newton(lambda p, x: p["s"] * x + p["e"].sum())
    params = {"e": np.zeros((0,)), "s": np.ones(())}
    d, _ = solve(metric, np.array([1.0, 2.0]), 0.5, params, params)
    assert d["e"].shape == (0,)
    np.testing.assert_allclose(d["s"], 1 / 3)

"""The dense solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

RNG = np.random.default_rng(7)
CHOLESKY = ng.cholesky()
QUADRATIC = ng.hessian(lambda p, matrix: 0.5 * p @ (matrix @ p))
INDEFINITE = np.diag([3.0, -2.0, 0.0]) + 0.1


def solve(metric, params, batch, g, damping):
    return ng.natural_gradient_direction(metric, params, batch, g, solver=CHOLESKY, damping=damping)


@pytest.mark.usefixtures("x64")
def test_a_tree_of_parameters_is_solved_as_one_vector():
    params = {"b": RNG.normal(size=(2,)), "w": [RNG.normal(size=(3, 2)), RNG.normal(size=())]}
    model = lambda p, x: (x @ p["w"][0] + p["b"][None]) * p["w"][1]
    metric, x = ng.exact_fisher(model, ng.Bernoulli()), RNG.normal(size=(6, 3))
    g = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), params)
    d, info = solve(metric, params, x, g, 0.01)
    fisher = np.asarray(ng.fisher_matrix(metric, params, x))
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    expected = np.linalg.solve(fisher + 0.01 * np.eye(9), flat(g))
    np.testing.assert_allclose(flat(d), expected, rtol=1e-9)
    assert jax.tree.map(jnp.shape, d) == jax.tree.map(jnp.shape, params)
    assert not info.eigen_taken


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("damping", [0.0, 0.5, 5.0])
def test_a_hessian_keeps_the_signs_of_its_eigenvalues(damping):
    g = np.array([1.0, 2.0, 3.0])
    d, info = solve(QUADRATIC, np.zeros(3), INDEFINITE, g, damping)
    np.testing.assert_allclose(d, np.linalg.solve(INDEFINITE + damping * np.eye(3), g), rtol=1e-9)
    # Damping that makes it definite needs no eigendecomposition.
    assert bool(info.eigen_taken) == (damping < 5)
    assert float(info.outside_row_space) == -1


@pytest.mark.usefixtures("x64")
def test_damping_zero_takes_the_eigendecomposition():
    x, g = np.eye(3), np.ones(3)
    metric = ng.gauss_newton(lambda p, x: x @ p)
    assert solve(metric, np.zeros(3), x, g, 0.0)[1].eigen_taken
    assert not solve(metric, np.zeros(3), x, g, 1e-3)[1].eigen_taken


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_solved_in_float32(dtype):
    x, g = jnp.asarray(RNG.normal(size=(5, 3)), dtype), jnp.asarray([1.0, -2.0, 0.5], dtype)
    metric = ng.gauss_newton(lambda p, x: x @ p)
    d, _ = solve(metric, jnp.zeros(3, dtype), x, g, 0.01)
    assert d.dtype == dtype
    wide = np.asarray(x, np.float64)
    expected = np.linalg.solve(wide.T @ wide / 5 + 0.01 * np.eye(3), np.asarray(g, np.float64))
    np.testing.assert_allclose(
        np.asarray(d, np.float64), expected, rtol=4 * float(jnp.finfo(dtype).eps)
    )


def test_a_result_too_large_for_its_dtype_saturates():
    metric, g = ng.euclidean(), jnp.full((2,), 60000.0, jnp.float16)
    d, _ = solve(metric, jnp.zeros(2, jnp.float16), None, g, 0.0)
    np.testing.assert_array_equal(d, g)
    tiny = ng.gauss_newton(lambda p, x: x @ p)
    d, _ = solve(tiny, jnp.zeros(2, jnp.float16), jnp.full((1, 2), 0.01, jnp.float16), g, 1e-3)
    np.testing.assert_array_equal(d, jnp.finfo(jnp.float16).max)

"""The symmetric solve beneath the dense solvers: Cholesky, and its fallback inside jit."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax import _symmetric

pytestmark = pytest.mark.usefixtures("x64")

EPS = np.finfo(np.float64).eps
RNG = np.random.default_rng(5)


def solve_once(matrix, damping, b, definite=True):
    factor = _symmetric.factorize(matrix, jnp.asarray(damping, matrix.dtype), definite=definite)
    return factor.solve(b), factor.eigen_taken


SOLVE = jax.jit(solve_once, static_argnames="definite")
LANES = jax.jit(jax.vmap(solve_once))


def of_rank(rank, n=12, number=1):
    roots = RNG.normal(size=(number, n, rank))
    return roots @ np.swapaxes(roots, 1, 2)


def test_a_damped_matrix_is_solved_by_cholesky():
    (matrix,), b = of_rank(5), RNG.normal(size=12)
    d, eigen_taken = SOLVE(matrix, 0.1, b)
    np.testing.assert_allclose(d, np.linalg.solve(matrix + 0.1 * np.eye(12), b), rtol=1e-10)
    assert not eigen_taken


def test_without_damping_a_full_rank_matrix_is_inverted():
    (matrix,), b = of_rank(30), RNG.normal(size=12)
    d, eigen_taken = SOLVE(matrix, 0.0, b)
    np.testing.assert_allclose(d, np.linalg.solve(matrix, b), rtol=1e-9)
    assert eigen_taken


@pytest.mark.smoke
def test_singular_matrices_on_which_cholesky_succeeds_with_garbage():
    matrices, b = of_rank(11, number=200), RNG.normal(size=(200, 12))
    expected = np.stack(
        [
            np.linalg.pinv(m, rcond=1e-12, hermitian=True) @ v
            for m, v in zip(matrices, b, strict=True)
        ]
    )
    scale = np.linalg.norm(expected, axis=-1)

    @jax.jit
    @jax.vmap
    def by_cholesky(matrix, b):
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), b)

    # The problem is real: a good share of the factors gives numbers, and wrong ones.
    plain = np.asarray(by_cholesky(matrices, b))
    finite = np.isfinite(plain).all(axis=-1)
    assert finite.mean() > 0.1
    assert np.median(np.linalg.norm(plain - expected, axis=-1)[finite] / scale[finite]) > 0.1

    d, eigen_taken = LANES(matrices, np.zeros(200), b)
    assert np.max(np.linalg.norm(d - expected, axis=-1) / scale) < 1e-6
    assert eigen_taken.all()


def test_damping_below_rounding_stays_finite():
    # Pivots of pure rounding lie on both sides of the threshold.
    matrices, b = of_rank(11, number=200), RNG.normal(size=(200, 12))
    d, eigen_taken = LANES(matrices, np.full(200, 1e-18), b)
    assert 0.5 < eigen_taken.mean() < 1
    assert np.isfinite(d).all()


@pytest.mark.parametrize("damping", [1e-18, 1e-30, 1e-300])
def test_a_pivot_below_eps_times_the_largest_takes_the_eigendecomposition(damping):
    matrix, b = np.diag([1.0, 0.5, 0.5 * EPS, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    d, eigen_taken = SOLVE(matrix, damping, b)
    assert eigen_taken
    np.testing.assert_allclose(d, [1, 2, 0, 0], rtol=1e-12)
    assert not SOLVE(np.diag([1.0, 0.5, 4 * EPS, 4 * EPS]), damping, b)[1]


def test_an_indefinite_matrix_is_solved_with_the_signs_of_its_eigenvalues():
    matrix, b = np.diag([3.0, -2.0, 0.0]) @ np.eye(3), np.array([3.0, 4.0, 5.0])
    d, eigen_taken = SOLVE(matrix, 0.5, b, definite=False)
    np.testing.assert_allclose(d, [3 / 3.5, 4 / -1.5, 10], rtol=1e-12)
    assert eigen_taken
    np.testing.assert_allclose(SOLVE(matrix, 0.0, b, definite=False)[0], [1, -2, 0], atol=1e-12)
    # As part of a semi-definite matrix the negative eigenvalue is rounding, cut like a null one.
    np.testing.assert_allclose(SOLVE(matrix, 0.0, b)[0], [1, 0, 0], atol=1e-12)


def test_lanes_of_which_one_needs_the_eigendecomposition():
    matrices, b = of_rank(30, number=3), RNG.normal(size=(3, 12))
    dampings = np.array([0.1, 0.0, 2.0])
    d, eigen_taken = LANES(matrices, dampings, b)
    assert eigen_taken.tolist() == [False, True, False]
    for i in range(3):
        damped = matrices[i] + dampings[i] * np.eye(12)
        np.testing.assert_allclose(d[i], np.linalg.solve(damped, b[i]), rtol=1e-9)


def test_the_eigendecomposition_runs_only_where_some_lane_needs_it(monkeypatch):
    runs, eigen = [], _symmetric.eigen

    def counted(matrix, **settings):
        jax.debug.callback(lambda: runs.append(None))
        return eigen(matrix, **settings)

    monkeypatch.setattr(_symmetric, "eigen", counted)
    # New functions: those compiled above know nothing of the counter.
    single = jax.jit(lambda *args: solve_once(*args))
    lanes = jax.jit(jax.vmap(lambda *args: solve_once(*args)))
    matrices, b = of_rank(30, number=3), RNG.normal(size=(3, 12))

    def count(solve, *args):
        runs.clear()
        jax.block_until_ready(solve(*args))
        jax.effects_barrier()
        return len(runs)

    assert count(single, matrices[0], 0.1, b[0]) == 0
    assert count(single, matrices[0], 0.0, b[0]) == 1
    assert count(lanes, matrices, np.full(3, 0.1), b) == 0
    assert count(lanes, matrices, np.array([0.1, 0.0, 0.1]), b) > 0


@pytest.mark.parametrize(
    ("matrix", "damping", "expected"),
    [
        (np.zeros((0, 0)), 0.0, []),
        (np.zeros((2, 2)), 0.0, [0, 0]),
        (np.zeros((2, 2)), 0.5, [2, 4]),
        (np.array([[4.0]]), 0.0, [0.25]),
        (np.array([[4.0]]), 1.0, [0.2]),
    ],
    ids=["empty", "null", "null damped", "one", "one damped"],
)
def test_small_matrices(matrix, damping, expected):
    b = np.arange(1.0, len(matrix) + 1)
    np.testing.assert_allclose(SOLVE(matrix, damping, b)[0], expected)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_numbers_that_are_not_finite_stay_so(damping):
    (matrix,) = of_rank(5)
    matrix[3, 4] = matrix[4, 3] = np.nan
    assert not np.isfinite(SOLVE(matrix, damping, np.ones(12))[0]).all()


@pytest.mark.parametrize("definite", [True, False])
def test_null_eigenvalues_are_exactly_zero(definite):
    (matrix,) = of_rank(7)
    values, _ = jax.jit(_symmetric.eigen, static_argnames="definite")(matrix, definite=definite)
    assert np.count_nonzero(values) == 7
    np.testing.assert_allclose(values[-7:], np.linalg.eigvalsh(matrix)[-7:], rtol=1e-10)


def test_the_cut_is_eps_times_order_times_largest_eigenvalue():
    cut = EPS * 4 * 10
    spectrum = np.array([-5.0, 0.5 * cut, 2 * cut, 10.0])
    positive, _ = jax.jit(lambda m: _symmetric.eigen(m, definite=True))(np.diag(spectrum))
    np.testing.assert_array_equal(positive, [0, 0, 2 * cut, 10])
    signed, _ = jax.jit(lambda m: _symmetric.eigen(m, definite=False))(np.diag(spectrum))
    np.testing.assert_array_equal(signed, [-5, 0, 2 * cut, 10])


@pytest.mark.parametrize(
    ("values", "damping", "expected"),
    [
        ([0.0, 2.0], 0.0, [0.0, 0.5]),
        ([0.0, 2.0], 1e-30, [1e30, 0.5]),
        ([-1.0, 2.0], 1.0, [0.0, 1 / 3]),
        ([-1.0, 2.0], 0.0, [-1.0, 0.5]),
    ],
    ids=["null", "null damped", "cancelled by the damping", "negative"],
)
def test_damped_inverse(values, damping, expected):
    inverse = _symmetric.damped_inverse(jnp.asarray(values), jnp.asarray(damping))
    np.testing.assert_allclose(inverse, expected)


def test_solve_in_range_is_the_pseudo_inverse_on_the_range():
    (matrix,) = of_rank(5)
    b = matrix @ RNG.normal(size=12)

    @jax.jit
    def solve(matrix, b):
        damping = jnp.asarray(0.1)
        factor = _symmetric.factorize(matrix, damping)
        return _symmetric.solve_in_range(jnp.linalg.norm(matrix), damping, factor.solve, b)

    expected = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True) @ b
    np.testing.assert_allclose(solve(matrix, b), expected, atol=1e-7 * np.linalg.norm(expected))
    np.testing.assert_array_equal(solve(matrix, np.zeros(12)), 0)


def test_nested_lanes_in_a_loop_are_decomposed_each_for_itself():
    matrices = of_rank(12, number=6).reshape(2, 3, 12, 12)

    def decomposed(matrix):
        start = _symmetric.Eigen(jnp.zeros(12), jnp.zeros((12, 12)))
        run = lambda carry: (False, _symmetric.eigen(matrix, definite=True, looped=True))
        return jax.lax.while_loop(lambda carry: carry[0], run, (True, start))[1]

    values, vectors = jax.jit(jax.vmap(jax.vmap(decomposed)))(matrices)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), rtol=1e-9)
    np.testing.assert_allclose(matrices @ vectors, vectors * values[..., None, :], atol=1e-9)


#: Ten training loops at once with a solver whose fallback never runs.
LANES_IN_A_LOOP = """
import jax, jax.numpy as jnp, natgrad_jax as ng, optax

model = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
tx = ng.natural_gradient(0.1, ng.exact_fisher(model, ng.Categorical()), solver=ng.cholesky())

def train(key):
    params = {"w": jax.random.normal(key, (4, 16)), "v": jnp.zeros((16, 2))}
    x = jax.random.normal(key, (500, 4))
    loss = lambda p: jnp.mean((model(p, x)[:, 0] - x[:, 0]) ** 2)
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=x)
        return (optax.apply_updates(params, updates), state), None
    return jax.lax.scan(step, (params, tx.init(params)), length=50)[0]

jax.block_until_ready(jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 10)))
"""


def test_lanes_of_a_loop_with_a_fallback_come_to_an_end():
    """With a batch of eigendecompositions in that loop jaxlib 0.10.2 waits for ever."""
    # The flags of these tests hide it.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", LANES_IN_A_LOOP]
    subprocess.run(command, check=True, timeout=120, env=environment)

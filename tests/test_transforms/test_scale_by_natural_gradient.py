"""Schedules, damping as an argument, momentum (E7), keys, singular and non-finite input, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax_contract import cases
from optax_contract import oracle

import natgrad_jax as ng

EPS = np.finfo(np.float64).eps
ROUNDING = 100  # the condition number of F + damping I
AUTOMATIC = "scale_by_natural_gradient-automatic"
EXACT = cases.METRICS["exact_fisher"]


def matrix(params, batch):
    return oracle.matrix("exact_fisher", params, batch)


def run(tx, steps, params, grads, batch, **extra):
    """The updates of several steps at the same place, and the last state."""
    state, path = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, batch=batch, **extra)
        path.append(oracle.ravel(updates))
    return path, state


# Damping


def test_a_damping_schedule_sees_the_update_count(x64):
    params, grads, batch = arrays = cases.arrays()
    tx = ng.scale_by_natural_gradient(
        EXACT, damping=lambda count: 0.5 * 0.25 ** count.astype("float64")
    )
    path, state = run(tx, 3, *arrays)
    for k, got in enumerate(path):
        expected = oracle.solve(matrix(params, batch), 0.5 * 0.25**k, oracle.ravel(grads))
        oracle.close(got, expected, EPS, ROUNDING)
    assert int(state.count) == 3
    np.testing.assert_allclose(state.info.damping, 0.5 * 0.25**2, rtol=1e-6)


@pytest.mark.parametrize("own", [0.3, lambda count: 0.3], ids=["constant", "schedule"])
def test_damping_as_an_argument_of_update_goes_before(own, x64):
    params, grads, batch = arrays = cases.arrays()
    tx = ng.scale_by_natural_gradient(EXACT, damping=own)
    for extra, used in (({}, 0.3), ({"damping": 0.05}, 0.05), ({"damping": jnp.asarray(2.0)}, 2.0)):
        (got,), state = run(tx, 1, *arrays, **extra)
        oracle.close(
            got, oracle.solve(matrix(params, batch), used, oracle.ravel(grads)), EPS, ROUNDING
        )
        np.testing.assert_allclose(state.info.damping, used, rtol=1e-6)


# Momentum


def spring(fisher, steps, damping, momentum, g, solve_with=None):
    """E7 in parameter space: phi = mu phi + (F + lambda I)^-1 (g - mu F phi)."""
    solve_with = fisher if solve_with is None else solve_with
    phi, path = np.zeros_like(g), []
    for k in range(steps):
        mu = momentum(k) if callable(momentum) else momentum
        phi = mu * phi + oracle.solve(solve_with, damping, g - mu * fisher @ phi)
        path.append(phi)
    return path


def spring_in_sample_space(rows, steps, damping, momentum, residual):
    """E7, for g = R^T r: phi = mu phi + R^T (R R^T + lambda I)^-1 (r - mu R phi)."""
    phi, path = np.zeros(rows.shape[1]), []
    for _ in range(steps):
        inner = oracle.solve(rows @ rows.T, damping, residual - momentum * rows @ phi)
        phi = momentum * phi + rows.T @ inner
        path.append(phi)
    return path


@pytest.mark.parametrize(
    "solver", ["automatic", "woodbury", "cg_diagonal", "diagonal", "block_diagonal"]
)
def test_e7_momentum_is_spring_in_parameter_space(solver, x64):
    """For an approximate solver its own matrix solves, and F itself carries the momentum."""
    params, grads, batch = arrays = cases.arrays()
    row, fisher = cases.SOLVERS[solver], matrix(params, batch)
    tx = ng.scale_by_natural_gradient(EXACT, solver=row.solver, damping=cases.DAMPING, momentum=0.6)
    structured = oracle.structured(fisher, row.structure, params)
    expected = spring(fisher, 3, cases.DAMPING, 0.6, oracle.ravel(grads), structured)
    got, state = run(tx, 3, *arrays)
    for a, b in zip(got, expected, strict=True):
        oracle.close(a, b, EPS, 10 * ROUNDING * max(1, row.tolerance / EPS))
    np.testing.assert_array_equal(oracle.ravel(state.velocity), got[-1])


@pytest.mark.parametrize("damping", [0.0, cases.DAMPING])
@pytest.mark.parametrize("solver", ["automatic", "woodbury", "cg_diagonal"])
def test_e7_momentum_is_spring_in_sample_space(solver, damping, x64):
    """With the gradient R^T r in the row space, also for a singular F without damping."""
    params, _, batch = cases.arrays()
    rows = oracle.rows("exact_fisher", params, batch)
    residual = np.random.default_rng(5).normal(size=len(rows))
    g = rows.T @ residual
    grads = {"b": jnp.asarray(g[:2]), "w": jnp.asarray(g[2:].reshape(3, 2))}
    row = cases.SOLVERS[solver]
    tx = ng.scale_by_natural_gradient(EXACT, solver=row.solver, damping=damping, momentum=0.6)
    expected = spring_in_sample_space(rows, 3, damping, 0.6, residual)
    # Without damping the condition number is that of F on its range.
    tolerance = 10 * oracle.amplification(rows.T @ rows, damping, row.tolerance, EPS)
    for a, b in zip(run(tx, 3, params, grads, batch)[0], expected, strict=True):
        oracle.close(a, b, EPS, tolerance)
    # The control: heavy-ball momentum, which does not know F, is another path.
    heavy = oracle.solve(rows.T @ rows, damping, g) * 1.6
    assert np.linalg.norm(heavy - expected[1]) > 1e-2 * np.linalg.norm(expected[1])


def test_a_momentum_schedule_sees_the_update_count(x64):
    params, grads, batch = arrays = cases.arrays()
    schedule = lambda count: 0.8 * 0.5 ** count.astype("float64")
    tx = ng.scale_by_natural_gradient(EXACT, damping=cases.DAMPING, momentum=schedule)
    expected = spring(
        matrix(params, batch), 3, cases.DAMPING, lambda k: 0.8 * 0.5**k, oracle.ravel(grads)
    )
    for a, b in zip(run(tx, 3, *arrays)[0], expected, strict=True):
        oracle.close(a, b, EPS, 10 * ROUNDING)


def test_without_momentum_there_is_no_buffer():
    params, _, _ = cases.arrays()
    assert cases.transformation(AUTOMATIC).init(params).velocity is None
    velocity = ng.scale_by_natural_gradient(EXACT, momentum=0.0).init(params).velocity
    assert jax.tree.structure(velocity) == jax.tree.structure(params)


# Keys


def sampled(key, steps=2):
    metric = cases.METRICS["sampled_fisher"]
    tx = ng.scale_by_natural_gradient(metric, damping=cases.DAMPING, key=key)
    return run(tx, steps, *cases.arrays())


def test_an_int_a_typed_and_a_legacy_key_draw_the_same_samples(x64):
    expected, state = sampled(11)
    assert state.key.dtype == jnp.uint32
    for key in (jax.random.key(11), jax.random.PRNGKey(11), jnp.asarray(11), np.int32(11)):
        got, other = sampled(key)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(other.key, state.key)


def test_keys_of_another_implementation_work(x64):
    params, grads, batch = cases.arrays()
    metric = cases.METRICS["sampled_fisher"]
    tx = ng.scale_by_natural_gradient(metric, key=jax.random.key(3, impl="rbg"))
    state = tx.init(params)
    assert state.key.shape == (4,)
    _, new = jax.eval_shape(lambda s: tx.update(grads, s, params, batch=batch), state)
    assert new.key.shape == (4,)


def test_seeds_differ_and_every_update_draws_anew(x64):
    (first, second), state = sampled(0)
    assert np.linalg.norm(second - first) > 1e-3 * np.linalg.norm(first)
    assert np.linalg.norm(sampled(1)[0][0] - first) > 1e-3 * np.linalg.norm(first)
    np.testing.assert_array_equal(sampled(0)[0], [first, second])
    keys = [np.asarray(sampled(0, n)[1].key).tolist() for n in (1, 2)]
    assert keys[0] != keys[1] == np.asarray(state.key).tolist()


def test_without_sampling_no_update_depends_on_the_key(x64):
    """The control for the test above."""
    tx = ng.scale_by_natural_gradient(EXACT, damping=cases.DAMPING, key=4)
    (first, second), _ = run(tx, 2, *cases.arrays())
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(
        first, run(cases.transformation(AUTOMATIC), 1, *cases.arrays())[0][0]
    )


# Values that cannot be right: what comes out


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("solver", cases.SOLVERS)
def test_gradients_that_are_not_finite_come_out_so(solver, bad, x64):
    """`optax.apply_if_finite` looks at updates and gradients; iterations could hide a NaN."""
    params, grads, batch = cases.arrays()
    tx = cases.transformation(f"scale_by_natural_gradient-{solver}")
    grads = {**grads, "w": grads["w"].at[1, 1].set(bad)}
    (got,), _ = run(tx, 1, params, grads, batch)
    assert not np.all(np.isfinite(got))


@pytest.mark.parametrize("damping", [0.0, cases.DAMPING])
@pytest.mark.parametrize("solver", cases.SOLVERS)
def test_h6_a_zero_gradient_gives_a_zero_step(solver, damping, x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation(f"scale_by_natural_gradient-{solver}")
    zero = jax.tree.map(jnp.zeros_like, grads)
    (got,), state = run(tx, 1, params, zero, batch, damping=damping)
    np.testing.assert_array_equal(got, 0)
    assert not np.any(np.isnan(oracle.ravel(state.info)))


def certain(params, batch):
    """Inputs of zero and a saturated class: F is zero, in float32 exactly."""
    params = {**params, "b": jnp.asarray([200.0, -200.0], params["b"].dtype)}
    batch = {**batch, "x": jnp.zeros_like(batch["x"])}
    assert np.max(np.abs(matrix(params, batch))) < 1e-150
    return params, batch


def duplicated(batch):
    """Four copies of one example: F has rank 1."""
    return jax.tree.map(lambda x: jnp.tile(x[:1], (4,) + (1,) * (x.ndim - 1)), batch)


@pytest.mark.parametrize("solver", cases.EXACT)
def test_damping_zero_is_the_pseudo_inverse_of_a_singular_matrix(solver, x64):
    params, grads, batch = cases.arrays()
    batch = duplicated(batch)
    row, fisher = cases.SOLVERS[solver], matrix(params, batch)
    assert np.linalg.matrix_rank(fisher, rtol=1e-10) == 1
    tx = cases.transformation(f"scale_by_natural_gradient-{solver}")
    (got,), _ = run(tx, 1, params, grads, batch, damping=0.0)
    expected = oracle.solve(fisher, 0, oracle.ravel(grads))
    # One eigenvalue: nothing but the part of g in the range, a tenth of g, magnifies rounding.
    oracle.close(got, expected, EPS, 10 * max(1, row.tolerance / EPS))


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("solver", [name for name in cases.SOLVERS if name != "automatic"])
def test_float32_without_damping_is_never_nan(solver, rank):
    params, grads, batch = cases.arrays("float32")
    batch = duplicated(batch) if rank == 1 else batch
    if rank == 0:
        params, batch = certain(params, batch)
    tx = cases.transformation(f"scale_by_natural_gradient-{solver}")
    (got,), state = run(tx, 1, params, grads, batch, damping=0.0)
    assert np.all(np.isfinite(got))
    assert not np.any(np.isnan(oracle.ravel(state.info)))
    if rank == 0:
        # The pseudo-inverse of zero is zero.
        np.testing.assert_array_equal(got, 0)


def test_a_tiny_damping_is_not_damping_zero(x64):
    """The control, and the documented jump: outside the range g is divided by the damping."""
    params, grads, batch = cases.arrays()
    tx, batch = cases.transformation(AUTOMATIC), duplicated(batch)
    (tiny,), _ = run(tx, 1, params, grads, batch, damping=1e-12)
    (zero,), _ = run(tx, 1, params, grads, batch, damping=0.0)
    assert np.linalg.norm(tiny) > 1e9 * np.linalg.norm(zero)


# dtypes


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_steps_beyond_the_range_of_the_gradients_dtype_saturate(dtype, x64):
    """F is zero, so that g is divided by the damping alone."""
    params, _, batch = cases.arrays("float64")
    params, batch = certain(params, batch)
    values = {"b": [1.0, -3.0], "w": [[0.0, 1e-3], [2.0, 1.0], [-1.0, 0.0]]}
    grads = {k: jnp.asarray(v, dtype) for k, v in values.items()}
    largest = float(jnp.finfo(dtype).max)
    (got,), _ = run(cases.transformation(AUTOMATIC), 1, params, grads, batch, damping=0.1 / largest)
    expected = np.clip(oracle.ravel(grads) * (largest / 0.1), -largest, largest)
    np.testing.assert_allclose(got, expected, rtol=2 * float(jnp.finfo(dtype).eps))
    assert list(np.abs(got) == largest) == [1, 1, 0, 0, 1, 1, 1, 0]


# Arguments


def test_a_forgotten_batch_is_a_type_error_also_under_jit():
    params, grads, _ = cases.arrays()
    tx = cases.transformation(AUTOMATIC)
    with pytest.raises(TypeError, match="scale_by_natural_gradient: .*`batch`"):
        jax.jit(tx.update)(grads, tx.init(params), params)


def test_none_is_a_batch(x64):
    """For metrics that need no data."""
    params, grads, _ = cases.arrays()
    tx = cases.transformation("scale_by_natural_gradient-euclidean")
    (got,), _ = run(tx, 1, params, grads, None)
    oracle.close(got, oracle.ravel(grads) / (1 + cases.DAMPING), EPS)


@pytest.mark.smoke
@pytest.mark.parametrize("solver", cases.SOLVERS)
def test_info_has_the_same_fields_and_the_truth_for_every_solver(solver, x64):
    params, grads, batch = arrays = cases.arrays()
    row, fisher, g = cases.SOLVERS[solver], matrix(params, batch), oracle.ravel(grads)
    (d,), state = run(cases.transformation(f"scale_by_natural_gradient-{solver}"), 1, *arrays)
    info = state.info
    assert type(info) is ng.NaturalGradientInfo
    np.testing.assert_allclose(info.grad_dot_direction, g @ d, rtol=1e-5)
    assert (int(info.iterations) > 0) == ("cg" in solver)
    if row.structure == "dense":
        # Rounding of a float64 solve, or what cg was asked for; read off in float32.
        residual = np.linalg.norm(fisher @ d + cases.DAMPING * d - g) / np.linalg.norm(g)
        assert float(info.relative_residual) <= 1.01 * row.tolerance + 1e3 * EPS
        assert residual <= 1.01 * row.tolerance + 1e3 * EPS
    else:
        assert float(info.relative_residual) == -1

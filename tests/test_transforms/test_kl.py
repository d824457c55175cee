"""`scale_to_kl`, `clip_by_kl` and `max_kl`: H1, H2, H6, and which Fisher matrix measures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax_contract import cases
from optax_contract import oracle

import natgrad_jax as ng

EPS = np.finfo(np.float64).eps
KL = 0.1
# Not the sampled Fisher matrix: distances are measured by the exact one.
MEASURED_BY = {
    "exact_fisher": "exact_fisher",
    "sampled_fisher": "exact_fisher",
    "empirical_fisher": "empirical_fisher",
    "gauss_newton": "gauss_newton",
    "euclidean": "euclidean",
}


def step(tx, updates, params, batch):
    return tx.update(updates, tx.init(params), params, batch=batch)


def divergence(metric, params, batch, d):
    v = oracle.ravel(d)
    return v @ oracle.matrix(metric, params, batch) @ v / 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("metric", MEASURED_BY)
def test_h1_a_scaled_step_moves_exactly_that_far(metric, sign, x64):
    params, grads, batch = cases.arrays()
    d = jax.tree.map(lambda g: sign * g, grads)
    scaled, state = step(ng.scale_to_kl(cases.METRICS[metric], KL), d, params, batch)
    by = MEASURED_BY[metric]
    np.testing.assert_allclose(divergence(by, params, batch, scaled), KL, rtol=100 * EPS)
    # Only the length has changed, not direction or sign; info is kept in float32.
    factor = np.sqrt(KL / divergence(by, params, batch, d))
    oracle.close(scaled, factor * oracle.ravel(d), EPS)
    np.testing.assert_allclose(state.info.factor, factor, rtol=1e-6)
    np.testing.assert_allclose(state.info.kl, divergence(by, params, batch, d), rtol=1e-6)


def test_another_matrix_measures_another_distance(x64):
    """The control: H1 fails visibly where a wrong matrix measures."""
    params, grads, batch = cases.arrays()
    scaled, _ = step(ng.scale_to_kl(cases.METRICS["exact_fisher"], KL), grads, params, batch)
    for other in ("empirical_fisher", "gauss_newton", "euclidean"):
        assert abs(divergence(other, params, batch, scaled) / KL - 1) > 0.1
    metric = cases.METRICS["sampled_fisher"]
    sampled = ng.fisher_quadratic_form(metric, params, batch, scaled, key=jax.random.key(0)) / 2
    assert abs(float(sampled) / KL - 1) > 0.01


def test_the_quadratic_divergence_is_the_true_one_for_short_steps(x64):
    """T4, and the control: for long steps it is not."""
    params, grads, batch = cases.arrays()

    def ratio(kl):
        d, _ = step(ng.scale_to_kl(cases.METRICS["exact_fisher"], kl), grads, params, batch)
        there = jax.tree.map(jnp.add, params, d)
        _, p, *_ = oracle.forward(params, batch)
        _, q, *_ = oracle.forward(there, batch)
        return np.mean(np.sum(p * np.log(p / q), axis=1)) / kl

    errors = [abs(ratio(kl) - 1) for kl in (1e-8, 1e-6, 1.0)]
    # The error is of the order of the step's length, the root of its divergence.
    assert errors[0] < 1e-3 and errors[1] < 1e-2 and errors[2] > 0.05
    np.testing.assert_allclose(errors[1] / errors[0], 10, rtol=0.05)


@pytest.mark.parametrize("factor", [1e-8, 8.0, 3e5, -2.0])
def test_h2_a_multiplied_objective_gives_the_same_step(factor, x64):
    params, grads, batch = cases.arrays()
    tx = optax.chain(
        cases.transformation("scale_by_natural_gradient-automatic"),
        cases.transformation("scale_to_kl"),
    )
    scaled = jax.tree.map(lambda g: factor * g, grads)
    expected, _ = step(tx, grads, params, batch)
    got, _ = step(tx, scaled, params, batch)
    # Rounding of the gradients, through a system of condition number 100.
    oracle.close(got, np.sign(factor) * oracle.ravel(expected), EPS, 100)
    # The control: without the scaling the step is proportional to the objective.
    plain = cases.transformation("scale_by_natural_gradient-automatic")
    oracle.close(
        step(plain, scaled, params, batch)[0],
        factor * oracle.ravel(step(plain, grads, params, batch)[0]),
        EPS,
        100,
    )


@pytest.mark.parametrize("name", ["scale_to_kl", "clip_by_kl"])
def test_h6_a_zero_step_stays_zero(name, x64):
    params, grads, batch = cases.arrays()
    zero = jax.tree.map(jnp.zeros_like, grads)
    got, state = step(cases.transformation(name), zero, params, batch)
    np.testing.assert_array_equal(oracle.ravel(got), 0)
    assert (float(state.info.kl), float(state.info.factor)) == (0.0, 1.0)


def test_clipping_shortens_long_steps_and_leaves_short_ones_alone(x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation("clip_by_kl")
    root = np.sqrt(KL / divergence("exact_fisher", params, batch, grads))
    for factor in (1.001 * root, 50.0 * root, -3.0 * root):
        got, _ = step(tx, optax.tree.scale(factor, grads), params, batch)
        np.testing.assert_allclose(
            divergence("exact_fisher", params, batch, got), KL, rtol=100 * EPS
        )
        oracle.close(got, np.sign(factor) * root * oracle.ravel(grads), EPS)
    for factor in (0.999 * root, -0.1 * root):
        short = optax.tree.scale(factor, grads)
        jax.tree.map(np.testing.assert_array_equal, step(tx, short, params, batch)[0], short)


def saddle(params, batch):
    return params[0] ** 2 - params[1] ** 2


@pytest.mark.parametrize("transformation", [ng.scale_to_kl, ng.clip_by_kl])
def test_a_step_without_positive_length_is_left_alone(transformation, x64):
    tx, params = transformation(ng.hessian(saddle), 1e-3), jnp.zeros(3)
    for d in ([0.0, 5.0, 0.0], [3.0, 3.0, 1.0], [0.0, 0.0, 7.0]):
        got, _ = step(tx, jnp.asarray(d), params, None)
        np.testing.assert_array_equal(got, d)
    # The control: where the length is positive, it is taken.
    got, _ = step(tx, jnp.asarray([5.0, 1.0, 0.0]), params, None)
    np.testing.assert_allclose(got[0] ** 2 - got[1] ** 2, 1e-3, rtol=100 * EPS)


@pytest.mark.parametrize("name", ["scale_to_kl", "clip_by_kl"])
def test_a_step_that_is_not_finite_stays_so(name, x64):
    params, grads, batch = cases.arrays()
    bad = {**grads, "b": grads["b"].at[1].set(jnp.nan)}
    got, _ = step(cases.transformation(name), bad, params, batch)
    assert np.isnan(got["b"][1])


@pytest.mark.parametrize("exponent", [-37, 37])
def test_lengths_near_the_limits_of_float32_are_measured(exponent):
    """Squares of such steps underflow or overflow."""
    params, grads, batch = cases.arrays()
    d = jax.tree.map(lambda g: g * 10.0**exponent, grads)
    got, _ = step(cases.transformation("scale_to_kl"), d, params, batch)
    eps = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(divergence("exact_fisher", params, batch, got), KL, rtol=100 * eps)


@pytest.mark.smoke
def test_the_step_that_natural_gradient_applies_obeys_max_kl(x64):
    """Also while a schedule moves the learning rate: the limit comes after it."""
    params, grads, batch = cases.arrays()
    arguments = dict(damping=cases.DAMPING, metric=cases.METRICS["exact_fisher"])
    schedule = optax.exponential_decay(4.0, 1, 0.25)
    limited = ng.natural_gradient(schedule, max_kl=KL, **arguments)
    free = ng.natural_gradient(schedule, **arguments)
    states = limited.init(params), free.init(params)
    moved = []
    for _ in range(8):
        a, first = limited.update(grads, states[0], params, batch=batch)
        b, second = free.update(grads, states[1], params, batch=batch)
        states = first, second
        moved.append([divergence("exact_fisher", params, batch, d) for d in (a, b)])
    clipped, unclipped = np.transpose(moved)
    np.testing.assert_allclose(clipped, np.minimum(unclipped, KL), rtol=1e4 * EPS)
    assert unclipped[0] > 10 * KL and unclipped[-1] < KL / 10


@pytest.mark.parametrize("key", range(3))
def test_a_sampled_direction_is_limited_by_the_exact_fisher_matrix(key, x64):
    params, grads, batch = cases.arrays()
    tx = ng.natural_gradient(
        10.0, cases.METRICS["sampled_fisher"], damping=cases.DAMPING, max_kl=KL, key=key
    )
    d, state = step(tx, grads, params, batch)
    assert float(state[-1].info.factor) < 1
    np.testing.assert_allclose(divergence("exact_fisher", params, batch, d), KL, rtol=1e3 * EPS)

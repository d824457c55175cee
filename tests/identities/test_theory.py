"""The statements T1-T9 that natural gradients rest on, in float64."""

# ruff: noqa: N802 - tests carry the tag of the statement they show

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

TOL = 1e4 * np.finfo(np.float64).eps
VISIBLE = 0.1
RNG = np.random.default_rng(2)

# A nonlinear classifier with P = 2 * 3 + 3 * 3 parameters, five inputs and three classes.
X = RNG.normal(size=(5, 2))
THETA = RNG.normal(size=15)
STEP = RNG.normal(size=15)
LABELS = np.array([0, 2, 1, 1, 0])
CATEGORICAL = ng.Categorical()


def network(theta, x):
    return jnp.tanh(x @ theta[:6].reshape(2, 3)) @ theta[6:].reshape(3, 3)


def log_prob(theta, batch):
    return CATEGORICAL.log_prob(network(theta, batch[0]), batch[1])


EXACT = ng.exact_fisher(network, CATEGORICAL)
EMPIRICAL = ng.empirical_fisher(log_prob)


def error(value, expected: np.ndarray) -> float:
    return np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected)


@functools.cache
def probabilities() -> np.ndarray:
    return scipy.special.softmax(np.asarray(jax.jit(network)(THETA, X)), axis=-1)


@functools.cache
def scores_of_every_outcome() -> np.ndarray:
    """grad log p(y = k | x_n) as (classes, N, P)."""
    outcome = lambda k: ng.score(log_prob, THETA, (X, np.full(5, k)))
    return np.stack([np.asarray(outcome(k)) for k in range(3)])


def mean_kl(theta_p, theta_q) -> float:
    return float(ng.kl_divergence(network, CATEGORICAL, theta_p, theta_q, X))


@functools.cache
def exact_matrix() -> np.ndarray:
    return np.asarray(ng.fisher_matrix(EXACT, THETA, X))


def test_T1_score_has_zero_mean():
    p, s = probabilities(), scores_of_every_outcome()
    np.testing.assert_allclose(np.einsum("nk,knp->np", p, s), 0, atol=TOL)
    other = scipy.special.softmax(np.log(p) + np.array([1.0, 0.0, -1.0]), axis=-1)
    assert np.abs(np.einsum("nk,knp->np", other, s)).max() > VISIBLE


def test_T2_fisher_is_the_second_moment_of_scores_of_the_models_own_samples():
    p, s = probabilities(), scores_of_every_outcome()
    assert error(np.einsum("nk,knp,knq->pq", p, s, s) / 5, exact_matrix()) < TOL

    draws = np.array([RNG.choice(3, size=4000, p=row) for row in p])
    own = s[draws, np.arange(5)[:, None]].reshape(-1, 15)
    at_data = s[LABELS, np.arange(5)]
    assert error(own.T @ own / len(own), exact_matrix()) < 0.05
    assert error(at_data.T @ at_data / 5, exact_matrix()) > 0.3
    empirical = ng.fisher_matrix(EMPIRICAL, THETA, (X, LABELS))
    assert error(empirical, at_data.T @ at_data / 5) < TOL


def test_T3_fisher_is_minus_the_expected_hessian_of_the_log_probability():
    hessian = jax.jit(jax.hessian(lambda t, w: jnp.sum(w * jax.nn.log_softmax(network(t, X)))))
    expected = -np.asarray(hessian(THETA, probabilities() / 5))
    at_data = -np.asarray(hessian(THETA, np.eye(3)[LABELS] / 5))
    assert error(expected, exact_matrix()) < TOL
    assert error(at_data, exact_matrix()) > VISIBLE


@pytest.mark.smoke
def test_T4_kl_is_half_the_quadratic_form_to_third_order():
    form = STEP @ exact_matrix() @ STEP

    def remainders(size):
        q = THETA + size * STEP
        forward, backward = mean_kl(THETA, q), mean_kl(q, THETA)
        return np.array([forward - size**2 * form / 2, backward - size**2 * form / 2])

    large, small = remainders(2e-3), remainders(1e-3)
    np.testing.assert_allclose(large / small, 8, rtol=0.05)
    # The two directions agree to that order and no further.
    assert error(large[0], large[1]) > VISIBLE
    gradient = jax.jit(jax.grad(lambda q: ng.kl_divergence(network, CATEGORICAL, THETA, q, X)))
    np.testing.assert_allclose(gradient(THETA), 0, atol=TOL)
    assert np.linalg.norm(gradient(THETA + STEP)) > VISIBLE


def test_T5_fisher_is_symmetric_positive_and_bilinear():
    fisher = exact_matrix()
    np.testing.assert_allclose(fisher, fisher.T, atol=TOL)
    assert np.linalg.eigvalsh(fisher).min() > -TOL
    v, w = RNG.normal(size=(2, 15))
    product = lambda v: np.asarray(ng.fisher_vector_product(EXACT, THETA, X, v))
    assert error(product(2 * v - 3 * w), 2 * product(v) - 3 * product(w)) < TOL
    assert w @ product(v) == pytest.approx(v @ product(w), rel=TOL)

    loss = ng.hessian(lambda t, batch: -jnp.mean(log_prob(t, batch)))
    hessian = np.asarray(ng.fisher_matrix(loss, THETA, (X, LABELS)))
    assert np.linalg.eigvalsh(hessian).min() < -0.01


def test_T5_fisher_transforms_as_a_metric_and_the_hessian_does_not():
    # theta = phi + phi^3 / 3, one to one, with Jacobian diag(1 + phi^2).
    to_theta = lambda phi: phi + phi**3 / 3
    phi = RNG.normal(size=15)
    jacobian = np.diag(1 + phi**2)
    loss = lambda t, batch: -jnp.mean(log_prob(t, batch))

    def relative(of_theta, of_phi, batch):
        here = np.asarray(ng.fisher_matrix(of_theta, to_theta(phi), batch))
        return error(ng.fisher_matrix(of_phi, phi, batch), jacobian.T @ here @ jacobian)

    mapped = ng.exact_fisher(lambda phi, x: network(to_theta(phi), x), CATEGORICAL)
    assert relative(EXACT, mapped, X) < TOL
    mapped_loss = ng.hessian(lambda phi, batch: loss(to_theta(phi), batch))
    assert relative(ng.hessian(loss), mapped_loss, (X, LABELS)) > 0.01


def test_T5_fisher_is_smooth_in_the_parameters():
    matrix = lambda size: np.asarray(ng.fisher_matrix(EXACT, THETA + size * STEP, X))
    slope = lambda size: (matrix(size) - matrix(-size)) / (2 * size)
    assert error(slope(1e-3), slope(1e-4)) < 1e-4
    assert np.linalg.norm(slope(1e-4)) > VISIBLE


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_T6_no_direction_of_unit_norm_is_steeper(norm, order):
    g = RNG.normal(size=4)
    d = np.asarray(ng.scale_by_steepest_descent(norm).update(g, optax.EmptyState())[0])
    assert np.linalg.norm(d, order) == pytest.approx(1, rel=TOL)
    rivals = RNG.normal(size=(20000, 4))
    slopes = rivals @ g
    assert np.max(slopes / np.linalg.norm(rivals, order, axis=-1)) <= g @ d * (1 + TOL)
    # Measured in the other norm it is not the steepest.
    other = 3 - order
    assert np.max(slopes / np.linalg.norm(rivals, other, axis=-1)) > g @ d / np.linalg.norm(
        d, other
    )


def test_T6_steepest_descent_in_the_norm_of_the_hessian_is_newton():
    root = RNG.normal(size=(4, 4))
    hessian, optimum, start = root @ root.T + np.eye(4), RNG.normal(size=4), RNG.normal(size=4)
    metric = ng.hessian(lambda t, batch: 0.5 * (t - batch[0]) @ (batch[1] @ (t - batch[0])))
    g = hessian @ (start - optimum)
    d, _ = ng.natural_gradient_direction(metric, start, (optimum, hessian), g, damping=0.0)
    assert error(start - np.asarray(d), optimum) < TOL

    rivals = RNG.normal(size=(20000, 4))
    slope = lambda v: v @ g / np.sqrt(np.einsum("...i,ij,...j", v, hessian, v))
    assert np.max(slope(rivals)) <= slope(np.asarray(d)) * (1 + TOL)
    assert slope(g) < 0.99 * slope(np.asarray(d))


def test_T7_natural_gradient_is_the_best_step_of_its_kl_divergence():
    radius, g = 1e-2, RNG.normal(size=15)
    # Full rank, so that the ball of this radius is bounded.
    x = RNG.normal(size=(20, 2))
    fisher = np.asarray(ng.fisher_matrix(EXACT, THETA, x)) + 1e-3 * np.eye(15)
    direction, _ = ng.natural_gradient_direction(EXACT, THETA, x, g, damping=1e-3)
    multiplier = np.sqrt(2 * radius / (g @ np.linalg.solve(fisher, g)))
    best = -multiplier * np.asarray(direction)
    assert best @ fisher @ best / 2 == pytest.approx(radius, rel=TOL)

    to_radius = lambda v: (
        v * np.sqrt(2 * radius / np.einsum("...i,ij,...j", v, fisher, v))[..., None]
    )
    rivals = to_radius(RNG.normal(size=(20000, 15)))
    assert np.min(rivals @ g) > best @ g
    near = to_radius(best + 0.1 * np.linalg.norm(best) * RNG.normal(size=(20000, 15)))
    assert np.min(near @ g) >= best @ g * (1 - TOL)
    assert to_radius(-g) @ g > 0.9 * (best @ g)


def test_T7_steps_of_constant_kl_move_the_distribution_equally_far():
    # log p is quadratic in the mean: the quadratic KL is the KL.
    model, normal = lambda p, x: x @ p, ng.Normal(0.5)
    metric = ng.exact_fisher(model, normal)
    tx, radius = ng.scale_to_kl(metric, 0.02), 0.02

    def moved(step, x):
        return float(ng.kl_divergence(model, normal, np.zeros(2), step, x))

    euclidean = []
    for stretch in (0.1, 1.0, 10.0):
        x, g = X * stretch, RNG.normal(size=2)
        d, _ = ng.natural_gradient_direction(metric, np.zeros(2), x, g, damping=0.0)
        step, _ = tx.update(d, tx.init(d), np.zeros(2), batch=x)
        assert moved(step, x) == pytest.approx(radius, rel=TOL)
        euclidean.append(moved(0.1 * g / np.linalg.norm(g), x))
    assert max(euclidean) > 100 * min(euclidean)


@functools.cache
def logistic_estimates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates (800, 2) by undamped natural gradient, the true parameters and the inputs."""
    truth, number = np.array([0.5, -1.0]), 200
    first = RNG.normal(size=number)
    x = np.stack([first, first + 0.5 * RNG.normal(size=number)], axis=-1)
    labels = (RNG.uniform(size=(800, number)) < scipy.special.expit(x @ truth)).astype(float)

    @jax.jit
    @jax.vmap
    def fit(y):
        def step(_, p):
            g = x.T @ (jax.nn.sigmoid(x @ p) - y) / number
            return p - ng.natural_gradient_direction(LOGISTIC, p, x, g, damping=0.0)[0]

        return jax.lax.fori_loop(0, 8, step, jnp.zeros(2))

    return np.asarray(fit(labels)), truth, x


LOGISTIC = ng.exact_fisher(lambda p, x: x @ p, ng.Bernoulli())


def test_T8_maximum_likelihood_estimates_scatter_as_the_inverse_fisher_matrix():
    estimates, truth, x = logistic_estimates()
    covariance = np.asarray(ng.asymptotic_covariance(LOGISTIC, truth, x, len(x)))
    # 800 data sets give a covariance to 1 / sqrt(400) = 5 %; the next order in 1 / N adds as much.
    assert error(covariance, np.cov(estimates.T)) < 0.2
    fisher = np.asarray(ng.fisher_matrix(LOGISTIC, truth, x))
    assert error(np.diag(1 / np.diag(fisher)) / len(x), np.cov(estimates.T)) > 0.5


def test_T8_standard_errors_cover_the_truth_as_often_as_they_say():
    estimates, truth, x = logistic_estimates()
    covariance = jax.jit(jax.vmap(lambda p: ng.asymptotic_covariance(LOGISTIC, p, x, len(x))))
    errors = np.sqrt(np.diagonal(np.asarray(covariance(estimates)), axis1=1, axis2=2))
    covered = lambda width: np.mean(np.abs(estimates - truth) < width * errors)
    assert covered(1.96) == pytest.approx(0.95, abs=0.02)
    assert covered(1.0) == pytest.approx(0.68, abs=0.04)


def test_T9_the_matrix_is_square_in_the_parameters_and_its_relatives_are_parts_of_it():
    params = {"v": THETA[6:], "w": THETA[:6]}
    joined = lambda p, x: network(jnp.concatenate([p["w"], p["v"]]), x)
    metric = ng.exact_fisher(joined, CATEGORICAL)
    fisher = np.asarray(ng.fisher_matrix(metric, params, X))
    order = np.r_[6:15, 0:6]
    assert fisher.shape == (15, 15)
    assert error(fisher, exact_matrix()[np.ix_(order, order)]) < TOL

    diagonal = ng.fisher_diagonal(metric, params, X)
    assert error(np.concatenate([diagonal["v"], diagonal["w"]]), np.diag(fisher)) < TOL
    gram = np.asarray(ng.gram_matrix(metric, params, X))
    spectrum = np.linalg.eigvalsh(fisher)
    # Five examples with three columns: as many rows as parameters.
    np.testing.assert_allclose(np.linalg.eigvalsh(gram), spectrum, atol=TOL)

    g = {"v": STEP[6:], "w": STEP[:6]}
    d, _ = ng.natural_gradient_direction(
        metric, params, X, g, solver=ng.block_diagonal(), damping=0.1
    )
    block = np.linalg.solve(fisher[:9, :9] + 0.1 * np.eye(9), g["v"])
    assert error(d["v"], block) < TOL
    assert error(d["v"], np.linalg.solve(fisher + 0.1 * np.eye(15), STEP[order])[:9]) > 0.01


@pytest.mark.usefixtures("standard_promotion")
def test_T9_second_moment_of_adam_is_the_empirical_diagonal_of_the_batch_mean():
    adam = optax.scale_by_adam(b2=0.9)
    g = np.asarray(jax.jit(jax.grad(lambda t: jnp.mean(log_prob(t, (X, LABELS)))))(THETA))
    _, state = adam.update(jnp.asarray(g), adam.init(jnp.asarray(THETA)))
    second_moment = np.asarray(state.nu) / (1 - 0.9)
    of_the_mean = ng.empirical_fisher(
        lambda t, batch: jnp.mean(log_prob(t, batch), keepdims=True), batch_axes=None
    )
    assert (
        error(second_moment, np.asarray(ng.fisher_diagonal(of_the_mean, THETA, (X, LABELS)))) < TOL
    )
    per_example = np.asarray(ng.fisher_diagonal(EMPIRICAL, THETA, (X, LABELS)))
    assert error(second_moment, per_example) > VISIBLE

"""Likelihoods see the whole batch: one constant a row, draws by row, and errors that say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax.likelihoods import from_distribution
from tests.test_likelihoods.facts import Hidden

SCALES = np.array([1.0, 0.5])
X = np.array([1.0, 2.0])
P = np.ones(())


def model(p, x):
    return p * x


class Own(ng.Likelihood):
    """A Gaussian that holds the noise of each row."""

    def __init__(self, scale):
        self.scale = scale

    def log_prob(self, outputs, targets):
        return -0.5 * ((targets - outputs) / self.scale) ** 2

    def sample(self, key, outputs):
        return outputs + self.scale * jax.random.normal(key, outputs.shape, outputs.dtype)

    def kl(self, outputs_p, outputs_q):
        return 0.5 * ((outputs_p - outputs_q) / self.scale) ** 2


class Noisy:
    """A distribution object that closes over the noise of each row."""

    def __init__(self, mean):
        self.mean = mean

    def log_prob(self, value):
        return -0.5 * ((value - self.mean) / jnp.asarray(SCALES, self.mean.dtype)) ** 2

    def sample(self, key):
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.asarray(SCALES, self.mean.dtype) * noise


class Measured(Noisy):
    """The same with a divergence."""

    def kl_divergence(self, other):
        return 0.5 * ((self.mean - other.mean) / jnp.asarray(SCALES, self.mean.dtype)) ** 2


ONE_A_ROW = {
    "own": Own(SCALES),
    "distribution": from_distribution(Measured),
    "normal": ng.Normal(SCALES),
    "wrapped": Hidden(ng.Normal(SCALES)),
    "joint": ng.Joint((Own(SCALES),)),
}


@pytest.mark.parametrize("name", ONE_A_ROW)
def test_a_constant_a_row_gives_the_fisher_matrix(name, x64):
    """F = mean of x^2 / scale^2 = (1 + 16) / 2, in every form, and from samples."""
    likelihood = ONE_A_ROW[name]
    outputs = (lambda p, x: (p * x,)) if name == "joint" else model
    expected = np.mean((X / SCALES) ** 2)
    for independent in (None, True):
        metric = ng.exact_fisher(outputs, likelihood, independent=independent)
        np.testing.assert_allclose(ng.fisher_matrix(metric, P, X), expected, rtol=1e-6)
        product = ng.fisher_vector_product(metric, P, X, P)
        np.testing.assert_allclose(product, expected, rtol=1e-6)
    sampled = ng.sampled_fisher(outputs, likelihood, num_samples=4000)
    found = ng.fisher_matrix(sampled, P, X, key=jax.random.key(1))
    # Of chi^2 draws: rows of shares 1/17 and 16/17, relative deviation sqrt(2 / 4000).
    np.testing.assert_allclose(found, expected, rtol=4 * np.sqrt(2 / 4000))
    q = P + 0.1
    divergence = ng.kl_divergence(outputs, likelihood, P, q, X)
    np.testing.assert_allclose(divergence, 0.005 * expected, rtol=1e-6)
    # The control: rows that share the constants of all.
    wrong = np.mean(X[:, None] ** 2 / SCALES**2)
    assert abs(wrong - expected) > 1


@pytest.mark.parametrize("name", ["own", "normal"])
def test_kronecker_factors_and_directions_take_a_constant_a_row(name, x64):
    params, x = {"w": jnp.ones((2, 1))}, np.array([[1.0, 0.5], [2.0, -1.0]])
    likelihood = ONE_A_ROW[name]
    outputs = lambda p, x: (x @ p["w"])[:, 0]
    metric = ng.exact_fisher(outputs, likelihood)
    grads = {"w": jnp.array([[1.0], [-2.0]])}
    fisher = (x / SCALES[:, None]).T @ (x / SCALES[:, None]) / 2
    expected = np.linalg.solve(fisher + 0.1 * np.eye(2), grads["w"])
    for solver in (None, ng.woodbury(), ng.cholesky(), ng.cg(tol=1e-12)):
        direction, _ = ng.natural_gradient_direction(
            metric, params, x, grads, solver=solver, damping=0.1
        )
        np.testing.assert_allclose(direction["w"], expected, rtol=1e-8)
    kfac = ng.kfac(x, example_params=params)
    direction, _ = ng.natural_gradient_direction(metric, params, x, grads, solver=kfac)
    assert np.all(np.isfinite(direction["w"]))


def test_constants_a_row_over_trailing_positions(x64):
    scale = np.array([[1.0], [0.5], [2.0]])
    outputs = lambda p, x: p * x
    x = np.arange(6.0).reshape(3, 2)
    expected = np.mean(np.sum((x / scale) ** 2, axis=1))
    for likelihood in (ng.Normal(scale), Hidden(ng.Normal(scale))):
        metric = ng.exact_fisher(outputs, likelihood)
        np.testing.assert_allclose(ng.fisher_matrix(metric, P, x), expected, rtol=1e-6)


def test_rows_of_weight_zero_do_not_count(x64):
    weights = lambda batch: batch[1]
    outputs = lambda p, batch: p * batch[0]
    padded = np.array([1.0, 2.0, 7.0]), np.array([1.0, 1.0, 0.0])
    scale = np.array([1.0, 0.5, 1e-3])
    for make, key in ((ng.exact_fisher, None), (ng.sampled_fisher, jax.random.key(0))):
        metric = make(outputs, ng.Normal(scale), weights=weights)
        kept = make(model, ng.Normal(SCALES))
        found = ng.fisher_matrix(metric, P, padded, key=key)
        np.testing.assert_allclose(found, ng.fisher_matrix(kept, P, X, key=key), rtol=1e-12)


FAMILIES = {
    "categorical": (ng.Categorical(), (4,)),
    "bernoulli": (ng.Bernoulli(), ()),
    "binomial": (ng.Binomial(9), ()),
    "poisson": (ng.Poisson(), ()),
    "negative_binomial": (ng.NegativeBinomial(0.7), ()),
    "normal": (ng.Normal(), ()),
    "gamma": (ng.Gamma(2.0), ()),
    "beta": (ng.Beta(5.0), ()),
    "own": (Own(1.0), ()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_draw(name):
    """Row r draws what it draws, however many rows follow; the same key draws the same targets."""
    likelihood, event = FAMILIES[name]
    z = np.random.default_rng(0).normal(size=(7, *event)).astype(np.float32)
    metric = ng.sampled_fisher(lambda p, z: p * z, likelihood, num_samples=2)

    def scores(rows):
        gram = ng.gram_matrix(metric, jnp.ones(()), z[:rows], key=jax.random.key(5))
        return np.sqrt(np.diag(gram) * rows)[: 2 * 4]

    np.testing.assert_allclose(scores(7), scores(4), rtol=2e-5, atol=1e-6)


class Summed(Own):
    def log_prob(self, outputs, targets):
        return jnp.sum(super().log_prob(outputs, targets))

    def kl(self, outputs_p, outputs_q):
        return jnp.sum(super().kl(outputs_p, outputs_q))


class Misshapen(Own):
    def sample(self, key, outputs):
        return jax.random.normal(key, (5, 3))


class Transposed(Own):
    def sample(self, key, outputs):
        return jax.random.normal(key, (outputs.shape[0], 3))


@pytest.mark.parametrize(
    ("make", "likelihood", "message"),
    [
        (ng.exact_fisher, Summed(1.0), r"Summed.kl: must give one number a row.*\(2,\).*\(\)"),
        (ng.sampled_fisher, Summed(1.0), r"Summed.log_prob: must give one number a row"),
        (ng.sampled_fisher, Misshapen(1.0), r"sampled_fisher: Misshapen.sample must draw"),
        (
            ng.sampled_fisher,
            Transposed(1.0),
            r"sampled_fisher: Transposed.log_prob does not take what Transposed.sample draws",
        ),
        (ng.exact_fisher, ng.Normal(np.ones(3)), r"Normal.*scale \(3,\) does not broadcast"),
        (ng.sampled_fisher, ng.Normal(np.ones(3)), r"Normal.*scale \(3,\) does not broadcast"),
        (ng.exact_fisher, ng.Binomial(np.ones(3)), r"Binomial.*n \(3,\) does not broadcast"),
        (ng.exact_fisher, ng.Gamma(np.ones(3)), r"Gamma.*shape \(3,\) does not broadcast"),
    ],
)
def test_what_cannot_be_right_is_an_error(make, likelihood, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ng.fisher_matrix(make(model, likelihood), P, np.float32(X), key=jax.random.key(0))


def test_constants_of_more_rows_than_there_are_is_an_error():
    own, x = Own(np.ones(5, np.float32)), np.float32([1.0])
    with pytest.raises(ValueError, match=r"Own.kl: must give one number a row.*\(1,\).*\(5,\)"):
        ng.fisher_matrix(ng.exact_fisher(model, own), P, x)
    with pytest.raises(ValueError, match=r"sampled_fisher: Own.sample must draw.*\(1, \.\.\.\)"):
        ng.fisher_matrix(ng.sampled_fisher(model, own), P, x, key=jax.random.key(0))


def test_the_divergence_of_a_batch_is_one_number_a_row():
    with pytest.raises(ValueError, match=r"Summed.kl: must give one number a row"):
        ng.kl_divergence(model, Summed(1.0), P, P, np.float32(X))


def test_without_a_divergence_the_sampled_metric_measures_the_distance():
    likelihood = from_distribution(Noisy)
    metric = ng.sampled_fisher(model, likelihood, num_samples=400)
    tx = ng.natural_gradient(1.0, metric, max_kl=1e-3)
    x = np.float32(X)
    step, _ = tx.update(jnp.float32(3), tx.init(P), P, batch=x)
    found = 0.5 * np.mean((X / SCALES) ** 2) * float(step) ** 2
    np.testing.assert_allclose(found, 1e-3, rtol=0.3)  # four deviations of 400 samples
    scaled = ng.scale_to_kl(metric, 1e-3)
    again, _ = scaled.update(jnp.float32(3), scaled.init(P), P, batch=x)
    np.testing.assert_allclose(abs(again), abs(step), rtol=1e-5)
    with pytest.raises(TypeError, match="needs `kl`"):  # the exact metric cannot
        ng.fisher_matrix(ng.exact_fisher(model, likelihood), P, x)

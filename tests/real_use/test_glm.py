"""Generalised linear models: the natural gradient step is iteratively reweighted least squares.

With learning rate 1 and damping 0 the step is Fisher scoring, b + F^-1 (score), which for a linear
model is a weighted least-squares fit to working responses. Where it ends, F^-1 / N is the
covariance of the coefficients. Both are compared with statsmodels, on data that ships with
statsmodels or scikit-learn.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

EPS = np.finfo(np.float64).eps


@pytest.fixture(scope="module")
def sm():
    return pytest.importorskip("statsmodels.api")


class GLM(NamedTuple):
    """A regression problem, and the same one for statsmodels.

    Attributes:
      design: (N, P), the first column constant.
      targets: (N,).
      likelihood: p(targets | outputs).
      family: the statsmodels family.
      link: from the linear predictor X b to the outputs of the likelihood.
      intercept: where the constant starts; the other coefficients start at 0.
    """

    design: np.ndarray
    targets: np.ndarray
    likelihood: ng.Likelihood
    family: Any
    link: Callable[[jax.Array], jax.Array] = lambda eta: eta
    intercept: float = 0.0

    @property
    def batch(self):
        return {"x": jnp.asarray(self.design), "y": jnp.asarray(self.targets)}

    @property
    def start(self):
        return jnp.zeros(self.design.shape[1]).at[0].set(self.intercept)


def standardised(features):
    """A constant column, and features of zero mean and unit variance."""
    features = np.asarray(features, np.float64)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    return np.column_stack([np.ones(len(features)), features])


def breast_cancer(family=None):
    """Malignant or benign, from the mean texture, smoothness and symmetry of 569 tumours."""
    data = pytest.importorskip("sklearn.datasets").load_breast_cancer()
    design = standardised(data.data[:, [1, 4, 8]])
    return GLM(design, data.target.astype(float), ng.Bernoulli(), family)


def spector(sm):
    """Did a new way of teaching economics improve the grades of 32 students?"""
    data = sm.datasets.spector.load()
    design, targets = standardised(data.exog), data.endog.to_numpy(float)
    return GLM(design, targets, ng.Bernoulli(), sm.families.Binomial())


def spector_probit(sm):
    """The same, through the normal distribution function: not the natural parameter."""
    logit_of_probability = lambda eta: (
        jax.scipy.special.log_ndtr(eta) - jax.scipy.special.log_ndtr(-eta)
    )
    family = sm.families.Binomial(link=sm.families.links.Probit())
    return spector(sm)._replace(family=family, link=logit_of_probability)


def executions(sm):
    """Counts of executions in 17 states of the USA, and six features of these states."""
    data = sm.datasets.cpunish.load()
    design, targets = standardised(data.exog), data.endog.to_numpy(float)
    start = float(np.log(targets.mean()))
    return GLM(design, targets, ng.Poisson(), sm.families.Poisson(), intercept=start)


GLMS = {
    "logit, spector": spector,
    "logit, breast cancer": lambda sm: breast_cancer(sm.families.Binomial()),
    "probit, spector": spector_probit,
    "poisson, cpunish": executions,
}


@functools.cache
def read(name, sm):
    """A problem, its metric and its loss: built once, because what is compiled belongs to them."""
    glm = GLMS[name](sm)
    model, loss = model_and_loss(glm)
    return glm, ng.exact_fisher(model, glm.likelihood), loss


def model_and_loss(glm, weights=None):
    """The model, and the loss that its Fisher matrix belongs to: the mean over examples."""
    model = lambda b, batch: glm.link(batch["x"] @ b)

    def loss(b, batch):
        log_prob = glm.likelihood.log_prob(model(b, batch), batch["y"])
        return -jnp.average(log_prob, weights=None if weights is None else weights(batch))

    return model, loss


def iterates(tx, loss, batch, params, steps):
    """The parameters after 1, 2, ... steps, stacked."""
    gradient, state, history = jax.jit(jax.grad(loss)), tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return jnp.stack(history)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def rounding(metric, params, batch):
    """The relative error that rounding may leave in a solution of F d = g."""
    return 100 * EPS * np.linalg.cond(ng.fisher_matrix(metric, params, batch))


def statsmodels_iterates(sm, glm):
    fit = sm.GLM(glm.targets, glm.design, family=glm.family).fit(start_params=glm.start, tol=1e-14)
    return np.stack(fit.fit_history["params"][2:])


# What follows compares with statsmodels.


@pytest.mark.parametrize("name", GLMS)
def test_every_iterate_is_that_of_statsmodels(x64, sm, name):
    glm, metric, loss = read(name, sm)
    expected = statsmodels_iterates(sm, glm)
    assert len(expected) >= 5
    tx = ng.natural_gradient(1.0, metric, damping=0.0)
    found = iterates(tx, loss, glm.batch, glm.start, len(expected))
    starts = [glm.start, *found[:-1]]
    for before, ours, theirs in zip(starts, found, expected, strict=True):
        assert relative_error(ours, theirs) < rounding(metric, before, glm.batch)


def test_newton_takes_the_same_steps_for_the_natural_parameter_and_others_for_probit(x64, sm):
    """The control: for probit the Hessian of the data is not the Fisher matrix."""

    def distance(glm):
        _, loss = model_and_loss(glm)
        expected = statsmodels_iterates(sm, glm)
        newton = ng.natural_gradient(1.0, ng.hessian(loss), damping=0.0)
        return relative_error(iterates(newton, loss, glm.batch, glm.start, 3), expected[:3])

    assert distance(spector(sm)) < 1e4 * EPS
    assert distance(spector_probit(sm)) > 1e-2


@pytest.mark.parametrize("name", GLMS)
def test_coefficients_and_standard_errors_are_those_of_statsmodels(x64, sm, name):
    glm, metric, loss = read(name, sm)
    fit = sm.GLM(glm.targets, glm.design, family=glm.family).fit(
        tol=1e-14, tol_criterion="params", maxiter=100
    )
    tx = ng.natural_gradient(1.0, metric, damping=0.0)
    estimate = iterates(tx, loss, glm.batch, glm.start, 20)[-1]
    covariance = ng.asymptotic_covariance(metric, estimate, glm.batch, len(glm.targets))
    tolerance = rounding(metric, estimate, glm.batch)
    assert relative_error(estimate, fit.params) < tolerance
    assert relative_error(np.sqrt(np.diag(covariance)), fit.bse) < tolerance
    assert relative_error(covariance, fit.cov_params()) < tolerance


@pytest.mark.parametrize("name", ["logit, spector", "poisson, cpunish"])
def test_gradient_and_empirical_fisher_take_other_steps(x64, sm, name):
    """The control. The empirical Fisher gives other standard errors as well."""
    glm = GLMS[name](sm)
    fit = sm.GLM(glm.targets, glm.design, family=glm.family).fit()
    expected = statsmodels_iterates(sm, glm)[:3]
    model, loss = model_and_loss(glm)
    empirical = ng.empirical_fisher(
        lambda b, batch: glm.likelihood.log_prob(model(b, batch), batch["y"])
    )
    for metric in (ng.euclidean(), empirical):
        tx = ng.natural_gradient(1.0, metric, damping=0.0)
        # "Not below", because what diverges may end as NaN.
        assert not relative_error(iterates(tx, loss, glm.batch, glm.start, 3), expected) < 1e-2

    estimate = jnp.asarray(fit.params)
    covariance = ng.asymptotic_covariance(empirical, estimate, glm.batch, len(glm.targets))
    assert relative_error(np.sqrt(np.diag(covariance)), fit.bse) > 1e-2


def test_weights_of_a_metric_are_frequencies_of_examples(x64, sm):
    glm = spector(sm)
    frequencies = 1.0 + np.arange(len(glm.targets)) % 3
    fit = sm.GLM(glm.targets, glm.design, family=glm.family, freq_weights=frequencies).fit(
        tol=1e-14, tol_criterion="params"
    )

    batch = {**glm.batch, "frequency": jnp.asarray(frequencies)}
    weights = lambda batch: batch["frequency"]
    model, loss = model_and_loss(glm, weights)
    metric = ng.exact_fisher(model, glm.likelihood, weights=weights)
    tx = ng.natural_gradient(1.0, metric, damping=0.0)
    estimate = iterates(tx, loss, batch, glm.start, 20)[-1]
    covariance = ng.asymptotic_covariance(metric, estimate, batch, int(frequencies.sum()))
    tolerance = rounding(metric, estimate, batch)
    assert relative_error(estimate, fit.params) < tolerance
    assert relative_error(np.sqrt(np.diag(covariance)), fit.bse) < tolerance
    # The control: without weights the standard errors are those of another sample.
    unweighted = ng.exact_fisher(model, glm.likelihood)
    covariance = ng.asymptotic_covariance(unweighted, estimate, batch, len(frequencies))
    assert relative_error(np.sqrt(np.diag(covariance)), fit.bse) > 1e-2


def test_a_multinomial_logit_is_that_of_statsmodels(x64, sm):
    """Party identification of 944 voters in seven classes; class 0 is the reference."""
    data = sm.datasets.anes96.load()
    design, labels = standardised(data.exog), data.endog.to_numpy(np.int32)
    fit = sm.MNLogit(labels, design).fit(method="newton", maxiter=50, tol=1e-14, disp=False)

    def model(weights, batch):
        logits = batch["x"] @ weights
        return jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1)

    categorical = ng.Categorical()
    loss = lambda w, batch: -jnp.mean(categorical.log_prob(model(w, batch), batch["y"]))
    metric = ng.exact_fisher(model, categorical)
    tx = ng.natural_gradient(1.0, metric, damping=0.0)
    batch = {"x": jnp.asarray(design), "y": jnp.asarray(labels)}
    start = jnp.zeros((design.shape[1], 6))
    estimate = iterates(tx, loss, batch, start, 10)[-1]
    covariance = ng.asymptotic_covariance(metric, estimate, batch, len(labels))
    tolerance = rounding(metric, estimate, batch)
    assert relative_error(estimate, fit.params) < tolerance
    assert relative_error(np.sqrt(np.diag(covariance)).reshape(start.shape), fit.bse) < tolerance
    # The control: as many gradient steps.
    plain = ng.natural_gradient(1.0, ng.euclidean(), damping=0.0)
    assert relative_error(iterates(plain, loss, batch, start, 10)[-1], fit.params) > 1e-2


# Normal targets: one step from anywhere is ordinary least squares.


def diabetes(sm):
    """The progression of diabetes in 442 patients from ten features."""
    data = pytest.importorskip("sklearn.datasets").load_diabetes()
    return standardised(data.data), data.target


def longley(sm):
    """The famously collinear data on employment in the USA, 1947 to 1962."""
    data = sm.datasets.longley.load()
    return standardised(data.exog), data.endog.to_numpy(float)


@pytest.mark.parametrize("data", [diabetes, longley])
def test_one_step_is_ordinary_least_squares_and_its_errors_are_the_standard_errors(x64, sm, data):
    design, targets = data(sm)
    fit = sm.OLS(targets, design).fit()
    model = lambda b, batch: batch["x"] @ b
    batch = {"x": jnp.asarray(design), "y": jnp.asarray(targets)}

    def one_step(start):
        normal = ng.Normal()
        loss = lambda b, batch: -jnp.mean(normal.log_prob(model(b, batch), batch["y"]))
        tx = ng.natural_gradient(1.0, ng.exact_fisher(model, normal), damping=0.0)
        return iterates(tx, loss, batch, start, 1)[-1]

    start = jnp.zeros(design.shape[1])
    estimate = one_step(start)
    residual = targets - design @ estimate
    scale = np.sqrt(residual @ residual / (len(targets) - len(start)))
    # Errors come from the Fisher matrix of the *estimated* noise.
    metric = ng.exact_fisher(model, ng.Normal(scale))
    covariance = ng.asymptotic_covariance(metric, estimate, batch, len(targets))
    tolerance = rounding(metric, estimate, batch)
    assert relative_error(estimate, fit.params) < tolerance
    assert relative_error(np.sqrt(np.diag(covariance)), fit.bse) < tolerance
    assert relative_error(one_step(start + 100.0), fit.params) < 100 * tolerance


def test_one_gradient_step_of_rate_one_is_not_least_squares(x64, sm):
    """The control: it would be, were the features uncorrelated."""
    design, targets = diabetes(sm)
    gradient = -design.T @ targets / len(targets)
    assert relative_error(-gradient, np.linalg.lstsq(design, targets)[0]) > 0.1


# The same without statsmodels: iteratively reweighted least squares in four lines of numpy.


def reweighted_least_squares(x, y, b):
    """One step of logistic regression: least squares for working responses z with weights w."""
    p = 1 / (1 + np.exp(-x @ b))
    w = p * (1 - p)
    z = x @ b + (y - p) / w
    return np.linalg.lstsq(np.sqrt(w)[:, None] * x, np.sqrt(w) * z)[0]


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(None, id="automatic", marks=pytest.mark.smoke),
        pytest.param(ng.cholesky(), id="cholesky"),
        pytest.param(ng.spectral(), id="spectral"),
        pytest.param(ng.cg(tol=1e-13), id="cg"),
    ],
)
def test_every_iterate_is_that_of_a_weighted_least_squares_fit(x64, solver):
    glm = breast_cancer()
    model, loss = model_and_loss(glm)
    metric = ng.exact_fisher(model, glm.likelihood)
    tx = ng.natural_gradient(1.0, metric, damping=0.0, solver=solver)
    expected = np.zeros(glm.design.shape[1])
    for found in iterates(tx, loss, glm.batch, glm.start, 5):
        expected = reweighted_least_squares(glm.design, glm.targets, expected)
        assert relative_error(found, expected) < rounding(metric, found, glm.batch)


def test_a_damped_step_is_not_a_least_squares_fit(x64):
    """The control: damping shortens the step."""
    glm = breast_cancer()
    model, loss = model_and_loss(glm)
    tx = ng.natural_gradient(1.0, ng.exact_fisher(model, glm.likelihood), damping=0.1)
    expected = reweighted_least_squares(glm.design, glm.targets, np.asarray(glm.start))
    assert relative_error(iterates(tx, loss, glm.batch, glm.start, 1)[-1], expected) > 1e-2

"""Regressions beyond the exponential families of `test_glm`, against statsmodels and numpyro.

Coefficients are maxima of the likelihood. Standard errors are those of the expected information
where statsmodels' GLM takes it, and of the observed one (the Hessian) where its other models do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import natgrad_jax as ng


@pytest.fixture(scope="module")
def sm():
    return pytest.importorskip("statsmodels.api")


def covariates(number=300):
    rng = np.random.default_rng(3)
    x = np.column_stack([np.ones(number), rng.normal(size=(number, 2))])
    return rng, x, x @ np.array([0.6, 0.4, -0.3])


def fit(model, likelihood, batch, start, steps=40):
    """The maximum-likelihood estimate by Fisher scoring, and its loss."""
    loss = lambda p, batch: -jnp.mean(likelihood.log_prob(model(p, batch), batch["y"]))
    tx = ng.natural_gradient(1.0, ng.exact_fisher(model, likelihood), damping=0.0, max_kl=0.5)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    for _ in range(steps):
        params, state = step(params, state)
    return params, loss


def errors(metric, params, batch):
    covariance = ng.asymptotic_covariance(metric, params, batch, len(batch["y"]))
    return np.sqrt(np.diag(covariance))


def linear(b, batch):
    return batch["x"] @ b


def close(found, expected, rtol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-9)


def glm_case(sm, name):
    """(targets, offset, likelihood, link, family, statsmodels' keywords) of a GLM."""
    rng, _, eta = covariates()
    same = lambda eta: eta
    links = sm.families.links
    mean = np.exp(eta)
    if name in ("poisson with exposure", "poisson with offset"):
        exposure = rng.uniform(0.5, 20, size=len(eta))
        y = rng.poisson(exposure * mean)
        given = {"exposure": exposure} if "exposure" in name else {"offset": np.log(exposure)}
        return y, np.log(exposure), ng.Poisson(), same, sm.families.Poisson(), given
    if name == "poisson, identity link":
        y = rng.poisson(3 + eta)
        return y, 0 * eta, ng.Poisson(), jnp.log, sm.families.Poisson(links.Identity()), {}
    if name == "negative binomial":
        y, family = rng.negative_binomial(2, 2 / (2 + mean)), sm.families.NegativeBinomial
        return y, 0 * eta, ng.NegativeBinomial(0.5), same, family(alpha=0.5), {}
    if name == "gamma, log link":
        y, family = rng.gamma(3, mean / 3), sm.families.Gamma(links.Log())
        return y, 0 * eta, ng.Gamma, same, family, {}
    if name == "gamma, inverse link":
        y, family = rng.gamma(3, 1 / (3 + eta) / 3), sm.families.Gamma(links.InversePower())
        return y, 0 * eta, ng.Gamma, lambda eta: -jnp.log(eta), family, {}
    trials = rng.integers(1, 30, size=len(eta))
    y = rng.binomial(trials, 1 / (1 + np.exp(-eta)))
    return y, 0 * eta, ng.Binomial(trials), same, sm.families.Binomial(), {"trials": trials}


@pytest.mark.filterwarnings("ignore:The .* link function does not respect the domain")
@pytest.mark.parametrize(
    "name",
    [
        "poisson with exposure",
        "poisson with offset",
        "poisson, identity link",
        "negative binomial",
        "gamma, log link",
        "gamma, inverse link",
        "binomial counts",
    ],
)
def test_generalised_linear_models_are_those_of_statsmodels(x64, sm, name):
    _, x, _ = covariates()
    y, offset, likelihood, link, family, given = glm_case(sm, name)
    trials = given.pop("trials", None)
    theirs = y if trials is None else np.column_stack([y, trials - y])
    expected = sm.GLM(theirs, x, family=family, **given).fit(
        tol=1e-13, tol_criterion="params", maxiter=200
    )
    if likelihood is ng.Gamma:  # statsmodels estimates the dispersion by Pearson's statistic
        likelihood = ng.Gamma(shape=1 / expected.scale)
    model = lambda b, batch: link(batch["x"] @ b) + batch["offset"]
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y, float), "offset": jnp.asarray(offset)}
    start = jnp.asarray([3.0 if "identity" in name or "inverse" in name else 0.5, 0.0, 0.0])
    estimate, _ = fit(model, likelihood, batch, start)
    close(estimate, expected.params)
    close(errors(ng.exact_fisher(model, likelihood), estimate, batch), expected.bse)
    # The control: without offsets, trials or dispersion the numbers are others.
    wrong = ng.exact_fisher(model, ng.Poisson())
    batch = {**batch, "offset": 0 * batch["offset"]}
    if name != "poisson, identity link":
        ratio = errors(wrong, estimate, batch) / expected.bse
        assert np.abs(ratio - 1).max() > 1e-2


def test_negative_binomial_with_its_dispersion_is_that_of_statsmodels(x64, sm):
    rng, x, eta = covariates()
    y = rng.negative_binomial(2, 2 / (2 + np.exp(eta)))
    truth = np.array([0.6, 0.4, -0.3, 0.5])
    expected = sm.NegativeBinomial(y, x).fit(
        disp=False, start_params=truth, method="newton", tol=1e-14
    )

    def model(p, batch):
        eta = batch["x"] @ p[:3]
        return eta, jnp.broadcast_to(jnp.log(p[3]), eta.shape)

    likelihood = ng.NegativeBinomial()
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y, float)}
    estimate, loss = fit(model, likelihood, batch, jnp.asarray([0.5, 0.0, 0.0, 1.0]))
    close(estimate, expected.params)
    close(errors(ng.hessian(loss), estimate, batch), expected.bse)
    # The expected information differs from the observed one by sampling, and not by much.
    found = errors(ng.exact_fisher(model, likelihood), estimate, batch) / expected.bse
    assert 1e-5 < np.abs(found - 1).max() < 0.2


def test_ordinal_regression_is_that_of_statsmodels(x64, sm):
    ordered = pytest.importorskip("statsmodels.miscmodels.ordinal_model")
    rng, x, eta = covariates()
    y = np.digitize(eta - 0.6 + rng.logistic(size=len(eta)), [-1.0, 0.3, 1.5])
    fitted = ordered.OrderedModel(y, x[:, 1:], distr="logit")
    expected = fitted.fit(method="bfgs", disp=False, gtol=1e-9, maxiter=500)

    def model(p, batch):
        eta = batch["x"] @ p[:2]
        return eta, jnp.broadcast_to(p[2:], (*eta.shape, 3))

    likelihood = ng.Ordinal()
    batch = {"x": jnp.asarray(x[:, 1:]), "y": jnp.asarray(y)}
    estimate, loss = fit(model, likelihood, batch, jnp.zeros(5))
    close(estimate, expected.params, 2e-6)
    # statsmodels differentiates the likelihood numerically.
    close(errors(ng.hessian(loss), estimate, batch), expected.bse, 1e-5)
    close(-len(y) * loss(estimate, batch), expected.llf, 1e-10)
    assert np.all(np.abs(jax.grad(loss)(estimate, batch)) < 1e-10)


def test_student_t_regression_is_that_of_statsmodels(x64, sm):
    models = pytest.importorskip("statsmodels.miscmodels.tmodel")
    rng, x, eta = covariates()
    y = eta + 0.7 * rng.standard_t(4, size=len(eta))

    def model(p, batch):
        eta = batch["x"] @ p[:3]
        return eta, jnp.broadcast_to(p[3], eta.shape)

    likelihood = ng.StudentT(df=4.0)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    estimate, loss = fit(model, likelihood, batch, jnp.zeros(4))
    log_prob = scipy.stats.t(4, x @ estimate[:3], np.exp(estimate[3])).logpdf(y)
    close(-loss(estimate, batch), log_prob.mean(), 1e-12)

    theirs = models.TLinearModel(y, x)
    theirs.fixparams = None
    score = theirs.score(np.array([*estimate[:3], 4.0, np.exp(estimate[3])]))
    assert np.abs(np.asarray(score)[[0, 1, 2, 4]]).max() < 1e-3  # numerical derivatives
    information = -theirs.hessian(np.array([*estimate[:3], 4.0, np.exp(estimate[3])]))
    keep = [0, 1, 2, 4]
    bse = np.sqrt(np.diag(np.linalg.inv(np.asarray(information)[np.ix_(keep, keep)])))
    found = errors(ng.hessian(loss), estimate, batch)
    close(found[:3], bse[:3], 1e-5)
    close(found[3] * np.exp(estimate[3]), bse[3], 1e-5)


def test_log_probabilities_are_those_of_numpyro(x64, standard_promotion):
    dist = pytest.importorskip("numpyro.distributions")
    rng = np.random.default_rng(0)
    m, s, t = (jnp.asarray(rng.normal(size=6)) for _ in range(3))
    counts = jnp.asarray(rng.integers(0, 9, size=6))
    positive, share = jnp.asarray(rng.gamma(2, size=6)), jnp.asarray(rng.uniform(size=6))
    mu, phi = jax.nn.sigmoid(m), jnp.exp(s)
    factor = jnp.asarray(rng.normal(size=(6, 3, 3)))
    lower = jnp.tril(factor, -1) + jnp.eye(3) * jnp.exp(jnp.tril(jnp.triu(factor)))
    mean, vector = (jnp.asarray(rng.normal(size=(6, 3))) for _ in range(2))
    cut = jnp.cumsum(jnp.concatenate([factor[:, 0, :1], jnp.exp(factor[:, 0, 1:])], 1), 1)
    pairs = [
        (ng.NegativeBinomial(), (m, s), counts, dist.NegativeBinomial2(jnp.exp(m), 1 / phi)),
        (ng.Gamma(), (m, s), positive, dist.Gamma(phi, phi / jnp.exp(m))),
        (ng.Beta(), (m, s), share, dist.Beta(mu * phi, (1 - mu) * phi)),
        (ng.StudentT(), (m, s, t), vector[:, 0], dist.StudentT(jnp.exp(t), m, phi)),
        (ng.Binomial(9), m, counts, dist.Binomial(9, logits=m)),
        (ng.Ordinal(), (m, factor[:, 0]), counts % 4, dist.OrderedLogistic(m, cut)),
        (
            ng.MultivariateNormal(),
            (mean, factor),
            vector,
            dist.MultivariateNormal(mean, scale_tril=lower),
        ),
    ]
    for likelihood, outputs, targets, theirs in pairs:
        close(likelihood.log_prob(outputs, targets), theirs.log_prob(targets), 1e-9)

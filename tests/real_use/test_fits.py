"""Error bars of scipy's curve_fit and of statsmodels' GLM with offset are ours."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import natgrad_jax as ng

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


def test_the_readmes_fit_is_that_of_curve_fit(x64):
    (source,) = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    curve = lambda x, a, b, c: a * np.exp(-b * x) + c
    x, y = np.asarray(names["x"]), np.asarray(names["y"])
    tight = {"xtol": 1e-15, "ftol": 1e-15}
    found, covariance = scipy.optimize.curve_fit(curve, x, y, p0=np.ones(3), **tight)
    assert names["state"].info.converged
    np.testing.assert_allclose(names["fit"], found, rtol=1e-6)
    np.testing.assert_allclose(names["errors"], np.sqrt(np.diag(covariance)), rtol=1e-5)
    # With errors that are known.
    sigma = np.linspace(0.02, 0.1, 40)
    found, covariance = scipy.optimize.curve_fit(
        curve, x, y, p0=np.ones(3), sigma=sigma, absolute_sigma=True, **tight
    )
    residual = lambda p, batch: names["residual"](p, batch[:2]) / batch[2]
    ours = ng.asymptotic_covariance(
        ng.gauss_newton(residual), jnp.asarray(found), (x, y, sigma), 40, noise_variance=1.0
    )
    np.testing.assert_allclose(ours, covariance, rtol=1e-4)


@pytest.mark.parametrize("given", ["offset", "exposure"])
def test_a_poisson_regression_with_offset_is_that_of_statsmodels(x64, given):
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    design = np.stack([np.ones(60), rng.normal(size=60)], axis=1)
    exposure = rng.uniform(1.0, 20.0, size=60)
    counts = rng.poisson(exposure * np.exp(design @ np.array([0.3, -0.5])))
    extra = {"offset": np.log(exposure)} if given == "offset" else {"exposure": exposure}
    expected = sm.GLM(counts, design, family=sm.families.Poisson(), **extra).fit(tol=1e-14)

    poisson, batch = ng.Poisson(), (design, np.log(exposure), counts)
    model = lambda p, batch: batch[0] @ p + batch[1]
    loss = lambda p, batch: -jnp.mean(poisson.log_prob(model(p, batch), batch[2]))
    metric = ng.exact_fisher(model, poisson)
    tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric)
    p = jnp.zeros(2)
    state = tx.init(p)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=loss))
    for _ in range(60):
        updates, state = step(jax.grad(loss)(p, batch), state, p)
        p = optax.apply_updates(p, updates)
        if state.info.converged:
            break
    assert state.info.converged
    covariance = ng.asymptotic_covariance(metric, p, batch, 60)
    np.testing.assert_allclose(p, expected.params, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), expected.bse, rtol=1e-6)
    # The control: without the offset the answer is another.
    without = ng.asymptotic_covariance(metric, p, (design, np.zeros(60), counts), 60)
    assert np.abs(np.sqrt(np.diag(without)) / expected.bse - 1).max() > 0.1

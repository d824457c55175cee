"""NIST's certified nonlinear regressions: parameters, standard errors, and when to stop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import natgrad_jax as ng
from tests.real_use.nist import PROBLEMS
from tests.real_use.nist import digits

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

LIMIT = 1500


@functools.cache
def transformation(name, **settings):
    metric = ng.gauss_newton(PROBLEMS[name].residual)
    inner = ng.natural_gradient(1.0, metric, solver=ng.cholesky())
    return ng.levenberg_marquardt(inner, metric, **settings), metric


@functools.partial(jax.jit, static_argnums=(0, 1))
def fit(name, tx, start):
    """Parameters and state when nothing is left to gain."""
    problem = PROBLEMS[name]
    loss = lambda b, batch: 0.5 * jnp.mean(problem.residual(b, batch) ** 2)

    def step(carry):
        b, state = carry
        value, grads = jax.value_and_grad(loss)(b, problem.batch)
        updates, state = tx.update(grads, state, b, batch=problem.batch, value=value, value_fn=loss)
        return optax.apply_updates(b, updates), state

    going = lambda carry: ~carry[1].info.converged & (carry[1].count < LIMIT)
    return jax.lax.while_loop(going, step, (start, tx.init(start)))


def fitted(name, start, **settings):
    tx, _ = transformation(name, **settings)
    return fit(name, tx, jnp.asarray(PROBLEMS[name].starts[start]))


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", PROBLEMS)
def test_parameters_and_standard_errors_are_certified_from_both_starts(name, start):
    problem = PROBLEMS[name]
    b, state = fitted(name, start)
    assert state.info.converged
    assert digits(b, problem.parameters) > 8
    covariance = ng.asymptotic_covariance(
        transformation(name)[1], b, problem.batch, len(problem.y), noise_variance="estimated"
    )
    assert digits(np.sqrt(np.diag(covariance)), problem.errors) > 8


def test_in_units_of_f_the_far_start_of_mgh10_is_never_left():
    """The control: the damping is lambda I there."""
    b, _ = fitted("MGH10", 0, damping_scale=None)
    assert digits(b, PROBLEMS["MGH10"].parameters) < 1


def test_the_inverse_of_an_unscaled_matrix_has_no_digit_of_mgh10():
    """The control of the standard errors: eigenvalues of F cut in the parameters' own units."""
    problem = PROBLEMS["MGH10"]
    jacobian = np.asarray(jax.jacobian(problem.residual)(problem.parameters, problem.batch))
    residual = np.asarray(problem.residual(problem.parameters, problem.batch))
    s2 = residual @ residual / (len(residual) - 3)
    plain = np.linalg.pinv(jacobian.T @ jacobian, rcond=3 * 2.3e-16, hermitian=True)
    assert digits(np.sqrt(s2 * np.diag(plain)), problem.errors) < 1


@pytest.mark.parametrize("name", ["Lanczos3", "MGH17"])
def test_geodesic_acceleration_saves_iterations_on_exponentials(name):
    counts = []
    for accelerated in (False, True):
        b, state = fitted(name, 1, geodesic_acceleration=accelerated)
        assert digits(b, PROBLEMS[name].parameters) > 8
        counts.append(int(state.count))
    assert counts[1] < 0.9 * counts[0], counts


def test_standard_errors_of_curve_fit_by_name_of_the_noise():
    """`absolute_sigma` False estimates the noise, True takes it as given."""
    problem = PROBLEMS["Rat43"]
    b, _ = fitted("Rat43", 1)
    _, metric = transformation("Rat43")
    curve = lambda x, *b: np.asarray(problem.model(np.array(b), x))
    for absolute, choice in [(False, "estimated"), (True, 1.0)]:
        _, expected = scipy.optimize.curve_fit(
            curve,
            problem.x,
            problem.y,
            p0=b,
            jac=lambda x, *b: np.asarray(jax.jacobian(problem.model)(jnp.array(b), x)),
            sigma=np.ones(len(problem.y)),
            absolute_sigma=absolute,
        )
        covariance = ng.asymptotic_covariance(
            metric, b, problem.batch, len(problem.y), noise_variance=choice
        )
        np.testing.assert_allclose(covariance, expected, rtol=1e-6)


def test_after_convergence_only_rounding_moves_and_nothing_is_rejected():
    problem = PROBLEMS["Misra1a"]
    tx, _ = transformation("Misra1a")
    b, state = fitted("Misra1a", 1)
    loss = lambda b, batch: 0.5 * jnp.mean(problem.residual(b, batch) ** 2)
    damping = float(state.damping)
    for _ in range(20):
        grads = jax.grad(loss)(b, problem.batch)
        updates, state = tx.update(grads, state, b, batch=problem.batch, value_fn=loss)
        assert state.info.converged and not state.info.rejected
        assert np.all(np.abs(updates) <= 1e-12 * np.abs(b))
        assert float(state.damping) <= damping
        damping = float(state.damping)


def test_longley_in_its_own_units_has_its_certified_digits():
    """Certified by NIST; from the raw data, whose columns differ by a factor of a million."""
    data = pytest.importorskip("statsmodels.api").datasets.longley.load()
    design = np.column_stack([np.ones(16), data.exog.to_numpy(float)])
    batch = (design, data.endog.to_numpy(float))
    certified = [-3482258.63459582, 15.0618722713733, -0.035819179292591]
    certified += [-2.02022980381683, -1.03322686717359, -0.0511041056535807, 1829.15146461355]
    errors = [890420.383607373, 84.9149257747669, 0.0334910077722432, 0.488399681651699]
    errors += [0.214274163161675, 0.226073200069370, 455.478499142212]
    residual = lambda p, batch: batch[0] @ p - batch[1]
    loss = lambda p, batch: 0.5 * jnp.mean(residual(p, batch) ** 2)
    metric = ng.gauss_newton(residual)
    tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric)

    def step(carry):
        p, state = carry
        grads = jax.grad(loss)(p, batch)
        updates, state = tx.update(grads, state, p, batch=batch, value_fn=loss)
        return optax.apply_updates(p, updates), state

    going = lambda carry: ~carry[1].info.converged & (carry[1].count < 100)
    p, _ = jax.jit(lambda p: jax.lax.while_loop(going, step, (p, tx.init(p))))(jnp.zeros(7))
    assert digits(p, np.array(certified)) > 8
    covariance = ng.asymptotic_covariance(metric, p, batch, 16, noise_variance="estimated")
    assert digits(np.sqrt(np.diag(covariance)), np.array(errors)) > 8

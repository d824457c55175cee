"""The alias: learning rate, sign, decoupled weight decay, and its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax_contract import cases
from optax_contract import oracle

import natgrad_jax as ng

EPS = np.finfo(np.float64).eps
ROUNDING = 100  # the condition number of F + damping I
SETTINGS = dict(metric=cases.METRICS["exact_fisher"], damping=cases.DAMPING)


def direction(params, grads, batch):
    fisher = oracle.matrix("exact_fisher", params, batch)
    return oracle.solve(fisher, cases.DAMPING, oracle.ravel(grads))


def step(tx, params, grads, batch, **extra):
    return tx.update(grads, tx.init(params), params, batch=batch, **extra)


def test_the_step_is_minus_the_learning_rate_times_the_direction(x64):
    arrays = cases.arrays()
    updates, _ = step(ng.natural_gradient(0.3, **SETTINGS), *arrays)
    oracle.close(updates, -0.3 * direction(*arrays), EPS, ROUNDING)


def test_a_schedule_moves_the_learning_rate(x64):
    params, grads, batch = arrays = cases.arrays()
    tx = ng.natural_gradient(lambda count: 0.4 * 0.5 ** count.astype("float64"), **SETTINGS)
    state = tx.init(params)
    for rate in (0.4, 0.2, 0.1):
        updates, state = tx.update(grads, state, params, batch=batch)
        oracle.close(updates, -rate * direction(*arrays), EPS, ROUNDING)


def test_weight_decay_is_decoupled(x64):
    """It is not preconditioned. The control: the coupled one is another step."""
    params, grads, batch = arrays = cases.arrays()
    decay, theta = 0.05, oracle.ravel(params)
    updates, _ = step(ng.natural_gradient(0.3, weight_decay=decay, **SETTINGS), *arrays)
    expected = -0.3 * (direction(*arrays) + decay * theta)
    oracle.close(updates, expected, EPS, ROUNDING)
    penalised = jax.tree.map(lambda g, p: g + decay * p, grads, params)
    coupled = -0.3 * direction(params, penalised, batch)
    assert np.linalg.norm(coupled - expected) > 1e-3 * np.linalg.norm(expected)


def test_it_is_the_chain_it_says(x64):
    params, grads, batch = cases.arrays()
    metric = cases.METRICS["exact_fisher"]
    alias = ng.natural_gradient(0.7, momentum=0.5, max_kl=0.5, weight_decay=0.01, **SETTINGS)
    chain = optax.chain(
        ng.scale_by_natural_gradient(metric, damping=cases.DAMPING, momentum=0.5),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(0.7),
        ng.clip_by_kl(metric, 0.5),
    )
    states = alias.init(params), chain.init(params)
    for _ in range(2):
        a, first = alias.update(grads, states[0], params, batch=batch)
        b, second = chain.update(grads, states[1], params, batch=batch)
        states = first, second
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("options", [{}, {"max_kl": 1.0, "weight_decay": 0.1, "momentum": 0.9}])
def test_the_state_starts_with_the_direction_and_its_diagnostics(options, x64):
    _, state = step(ng.natural_gradient(0.1, **SETTINGS, **options), *cases.arrays())
    assert type(state[0]).__name__ == "ScaleByNaturalGradientState"
    assert type(state[0].info) is ng.NaturalGradientInfo
    np.testing.assert_allclose(state[0].info.damping, cases.DAMPING, rtol=1e-6)


def test_damping_as_an_extra_argument_reaches_the_direction(x64):
    arrays = params, grads, batch = cases.arrays()
    updates, state = step(ng.natural_gradient(1.0, **SETTINGS), *arrays, damping=0.5)
    expected = oracle.solve(oracle.matrix("exact_fisher", params, batch), 0.5, oracle.ravel(grads))
    oracle.close(updates, -expected, EPS, ROUNDING)
    np.testing.assert_allclose(state[0].info.damping, 0.5)


def test_its_learning_rate_is_annotated_as_optax_reads_it():
    """optax's own tests recognise an alias by the very object."""
    annotation = ng.natural_gradient.__annotations__["learning_rate"]
    assert annotation == optax.ScalarOrSchedule and not isinstance(annotation, str)


@pytest.mark.smoke
def test_one_undamped_step_solves_linear_least_squares(x64):
    """E4. The control: half a step does not."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3)), rng.normal(size=9)
    metric = ng.gauss_newton(lambda p, batch: batch[0] @ p - batch[1])
    expected = np.linalg.lstsq(x, y)[0]
    batch, params = (jnp.asarray(x), jnp.asarray(y)), jnp.ones(3)
    grads = jnp.asarray(x.T @ (x @ np.ones(3) - y) / 9)
    for rate, lands in ((1.0, True), (0.5, False)):
        updates, _ = step(ng.natural_gradient(rate, metric, damping=0.0), params, grads, batch)
        error = np.max(np.abs(params + updates - expected))
        assert bool(error < 100 * EPS * np.linalg.cond(x.T @ x)) is lands


APPROXIMATE = {
    "kfac": lambda batch: ng.kfac(batch),
    "ekfac": lambda batch: ng.ekfac(batch),
    "diagonal": lambda batch: ng.diagonal(),
}


@pytest.mark.parametrize("metric", ["exact_fisher", "sampled_fisher"])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_steps_of_an_approximation_are_bounded_unless_none_is_said(name, metric):
    params, grads, batch = cases.arrays()
    chosen, far = cases.METRICS[metric], jax.tree.map(lambda g: 100 * g, grads)

    def moved(**options):
        solver = APPROXIMATE[name](batch)
        tx = ng.natural_gradient(1.0, chosen, solver=solver, damping=1e-4, **options)
        updates, _ = step(tx, params, far, batch)
        return (
            float(ng.fisher_quadratic_form(cases.METRICS["exact_fisher"], params, batch, updates))
            / 2
        )

    assert moved() == pytest.approx(0.1, rel=1e-4)
    assert moved(max_kl=0.02) == pytest.approx(0.02, rel=1e-4)
    assert moved(max_kl=None) > 10


def test_steps_of_an_exact_solver_and_without_a_likelihood_are_not_bounded():
    for metric, solver in (("exact_fisher", None), ("gauss_newton", ng.diagonal())):
        tx = ng.natural_gradient(1.0, cases.METRICS[metric], solver=solver)
        free = ng.natural_gradient(1.0, cases.METRICS[metric], solver=solver, max_kl=None)
        like = jax.tree.structure(free.init(cases.PARAMS))
        assert jax.tree.structure(tx.init(cases.PARAMS)) == like


@pytest.mark.parametrize(("examples", "off"), [(128, 1e-4), (1000, 0.3)])
def test_the_default_bound_measures_at_128_examples(examples, off):
    """A number measures at all of them: exactly."""
    x = np.random.default_rng(5).normal(size=(examples, 3)).astype(np.float32)
    metric = ng.exact_fisher(lambda p, x: jnp.tanh(x @ p["w"]), ng.Normal())
    params = {"w": np.ones((3, 2), np.float32)}
    far = {"w": np.full((3, 2), 100, np.float32)}

    def moved(**options):
        tx = ng.natural_gradient(1.0, metric, solver=ng.kfac(x), **options)
        updates, _ = step(tx, params, far, x)
        return float(ng.fisher_quadratic_form(metric, params, x, updates)) / 2

    assert moved() == pytest.approx(0.1, rel=off)
    assert (abs(moved() - 0.1) > 1e-4) == (examples > 128)
    assert moved(max_kl=0.1) == pytest.approx(0.1, rel=1e-4)

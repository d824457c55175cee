"""P2, P5, P9: hyper-parameters that are injected, scheduled and changed, without recompilation."""

import chex
import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng

from . import cases
from . import oracle

EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps
# F + damping I has a condition number of about 100.
ROUNDING = 100


def injected(case, **changes):
    factory = optax.inject_hyperparams(case.factory, static_args=case.static_args)
    return factory(**{**case.arguments, **changes})


@pytest.mark.parametrize("name", cases.CASES)
def test_injected_hyperparameters_give_the_same_updates_and_inner_state(name, x64):
    params, grads, batch = cases.arrays()
    case, tx = cases.CASES[name], cases.transformation(name)
    wrapped = injected(case)
    state, inner = wrapped.init(params), tx.init(params)
    chex.clear_trace_counter()
    # One trace for all updates: the factory may be called again, compilation may not.
    update = jax.jit(chex.assert_max_traces(wrapped.update, n=1))
    tolerance = ROUNDING * (1e-6 / EPS if "cg" in name else 1)
    for _ in range(3):
        got, state = update(grads, state, params, batch=batch)
        expected, inner = tx.update(grads, inner, params, batch=batch)
        oracle.close(got, expected, EPS, tolerance)
        assert jax.tree.structure(state.inner_state) == jax.tree.structure(inner)
        oracle.close(state.inner_state, inner, EPS32, ROUNDING)
    # A changed value takes effect, in the same program.
    floats = {k: 2 * v for k, v in case.arguments.items() if isinstance(v, float)}
    for key in floats:
        state.hyperparams[key] = 2 * state.hyperparams[key]
    got, _ = update(grads, state, params, batch=batch)
    expected, _ = case.make(**floats).update(grads, inner, params, batch=batch)
    oracle.close(got, expected, EPS, tolerance)


def test_an_injected_schedule_is_followed(x64):
    params, grads, batch = cases.arrays()
    case = cases.CASES["natural_gradient"]
    schedule = lambda count: 0.5 ** count.astype("float64")
    wrapped = injected(case, learning_rate=schedule)
    state, tx = wrapped.init(params), case.make(learning_rate=1.0)
    whole, _ = tx.update(grads, tx.init(params), params, batch=batch)
    for count in range(3):
        got, state = wrapped.update(grads, state, params, batch=batch)
        oracle.close(got, 0.5**count * oracle.ravel(whole), EPS, ROUNDING)


def test_injection_meets_what_it_is_for(x64):
    """The control: a branch on a value, and a bare model taken for a schedule."""
    params, grads, batch = cases.arrays()

    def branching(damping):
        return optax.scale(1.0 if damping > 0.5 else 2.0)

    def bare_model(model, damping):
        return ng.scale_by_natural_gradient(
            ng.exact_fisher(model, ng.Categorical()), damping=damping
        )

    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.eval_shape(optax.inject_hyperparams(branching)(0.1).init, params)
    with pytest.raises(TypeError):
        optax.inject_hyperparams(bare_model)(cases.logits, 0.1).init(params)
    fitting = optax.inject_hyperparams(bare_model, static_args=("model",))(cases.logits, 0.1)
    jax.eval_shape(fitting.update, grads, fitting.init(params), params, batch=batch)


SCHEDULED = [(name, hyper) for name, case in cases.CASES.items() for hyper in case.schedules]


@pytest.mark.parametrize(("name", "hyper"), SCHEDULED)
def test_a_constant_schedule_equals_the_constant_over_ten_steps(name, hyper, x64):
    params, grads, batch = cases.arrays()
    case, tx = cases.CASES[name], cases.transformation(name)
    scheduled = case.make(**{hyper: optax.constant_schedule(case.arguments[hyper])})
    states = tx.init(params), scheduled.init(params)
    # Small gradients, which `max_kl` leaves alone.
    grads = jax.tree.map(lambda g: 1e-3 * g, grads)
    here = there = params
    for _ in range(10):
        a, first = tx.update(grads, states[0], here, batch=batch)
        b, second = scheduled.update(grads, states[1], there, batch=batch)
        states = first, second
        here, there = optax.apply_updates(here, a), optax.apply_updates(there, b)
        oracle.close(b, a, EPS, 10 * ROUNDING)


@pytest.mark.parametrize(("name", "hyper"), SCHEDULED)
def test_another_constant_is_noticed(name, hyper, x64):
    """The control: every scheduled hyper-parameter matters."""
    params, grads, batch = cases.arrays()
    case, tx = cases.CASES[name], cases.transformation(name)
    # Small gradients, which `max_kl` leaves alone.
    grads = jax.tree.map(lambda g: 1e-3 * g, grads)
    other = case.make(**{hyper: optax.constant_schedule(2 * case.arguments[hyper])})
    results = []
    for t in (tx, other):
        state, updates = t.init(params), None
        for _ in range(2):
            updates, state = t.update(grads, state, params, batch=batch)
        results.append(oracle.ravel(updates))
    assert np.linalg.norm(results[1] - results[0]) > 1e-3 * np.linalg.norm(results[0])


@pytest.mark.parametrize(
    "name", [n for n, case in cases.CASES.items() if case.uses_batch and case.compiled]
)
def test_a_second_eager_call_traces_nothing(name, x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation(name)
    _, state = tx.update(grads, tx.init(params), params, batch=batch)
    before = cases.TRACES["model"]
    tx.update(grads, state, params, batch=batch)
    assert cases.TRACES["model"] == before


def test_another_damping_traces_nothing_and_another_shape_does(x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation("scale_by_natural_gradient-automatic")
    update = lambda damping, batch: tx.update(
        grads, tx.init(params), params, batch=batch, damping=damping
    )
    update(0.1, batch)
    before = cases.TRACES["model"]
    update(0.7, batch)
    assert cases.TRACES["model"] == before
    jax.eval_shape(update, 0.1, jax.tree.map(lambda x: x[:3], batch))
    assert cases.TRACES["model"] > before

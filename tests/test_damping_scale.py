"""The keyword `damping_scale`: what it takes, names and leaves alone. Its formula is E10."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from tests.optax_contract import cases
from tests.optax_contract import checks
from tests.optax_contract import oracle

METRIC = cases.METRICS["exact_fisher"]
PARAMS, GRADS, BATCH = cases.PARAMS, cases.GRADS, cases.BATCH
SCALE = {"b": 40.0, "w": 0.3}
EPS = np.finfo(np.float64).eps
# F + damping diag(s) has a condition number of up to 1e4.
ROUNDING = 1e4

CALLS = {
    "natural_gradient_direction": lambda **more: ng.natural_gradient_direction(
        METRIC, *cases.arrays()[::2], cases.arrays()[1], **more
    ),
    "scale_by_natural_gradient": functools.partial(ng.scale_by_natural_gradient, METRIC),
    "natural_gradient": functools.partial(ng.natural_gradient, 0.1, METRIC),
}
BAD = {
    "negative": (-1.0, ValueError, "damping_scale must be positive and finite, got -1.0"),
    "nan": ({"b": float("nan"), "w": 1.0}, ValueError, r"damping_scale\['b'\] must be positive"),
    "zero": ({"b": 0, "w": 1.0}, ValueError, r"damping_scale\['b'\] must be positive"),
    "infinite": (float("inf"), ValueError, "must be positive and finite, got inf"),
    "another word": ("fisher", ValueError, "None, 'diagonal' or a tree of numbers, got 'fisher'"),
    "a word within": ({"b": "diagonal", "w": 1.0}, TypeError, r"\['b'\] must be a number"),
    "an array": ({"b": np.ones(2), "w": 1.0}, ValueError, r"\['b'\] must be a scalar, got shape"),
    "complex": (1j, TypeError, "damping_scale must be "),
    "a schedule": (optax.constant_schedule(1.0), TypeError, "damping_scale must be a number"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_scale_is_named_at_once(name, bad):
    scale, error, message = BAD[bad]
    named = "scale_by_natural_gradient" if name == "natural_gradient" else name
    with pytest.raises(error, match=f"{named}: .*{message}"):
        CALLS[name](damping_scale=scale)


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
@pytest.mark.parametrize("name", CALLS)
def test_the_diagonal_and_kronecker_factors_do_not_fit_one_another(name, make):
    solver = make(BATCH)
    for one, word in [(solver, solver.name), (ng.cg(preconditioner=solver), "cg")]:
        with pytest.raises(ValueError, match=f"damping_scale='diagonal' .* solver {word}"):
            CALLS[name](solver=one, damping_scale="diagonal")


@pytest.mark.parametrize("scale", [{"b": 1.0}, {"b": 1.0, "w": {"x": 1.0}}, [1.0, 2.0]])
def test_a_tree_that_is_no_prefix_of_the_parameters_is_named(scale):
    params, grads, batch = cases.arrays()
    with pytest.raises(ValueError, match="natural_gradient_direction: .* tree prefix of params"):
        CALLS["natural_gradient_direction"](damping_scale=scale)
    tx = ng.scale_by_natural_gradient(METRIC, damping_scale=scale)
    with pytest.raises(ValueError, match="scale_by_natural_gradient: .* tree prefix of params"):
        tx.init(params)
    state = ng.scale_by_natural_gradient(METRIC).init(params)
    with pytest.raises(ValueError, match="scale_by_natural_gradient: .* tree prefix of params"):
        tx.update(grads, state, params, batch=batch)


def expected(visible, damping=cases.DAMPING):
    """The dense formula for what is visible, with `SCALE`."""
    params, grads, batch = cases.arrays()
    where = np.repeat([visible["b"], visible["w"]], [2, 6])
    s = np.repeat([SCALE["b"], SCALE["w"]], [2, 6])[where]
    fisher = oracle.matrix("exact_fisher", params, batch)[np.ix_(where, where)]
    return np.linalg.solve(fisher + damping * np.diag(s), oracle.ravel(grads)[where])


def step(tx, **more):
    params, grads, batch = cases.arrays()
    return tx.update(grads, tx.init(params), params, batch=batch, **more)[0]


@pytest.mark.parametrize("scale", [SCALE, {k: np.float64(v) for k, v in SCALE.items()}])
def test_numbers_may_be_of_any_kind(scale, x64):
    tx = ng.scale_by_natural_gradient(METRIC, damping=cases.DAMPING, damping_scale=scale)
    oracle.close(step(tx), expected(dict(b=True, w=True)), EPS, ROUNDING)
    plain = step(ng.scale_by_natural_gradient(METRIC, damping=cases.DAMPING))
    assert np.linalg.norm(oracle.ravel(step(tx)) - oracle.ravel(plain)) > 0.1


def test_the_alias_hands_it_on(x64):
    tx = ng.natural_gradient(0.5, METRIC, damping=cases.DAMPING, damping_scale=SCALE)
    oracle.close(step(tx), -0.5 * expected(dict(b=True, w=True)), EPS, ROUNDING)


def test_a_damping_given_to_update_is_scaled_too(x64):
    tx = ng.scale_by_natural_gradient(METRIC, damping_scale=SCALE)
    oracle.close(step(tx, damping=0.2), expected(dict(b=True, w=True), 0.2), EPS, ROUNDING)


def test_hidden_parameters_are_passed_over(x64):
    """Under `masked` one scale tree speaks of all parameters, as under `partition`."""
    full = cases.arrays()[0]
    mask = {"b": False, "w": True}
    tx = ng.scale_by_natural_gradient(METRIC, damping=cases.DAMPING, damping_scale=SCALE)
    got = step(optax.masked(tx, mask), full_params=full)
    oracle.close(oracle.ravel(got["w"]), expected(mask), EPS, ROUNDING)
    parted = optax.partition({"one": tx, "two": tx}, {"b": "one", "w": "two"})
    got = step(parted, full_params=full)
    oracle.close(oracle.ravel(got["w"]), expected(mask), EPS, ROUNDING)
    oracle.close(oracle.ravel(got["b"]), expected(dict(b=True, w=False)), EPS, ROUNDING)
    together = expected(dict(b=True, w=True))[2:]
    assert np.linalg.norm(oracle.ravel(got["w"]) - together) > 1e-3 * np.linalg.norm(together)


def test_an_injected_number_is_followed_without_compilation(x64):
    params, grads, batch = cases.arrays()
    factory = optax.inject_hyperparams(ng.scale_by_natural_gradient)
    tx = factory(METRIC, damping=cases.DAMPING, damping_scale=2.0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    got, state = update(grads, state, params, batch=batch)
    before = cases.TRACES["model"]
    state.hyperparams["damping_scale"] = 5.0 * state.hyperparams["damping_scale"]
    after, _ = update(grads, state, params, batch=batch)
    assert cases.TRACES["model"] == before
    for d, factor in [(got, 2), (after, 10)]:
        plain = ng.scale_by_natural_gradient(METRIC, damping=factor * cases.DAMPING)
        oracle.close(d, oracle.ravel(step(plain)), EPS, ROUNDING)


def test_other_numbers_trace_nothing_and_another_prefix_does(x64):
    direction = CALLS["natural_gradient_direction"]
    direction(damping_scale={"b": 1.0, "w": 2.0})
    direction(damping_scale="diagonal")
    before = cases.TRACES["model"]
    direction(damping_scale={"b": 7.0, "w": 0.1})
    direction(damping_scale="diagonal")
    assert cases.TRACES["model"] == before
    direction(damping_scale=7.0)
    assert cases.TRACES["model"] > before


@pytest.mark.parametrize("solver", [None, ng.cg(), "kfac"])
def test_the_state_does_not_depend_on_it(solver, x64):
    params = cases.arrays()[0]
    solver = ng.kfac(BATCH) if solver == "kfac" else solver
    scales = [None, 2.0, SCALE] + (["diagonal"] if solver is None else [])
    make = functools.partial(ng.scale_by_natural_gradient, METRIC, solver=solver, momentum=0.5)
    states = [checks.types(make(damping_scale=s).init(params)) for s in scales]
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("solver", [ng.woodbury(), ng.cholesky(), ng.cg()])
def test_with_the_diagonal_the_damping_is_a_pure_number(solver):
    """A loss in tiny units, F about 1e-24, has the same direction; plain damping changes it."""

    def direction(unit, scale):
        params, grads, batch = cases.arrays("float32")
        metric = ng.gauss_newton(lambda p, b: jnp.float32(unit) * cases.residual(p, b))
        grads = jax.tree.map(lambda g: jnp.float32(unit) ** 2 * g, grads)
        d, info = ng.natural_gradient_direction(
            metric, params, batch, grads, solver=solver, damping=0.1, damping_scale=scale
        )
        assert np.isfinite(info.relative_residual)
        return oracle.ravel(d)

    np.testing.assert_allclose(direction(1e-12, "diagonal"), direction(1.0, "diagonal"), rtol=1e-3)
    assert np.linalg.norm(direction(1e-12, None)) < 1e-3 * np.linalg.norm(direction(1.0, None))


@pytest.mark.parametrize("scale", [SCALE, "diagonal"])
def test_types_are_those_of_the_gradient(scale):
    tx = ng.scale_by_natural_gradient(METRIC, damping_scale=scale, momentum=0.5)
    checks.keeps_types(tx, *cases.arrays("bfloat16"))


def test_geodesic_acceleration_solves_with_the_scaled_damping(x64):
    params, _, batch = cases.arrays()
    metric, damping = cases.METRICS["gauss_newton"], 1.0
    tx = ng.scale_by_natural_gradient(metric, damping=damping, damping_scale=SCALE)
    got = step(tx, geodesic_acceleration=True)
    s = np.repeat([SCALE["b"], SCALE["w"]], [2, 6])
    system = oracle.matrix("gauss_newton", params, batch) + damping * np.diag(s)
    d = step(tx)
    residual = lambda p: cases.residual(p, batch)
    along = lambda p: jax.jvp(residual, (p,), (d,))[1]
    bend = jax.jvp(along, (params,), (d,))[1]
    pulled = jax.vjp(residual, params)[1](bend / len(bend))[0]
    a = np.linalg.solve(system, oracle.ravel(pulled))
    assert np.linalg.norm(a) < 0.7 * np.linalg.norm(oracle.ravel(d))
    oracle.close(got, oracle.ravel(d) + a / 2, EPS, ROUNDING)
    assert np.linalg.norm(a) > 1e-3 * np.linalg.norm(oracle.ravel(d))

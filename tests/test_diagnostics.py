"""`ng.info` finds the diagnostics of ours in any state, and says what was not measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
PARAMS = {"w": jnp.full((3, 2), 0.3), "b": jnp.zeros(2)}
METRIC = ng.gauss_newton(lambda p, x: x @ p["w"] + p["b"][None])
LIKELY = ng.exact_fisher(lambda p, x: x @ p["w"] + p["b"][None], ng.Normal())
DIRECTION = ng.scale_by_natural_gradient(METRIC, damping=0.25)
ALL = {"w": True, "b": True}


def loss(params, batch):
    return jnp.sum(METRIC.outputs(params, batch) ** 2)


def after_a_step(tx, **keywords):
    state, grads = tx.init(PARAMS), jax.grad(loss)(PARAMS, X)
    _, state = tx.update(grads, state, PARAMS, batch=X, **keywords)
    return state


WRAPPERS = {
    "alone": (lambda tx: tx, ".info"),
    "chain": (lambda tx: optax.chain(optax.clip(1.0), tx), "[1].info"),
    "named_chain": (lambda tx: optax.named_chain(("a", tx)), "['a'].info"),
    "masked": (lambda tx: optax.masked(tx, ALL), ".inner_state.info"),
    "partition": (
        lambda tx: optax.partition({"all": tx}, {"w": "all", "b": "all"}),
        ".inner_states['all'].inner_state.info",
    ),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 3), ".inner_state.info"),
    "MultiSteps": (lambda tx: optax.MultiSteps(tx, 1), ".inner_opt_state.info"),
    "schedule_free": (
        lambda tx: optax.contrib.schedule_free(tx, 0.1),
        ".base_optimizer_state.info",
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_is_found_wherever_it_stands(name, standard_promotion):
    wrap, path = WRAPPERS[name]
    found = ng.info(after_a_step(wrap(DIRECTION)))
    assert list(found) == [path]
    assert float(found.damping) == float(found[path].damping) == 0.25


def test_it_is_found_under_injected_hyperparameters():
    tx = optax.inject_hyperparams(ng.natural_gradient)(0.1, METRIC, damping=0.25, max_kl=0.1)
    found = ng.info(after_a_step(tx))
    assert list(found) == [".inner_state[0].info", ".inner_state[2].info"]
    assert float(found.damping) == 0.25


CHAINS = {
    "natural_gradient": (ng.natural_gradient(0.1, METRIC, max_kl=0.1), {"damping", "kl", "factor"}),
    "adaptive_natural_gradient": (
        ng.adaptive_natural_gradient(METRIC),
        {"relative_residual", "ratio", "rejected", "rate"},
    ),
    "trpo": (ng.trpo(LIKELY), {"iterations", "shrinks", "accepted", "kl", "factor"}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_fields_of_all_records_are_at_hand(name):
    tx, fields = CHAINS[name]
    found = ng.info(jax.jit(lambda: after_a_step(tx, value_fn=loss))())
    for field in fields:
        assert getattr(found, field).shape == ()
    records = [record for record in found.values() if "damping" in record._fields]
    assert found.damping in [record.damping for record in records]
    with pytest.raises(AttributeError, match=r"no record has the field 'dampening'; there are"):
        _ = found.dampening


def test_a_field_of_two_directions_is_asked_for_by_path():
    tx = optax.partition({"one": DIRECTION, "two": DIRECTION}, {"w": "one", "b": "two"})
    found = ng.info(after_a_step(tx, full_params=PARAMS))
    with pytest.raises(AttributeError, match=r"2 records have the field 'damping'.*\['two'\]"):
        _ = found.damping
    assert {float(record.damping) for record in found.values()} == {0.25}


def test_it_is_a_tree_and_works_compiled():
    state = after_a_step(optax.chain(DIRECTION))
    compiled = jax.jit(lambda state: (ng.info(state), ng.info(state).damping * 2))
    found, twice = compiled(state)
    assert isinstance(found, ng.Diagnostics) and list(found) == ["[0].info"]
    assert float(twice) == 0.5
    assert repr(found) == repr(ng.info(state))


NOT_MEASURED = {
    "kfac": (ng.kfac(X), "relative_residual", True),
    "ekfac": (ng.ekfac(X), "relative_residual", True),
    "cholesky": (ng.cholesky(), "relative_residual", False),
    "cg": (ng.cg(), "outside_row_space", False),
    "preconditioned": (ng.cg(preconditioner=ng.diagonal()), "outside_row_space", True),
}


@pytest.mark.parametrize("name", NOT_MEASURED)
def test_what_was_not_measured_is_said_so(name):
    solver, field, unmeasured = NOT_MEASURED[name]
    found = ng.info(after_a_step(ng.scale_by_natural_gradient(METRIC, solver=solver)))
    for text in (str(found), repr(found[".info"])):
        (line,) = [part for part in text.replace(", ", "\n").splitlines() if field in part]
        assert line.endswith("not measured") == unmeasured
        assert "-1" not in text
    # Within programs it is a number that no measurement gives.
    assert (float(getattr(found, field)) == -1) == unmeasured


def test_no_field_of_a_state_without_steps_prints_a_placeholder():
    assert "-1" not in str(ng.info(DIRECTION.init(PARAMS)))


def test_an_ensemble_prints_a_value_each():
    states = jax.vmap(lambda g: DIRECTION.update(g, DIRECTION.init(PARAMS), PARAMS, batch=X)[1])(
        jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    )
    assert "damping             [0.25, 0.25]" in str(ng.info(states))


@pytest.mark.parametrize(
    "state", [(), optax.adam(0.1).init(PARAMS), PARAMS], ids=["()", "adam", "params"]
)
def test_a_state_without_any_is_an_error(state):
    with pytest.raises(ValueError, match="info: no diagnostics of natgrad_jax"):
        ng.info(state)


def test_it_is_found_in_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(layer, nnx.Param)
    metric = ng.gauss_newton(lambda params, x: nnx.merge(graph, params)(x))
    tx = optax.chain(ng.scale_by_natural_gradient(metric, damping=0.25), optax.scale(-1.0))
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda layer: jnp.sum(layer(X) ** 2))(layer)
    optimizer.update(layer, grads, batch=X)
    for state in (optimizer, optimizer.opt_state, nnx.state(optimizer)):
        found = ng.info(state)
        assert float(found.damping) == 0.25
        assert "relative_residual   not measured" not in str(found)

"""P7, P15, P20: what optax wraps around us still hands over `batch`, and gets what it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

from . import cases
from . import checks
from . import oracle

EPS = np.finfo(np.float64).eps
# F + damping I has a condition number of about 100.
ROUNDING = 100
DIRECTION = "scale_by_natural_gradient-automatic"
NO_STEPS = jax.tree.map(np.zeros_like, cases.PARAMS)

# Wrapped in each way, these must do what they do alone.
WRAPPED = [DIRECTION, "natural_gradient-everything", "scale_to_kl", "scale_by_steepest_descent-l2"]
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx, optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("ours", tx)),
    "masked": lambda tx: optax.masked(tx, {"b": True, "w": True}),
    "partition": lambda tx: optax.partition({"all": tx}, {"b": "all", "w": "all"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_it_does_what_it_does_alone(name, wrapper, x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation(name)
    expected, _ = tx.update(grads, tx.init(params), params, batch=batch)
    wrapped = WRAPPERS[wrapper](tx)
    state = wrapped.init(params)
    got, new = wrapped.update(grads, state, params, batch=batch)
    oracle.close(got, expected, EPS, ROUNDING)
    assert checks.types(new) == checks.types(state)


def test_a_wrapper_that_drops_the_batch_is_noticed(x64):
    """The control, and what the docs say: `lookahead` takes no extra arguments in optax 0.2.8."""
    params, grads, batch = cases.arrays()
    tx = optax.lookahead(
        cases.transformation("natural_gradient"), sync_period=2, slow_step_size=0.5
    )
    pair = optax.LookaheadParams.init_synced(params)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        tx.update(grads, tx.init(pair), pair, batch=batch)
    with pytest.raises(TypeError, match="needs the keyword argument `batch`"):
        tx.update(grads, tx.init(pair), pair)


def test_a_flattened_model_takes_the_flat_vector(x64):
    params, grads, batch = cases.arrays()

    def flat_logits(v, batch):
        return cases.logits({"b": v[:2], "w": v[2:].reshape(3, 2)}, batch)

    metric = ng.exact_fisher(flat_logits, ng.Categorical())
    tx = optax.flatten(ng.scale_by_natural_gradient(metric, damping=cases.DAMPING))
    alone = cases.transformation(DIRECTION)
    got, _ = tx.update(grads, tx.init(params), params, batch=batch)
    expected, _ = alone.update(grads, alone.init(params), params, batch=batch)
    assert checks.types(got) == checks.types(grads)
    oracle.close(got, expected, EPS, ROUNDING)


def visible_block(params, batch, visible):
    """F restricted to the entries of the visible leaves."""
    fisher = oracle.matrix("exact_fisher", params, batch)
    where = np.repeat([visible["b"], visible["w"]], [2, 6])
    return fisher[np.ix_(where, where)], where


@pytest.mark.parametrize("visible", [{"b": True, "w": False}, {"b": False, "w": True}])
def test_a_mask_restricts_the_matrix_to_what_is_visible(visible, x64):
    params, grads, batch = cases.arrays()
    tx = optax.masked(cases.transformation(DIRECTION), visible)
    got, _ = tx.update(grads, tx.init(params), params, batch=batch, full_params=params)
    block, where = visible_block(params, batch, visible)
    expected = oracle.ravel(grads)
    expected[where] = oracle.solve(block, cases.DAMPING, expected[where])
    oracle.close(got, expected, EPS, ROUNDING)
    # The control: the step of all parameters, restricted, is another one.
    whole = oracle.solve(
        oracle.matrix("exact_fisher", params, batch), cases.DAMPING, oracle.ravel(grads)
    )
    assert np.linalg.norm((expected - whole)[where]) > 1e-2 * np.linalg.norm(whole[where])


@pytest.mark.parametrize("name", ["natural_gradient-everything", "scale_to_kl", "clip_by_kl"])
def test_everything_that_measures_takes_the_full_parameters(name, x64):
    params, grads, batch = cases.arrays()
    tx = optax.masked(cases.transformation(name), {"b": False, "w": True})
    got, _ = tx.update(grads, tx.init(params), params, batch=batch, full_params=params)
    np.testing.assert_array_equal(got["b"], grads["b"])
    block, where = visible_block(params, batch, {"b": False, "w": True})
    g, theta, settings = (
        oracle.ravel(grads)[where],
        params["w"].ravel(),
        cases.CASES[name].arguments,
    )
    if name.startswith("natural"):
        g = oracle.solve(block, cases.DAMPING, g) + settings["weight_decay"] * np.asarray(theta)
        g = -settings["learning_rate"] * g
    factor = np.sqrt(2 * settings.get("max_kl", settings.get("kl")) / (g @ block @ g))
    oracle.close(got["w"], (factor if name == "scale_to_kl" else min(1, factor)) * g, EPS, ROUNDING)


def test_partition_gives_each_part_its_own_optimizer(x64):
    params, grads, batch = cases.arrays()
    tx = optax.partition(
        {"natural": cases.transformation(DIRECTION), "plain": optax.scale(3.0)},
        {"b": "plain", "w": "natural"},
    )
    got, _ = tx.update(grads, tx.init(params), params, batch=batch, full_params=params)
    block, where = visible_block(params, batch, {"b": False, "w": True})
    oracle.close(got["b"], 3 * np.asarray(grads["b"]), EPS)
    oracle.close(
        got["w"], oracle.solve(block, cases.DAMPING, oracle.ravel(grads)[where]), EPS, ROUNDING
    )


def nested(tree):
    return {"head": {"b": tree["b"]}, "layer": {"w": tree["w"]}, "frozen": None}


NESTED = ng.exact_fisher(
    lambda p, batch: cases.logits({"b": p["head"]["b"], "w": p["layer"]["w"]}, batch),
    ng.Categorical(),
)


def test_prefix_masks_and_none_leaves(x64):
    """A mask may stop above the leaves; equinox puts None where a leaf is no parameter."""
    params, grads, batch = cases.arrays()
    tx = ng.scale_by_natural_gradient(NESTED, damping=cases.DAMPING)
    plain = cases.transformation(DIRECTION)
    expected, _ = plain.update(grads, plain.init(params), params, batch=batch)
    tree = nested(params)
    got, _ = tx.update(nested(grads), tx.init(tree), tree, batch=batch)
    assert got["frozen"] is None
    oracle.close(got, expected, EPS, ROUNDING)

    masked = optax.masked(tx, {"head": False, "layer": True, "frozen": False})
    got, _ = masked.update(nested(grads), masked.init(tree), tree, batch=batch, full_params=tree)
    block, where = visible_block(params, batch, {"b": False, "w": True})
    oracle.close(got["head"], grads["b"], EPS)
    expected = oracle.solve(block, cases.DAMPING, oracle.ravel(grads)[where])
    oracle.close(got["layer"], expected, EPS, ROUNDING)


@pytest.mark.parametrize("empty", [{}, (), {"a": None}], ids=repr)
@pytest.mark.parametrize("name", cases.CASES)
def test_nothing_to_update_is_no_error(name, empty):
    """`partition` and `masked` may leave a transformation without parameters."""
    tx = cases.transformation(name)
    state = tx.init(empty)
    updates, new = tx.update(empty, state, empty, batch=None)
    assert jax.tree.structure(updates) == jax.tree.structure(empty)
    assert checks.types(new) == checks.types(state)


@pytest.mark.parametrize("solver", ["automatic", "woodbury", "spectral", "cg"])
def test_parameters_without_entries_are_no_error(solver):
    params, batch = jnp.zeros((0,)), jnp.ones((4, 0))
    metric = ng.gauss_newton(lambda p, batch: batch @ p)
    tx = ng.scale_by_natural_gradient(metric, solver=cases.SOLVERS[solver].solver)
    updates, _ = tx.update(params, tx.init(params), params, batch=batch)
    assert updates.shape == (0,)


def test_apply_if_finite_skips_a_step_that_is_not(x64):
    params, grads, batch = cases.arrays()
    tx = optax.apply_if_finite(cases.transformation("scale_by_natural_gradient-momentum"), 3)
    state = tx.init(params)
    bad = {**grads, "b": grads["b"].at[0].set(jnp.nan)}
    updates, state = tx.update(bad, state, params, batch=batch)
    jax.tree.map(np.testing.assert_array_equal, updates, NO_STEPS)
    assert int(state.total_notfinite) == 1
    updates, state = tx.update(grads, state, params, batch=batch)
    assert np.all(np.isfinite(oracle.ravel(updates)))
    assert np.all(np.isfinite(oracle.ravel(state.inner_state)))


# From one example F has rank 1: plain factorisations would fail with damping 0.
SINGULAR = {
    name: ng.scale_by_natural_gradient(
        cases.METRICS["exact_fisher"], solver=cases.SOLVERS[name].solver, damping=0.0
    )
    for name in ("cholesky", "woodbury", "cg")
}


@pytest.mark.parametrize("solver", SINGULAR)
def test_multi_steps_emits_exact_zeros_between_its_steps(solver, x64, standard_promotion):
    """It multiplies by False what a mini-step gave: a NaN there would stay one."""
    params, grads, batch = cases.arrays()
    tx = optax.MultiSteps(SINGULAR[solver], every_k_schedule=4, accumulator_dtype="float64")
    one = jax.tree.map(lambda x: x[:1], batch)
    step = jax.jit(lambda g, state: tx.update(g, state, params, batch=one))
    state, fractions = tx.init(params), [1.0, -1.0, 0.0, 4.0]
    for i, fraction in enumerate(fractions):
        updates, state = step(optax.tree.scale(fraction, grads), state)
        if i < 3:
            jax.tree.map(np.testing.assert_array_equal, updates, NO_STEPS)
    # The mean of the gradients is the gradient itself.
    fisher = oracle.matrix("exact_fisher", params, one)
    expected = oracle.solve(fisher, 0, oracle.ravel(grads))
    tolerance = cases.SOLVERS[solver].tolerance
    oracle.close(updates, expected, EPS, max(1, tolerance / EPS))


def test_line_searches_take_our_keywords_when_value_fn_names_them(standard_promotion):
    """optax passes `value_fn` what its signature names, and raises on what is left over."""
    params, grads, batch = cases.arrays()
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    tx = optax.chain(cases.transformation("natural_gradient"), search)

    def step(value_fn):
        # Only traced: whether the arguments arrive does not depend on their values.
        update = lambda value, **extra: tx.update(
            grads, tx.init(params), params, value=value, grad=grads, value_fn=value_fn, **extra
        )
        return jax.eval_shape(update, jnp.asarray(1.0), batch=batch, damping=jnp.asarray(0.1))

    step(lambda params, batch, damping=None: cases.loss(params, batch))
    with pytest.raises(TypeError):
        step(lambda params: params["b"][0])


@pytest.mark.smoke
def test_value_and_grad_from_state_works_beside_us(standard_promotion):
    """It looks for the fields `value` and `grad` in the whole state, ours included."""
    params, _, batch = cases.arrays()
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=8, store_grad=True)
    tx = optax.chain(cases.transformation("natural_gradient"), search)

    def value_fn(params, batch):
        return cases.loss(params, batch)

    value_and_grad = optax.value_and_grad_from_state(value_fn)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, batch, state=state)
        updates, state = tx.update(
            grad, state, params, batch=batch, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(3):
        params, state, value = step(params, state)
        values.append(float(value))
    # The stored value is that of the parameters reached.
    stored = optax.tree.get(state, "value")
    np.testing.assert_allclose(stored, cases.loss(params, batch), rtol=1e-5)
    assert values[0] > values[1] > values[2]

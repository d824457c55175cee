"""What we add for transformations of ours reaches nobody else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from natgrad_jax.transforms import _told

X = np.random.default_rng(0).normal(size=(12, 3))
PARAMS = {"w": np.full((3, 2), 0.3), "b": np.zeros(2)}
BATCH = {"x": X, "y": np.arange(12) % 2}
LIKELIHOOD = ng.Categorical()


def model(params, batch):
    return jnp.tanh(batch["x"]) @ params["w"] + params["b"][None]


def loss(params, batch):
    return -jnp.mean(LIKELIHOOD.log_prob(model(params, batch), batch["y"]))


METRIC = ng.exact_fisher(model, LIKELIHOOD)
NATURAL = ng.natural_gradient(1.0, METRIC)
SEARCHES = {
    "backtracking": optax.scale_by_backtracking_linesearch(20),
    "zoom": optax.scale_by_zoom_linesearch(20),
}


def strict(seen):
    """A transformation that gives `value_fn` all that it does not know, and so notices all."""

    def update(updates, state, params, *, value, grad, value_fn, **extra):
        del value, grad
        seen.append((set(extra), value_fn(params, **extra)))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def accumulated(steps):
    """`MultiSteps` with its keywords, which its own `gradient_transformation` drops."""
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


#: How one of ours may stand inside another.
NESTED = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("ours", tx), ("other", optax.identity())),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "hiding": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "other": optax.sgd(0.1)}, {"w": "ours", "b": "other"}
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "MultiSteps": lambda tx: accumulated(optax.MultiSteps(tx, 1)),
}


def values(tx, steps=4, value_fn=loss, **keywords):
    """The objective along some steps, and the last state."""

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params, BATCH)
        updates, state = tx.update(
            grad, state, params, batch=BATCH, value=value, grad=grad, value_fn=value_fn, **keywords
        )
        return optax.apply_updates(params, updates), state, value

    params, found = jax.tree.map(jnp.asarray, PARAMS), []
    state = tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        found.append(float(value))
    return found, state


@pytest.mark.smoke
@pytest.mark.parametrize("search", SEARCHES)
def test_line_searches_work_inside_levenberg_marquardt(search, x64, standard_promotion):
    tx = ng.levenberg_marquardt(optax.chain(NATURAL, SEARCHES[search]), METRIC)
    found, state = values(tx)
    assert np.all(np.diff(found) < 0)
    assert not state.info.rejected


@pytest.mark.parametrize("search", SEARCHES)
def test_the_control_a_keyword_of_ours_that_is_one_is_refused(search, x64, standard_promotion):
    tx = optax.chain(NATURAL, SEARCHES[search])
    with pytest.raises(TypeError, match="damping"):
        values(tx, 1, damping=0.1)


@pytest.mark.parametrize("name", NESTED)
def test_nobody_else_sees_what_ours_are_told(name, x64, standard_promotion):
    seen = []
    inner = optax.chain(NESTED[name](NATURAL), strict(seen))
    _, state = values(ng.levenberg_marquardt(inner, METRIC, initial_damping=0.5), 1)
    assert [extra for extra, _ in seen] == [{"batch"}]
    # Ours are told: the step was made with this damping.
    ours = lambda x: isinstance(x, ng.NaturalGradientInfo)
    (info,) = filter(ours, jax.tree.leaves(state, is_leaf=ours))
    assert float(info.damping) == 0.5


def test_what_optax_itself_is_handed_is_seen(x64, standard_promotion):
    """The control: the strict transformation has eyes."""
    seen = []
    with pytest.raises(TypeError, match="other"):
        values(optax.chain(NATURAL, strict(seen)), 1, other=1.0)


@pytest.mark.parametrize("name", ["hiding", "partition"])
def test_hidden_parameters_are_filled_in_beside_a_line_search(name, x64, standard_promotion):
    tx = ng.levenberg_marquardt(
        optax.chain(NESTED[name](NATURAL), SEARCHES["backtracking"]), METRIC
    )
    found, _ = values(tx)
    assert np.all(np.diff(found) < 0)


def test_everything_that_measures_is_told_of_hidden_parameters(x64, standard_promotion):
    steps = optax.chain(
        ng.scale_by_natural_gradient(METRIC),
        ng.scale_by_quadratic_model(METRIC),
        ng.scale_to_kl(METRIC, 1e-3),
        optax.scale(-1.0),
    )
    tx = ng.levenberg_marquardt(optax.masked(steps, {"w": True, "b": False}), METRIC)
    params = jax.tree.map(jnp.asarray, PARAMS)
    grad = jax.grad(loss)(params, BATCH) | {"b": jnp.zeros(2)}
    updates, _ = tx.update(grad, tx.init(params), params, batch=BATCH, value_fn=loss)
    w = lambda w: model({"w": w, "b": params["b"]}, BATCH)
    alone = ng.exact_fisher(lambda p, batch: w(p), LIKELIHOOD, batch_axes=None)
    length = ng.fisher_quadratic_form(alone, params["w"], None, updates["w"])
    np.testing.assert_allclose(length / 2, 1e-3, rtol=1e-6)


SIGNATURES = {
    "batch by name": lambda params, batch: loss(params, batch),
    "batch by another name": lambda params, data: loss(params, data),
    "parameters alone": lambda params: loss(params, BATCH),
    "batch by keyword": lambda params, *, batch: loss(params, batch),
    "any number": lambda *args: loss(*args),
    "further keywords": lambda params, batch, scale=1.0: scale * loss(params, batch),
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_an_objective_of_any_signature_reaches_what_is_inside(signature, x64):
    told = _told.Told(damping=0.1)
    function = ng.transforms._objective.inside(
        "test", SIGNATURES[signature], BATCH, None, told, has_aux=False
    )
    expected = float(loss(PARAMS, BATCH))
    for call in (function(PARAMS), function(PARAMS, BATCH), function(PARAMS, batch=BATCH)):
        assert float(call) == expected
    assert _told.told(function) == told
    assert _told.told(SIGNATURES[signature]) == _told.Told()


def with_aux(params, batch):
    return loss(params, batch), {"accuracy": jnp.zeros(())}


LOOKS = {
    "levenberg_marquardt": lambda **kw: ng.levenberg_marquardt(NATURAL, METRIC, **kw),
    "with a line search": lambda **kw: ng.levenberg_marquardt(
        optax.chain(NATURAL, SEARCHES["backtracking"]), METRIC, **kw
    ),
    "one inside another": lambda **kw: ng.levenberg_marquardt(
        optax.chain(NATURAL, ng.scale_by_kl_line_search(METRIC, **kw)), METRIC, **kw
    ),
    "adaptive_natural_gradient": lambda **kw: ng.adaptive_natural_gradient(METRIC, **kw),
    "scale_by_kl_line_search": lambda **kw: optax.chain(
        NATURAL, ng.scale_by_kl_line_search(METRIC, **kw)
    ),
    "trpo": lambda **kw: ng.trpo(METRIC, **kw),
}


@pytest.mark.parametrize("name", LOOKS)
def test_auxiliary_output_changes_nothing(name, x64, standard_promotion):
    expected, _ = values(LOOKS[name](), 2)
    got, _ = values(LOOKS[name](has_aux=True), 2, with_aux)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", LOOKS)
def test_auxiliary_output_that_was_not_announced_is_named(name, x64, standard_promotion):
    with pytest.raises(TypeError, match="has_aux=True"):
        values(LOOKS[name](), 1, with_aux)
    with pytest.raises(TypeError, match=r"with has_aux=True .* pair"):
        values(LOOKS[name](has_aux=True), 1)

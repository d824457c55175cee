"""Callers that pass no keywords: flax's TrainState, numpyro, optimistix, SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

_rng = np.random.default_rng(1)
X = _rng.normal(size=(40, 3)).astype(np.float32)
TRUTH = np.array([1.0, -2.0, 0.5], np.float32)
BATCH = (X, X @ TRUTH + 0.1 * _rng.normal(size=40).astype(np.float32))
SOLUTION = np.linalg.lstsq(X.astype(np.float64), BATCH[1].astype(np.float64), rcond=None)[0]
START = {"w": jnp.zeros(3)}


def residual(params, batch):
    return batch[0] @ params["w"] - batch[1]


def loss(params, batch):
    return 0.5 * jnp.mean(residual(params, batch) ** 2)


METRIC = ng.gauss_newton(residual)
# One undamped step solves the least-squares problem.
NEWTON = ng.natural_gradient(1.0, METRIC, damping=0.0)
INNER = {
    "natural_gradient": (NEWTON, {}),
    "masked": (optax.masked(NEWTON, {"w": True}), {}),
    "levenberg_marquardt": (
        ng.levenberg_marquardt(ng.natural_gradient(1.0, METRIC), METRIC, initial_damping=1e-4),
        {"value_fn": loss},
    ),
    "a line search": (
        optax.chain(NEWTON, optax.scale_by_backtracking_linesearch(10)),
        {"value_fn": lambda params: loss(params, BATCH)},
    ),
    "auxiliary output": (
        ng.adaptive_natural_gradient(METRIC, initial_damping=1e-4),
        {"value_fn": lambda params, batch: (loss(params, batch), 0), "has_aux": True},
    ),
}


def bound(name):
    tx, keywords = INNER[name]
    return ng.bind_batch(tx, BATCH, **keywords)


def solved(params):
    np.testing.assert_allclose(params["w"], SOLUTION, atol=1e-3)


@pytest.mark.parametrize("name", INNER)
def test_a_flax_train_state_needs_no_keywords(name, standard_promotion):
    train_state = pytest.importorskip("flax.training.train_state")
    create = lambda tx: train_state.TrainState.create(apply_fn=residual, params=START, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params, BATCH)))
    state = step(step(create(bound(name))))
    solved(state.params)
    assert ng.info(state).damping >= 0
    # The control: unbound, the state has no way to pass the batch.
    with pytest.raises(TypeError, match="needs the keyword argument `batch`"):
        step(create(NEWTON))


def test_optimistix_finds_the_minimum(standard_promotion):
    optimistix = pytest.importorskip("optimistix")

    def minimised(tx):
        solver = optimistix.OptaxMinimiser(tx, rtol=1e-6, atol=1e-6)
        return optimistix.minimise(loss, solver, START, args=BATCH, max_steps=20)

    for name in ("natural_gradient", "a line search", "levenberg_marquardt"):
        tx = INNER[name][0]  # it passes its own `value_fn`
        solved(minimised(ng.bind_batch(tx, BATCH)).value)
    # It makes operands of the arrays in an optimizer's closures; a metric may have some.
    shift = jnp.zeros(40)
    metric = ng.gauss_newton(lambda params, batch: residual(params, batch) + shift)
    solved(minimised(ng.bind_batch(ng.natural_gradient(1.0, metric, damping=0.0), BATCH)).value)
    with pytest.raises(TypeError, match="needs the keyword argument `batch`"):
        minimised(NEWTON)


def test_numpyro_finds_the_maximum_a_posteriori(standard_promotion):
    numpyro = pytest.importorskip("numpyro")

    def model(x, y):
        w = numpyro.sample("w", numpyro.distributions.Normal(jnp.zeros(3), 1e3).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", numpyro.distributions.Normal(x @ w, 1.0), obs=y)

    def found(tx):
        guide = numpyro.infer.autoguide.AutoDelta(model)
        svi = numpyro.infer.SVI(
            model, guide, numpyro.optim.optax_to_numpyro(tx), numpyro.infer.Trace_ELBO()
        )
        return svi.run(jax.random.key(0), 3, *BATCH, progress_bar=False).params

    # SVI's objective is a sum over examples, F a mean.
    metric = ng.gauss_newton(lambda p, batch: residual({"w": p["w_auto_loc"]}, batch))
    tx = ng.natural_gradient(1.0 / len(X), metric, damping=0.0)
    solved({"w": found(ng.bind_batch(tx, BATCH))["w_auto_loc"]})
    with pytest.raises(TypeError, match="needs the keyword argument `batch`"):
        found(tx)


def test_sam_forwards_no_keywords_and_takes_what_is_bound(standard_promotion):
    def run(tx, **keywords):
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(1e-3))
        sam, params = optax.contrib.sam(tx, adversary), START
        state = sam.init(params)
        for _ in range(4):
            grads = jax.grad(loss)(params, BATCH)
            updates, state = sam.update(grads, state, params, **keywords)
            params = optax.apply_updates(params, updates)
        return params

    # It steps with the gradient at a neighbour.
    np.testing.assert_allclose(run(bound("natural_gradient"))["w"], SOLUTION, atol=1e-2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        run(NEWTON, batch=BATCH)
    with pytest.raises(TypeError, match="needs the keyword argument `batch`"):
        run(NEWTON)


def halves(count):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, 20 * (count % 2), 20), BATCH)


def test_a_function_gives_the_batch_of_every_update():
    tx = ng.bind_batch(ng.scale_by_natural_gradient(METRIC), halves)
    plain, grads = ng.scale_by_natural_gradient(METRIC), {"w": jnp.ones(3)}
    update = jax.jit(tx.update)
    state, found = tx.init(START), []
    for _ in range(3):
        updates, state = update(grads, state, START)
        found.append(updates["w"])
    expected = [
        plain.update(grads, plain.init(START), START, batch=halves(k))[0]["w"] for k in (0, 1)
    ]
    np.testing.assert_allclose(found, [expected[0], expected[1], expected[0]], rtol=1e-5)
    assert not np.allclose(expected[0], expected[1], rtol=1e-2)
    assert int(state.count) == 3


def test_hidden_parameters_need_no_keyword_either():
    params = {"w": jnp.zeros(3), "b": jnp.ones(())}
    metric = ng.gauss_newton(lambda p, batch: residual(p, batch) + p["b"])
    natural = ng.natural_gradient(1.0, metric, damping=0.0)
    tx = optax.partition({"ours": natural, "other": optax.sgd(0.0)}, {"w": "ours", "b": "other"})
    grads = jax.grad(lambda p: 0.5 * jnp.mean(metric.outputs(p, BATCH) ** 2))(params)
    whole = ng.bind_batch(tx, BATCH)
    updates, _ = whole.update(grads, whole.init(params), params)
    solved({"w": updates["w"] + np.linalg.lstsq(X, np.ones(40), rcond=None)[0]})
    with pytest.raises(ValueError, match="full_params=params"):
        tx.update(grads, tx.init(params), params, batch=BATCH)


@pytest.mark.parametrize("bound", [True, False])
def test_a_line_search_beside_hidden_parameters_needs_it(bound, standard_promotion):
    """In a plain chain it refuses the `full_params` that a mask asks for."""
    tx = optax.chain(optax.masked(NEWTON, {"w": True, "b": False}), optax.scale(1.0))
    tx = optax.chain(tx, optax.scale_by_backtracking_linesearch(10))
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    value, grad = jax.value_and_grad(loss)(params, BATCH)
    keywords = {"value": value, "grad": grad, "value_fn": loss}
    if bound:
        whole = ng.bind_batch(tx, BATCH)
        solved(whole.update(grad, whole.init(params), params, **keywords)[0])
        return
    with pytest.raises(TypeError, match="full_params"):
        tx.update(grad, tx.init(params), params, batch=BATCH, full_params=params, **keywords)


MISTAKES = {
    "no transformation": (lambda: ng.bind_batch(METRIC, BATCH), "inner must be an optax"),
    "no arrays": (lambda: ng.bind_batch(NEWTON, (X, "y")), r"bind_batch: batch\[1\] must be an"),
    "an objective that is none": (
        lambda: ng.bind_batch(NEWTON, BATCH, value_fn=3.0),
        "value_fn must be a function, got 3.0",
    ),
    "a second batch": (
        lambda: bound("natural_gradient").update(
            START, bound("natural_gradient").init(START), START, batch=BATCH
        ),
        "bind_batch: update.. got the keyword `batch`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    call, message = MISTAKES[name]
    with pytest.raises(TypeError, match=message):
        call()

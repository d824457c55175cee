"""Inside optax's own wrappers: clipping, accumulation, masks, partitions, schedules, averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

# optax's adam, schedules, MultiSteps and plateau mix floats with integer counts. One setting for
# all tests here, because what is compiled under one is not shared with the other.
pytestmark = pytest.mark.usefixtures("standard_promotion")

EPS = float(np.finfo(np.float32).eps)
categorical = ng.Categorical()


def model(params, batch):
    """Pixels are words: each of 17 grey levels has an embedding, weighted by where it stands."""
    words = params["embedding"][batch["grey"]]  # (N, 64, 2)
    hidden = jnp.tanh(jnp.einsum("nsk,skh->nh", words, params["hidden"]))
    return hidden @ params["head"]


def loss(params, batch):
    return -jnp.mean(categorical.log_prob(model(params, batch), batch["label"]))


metric = ng.exact_fisher(model, categorical)
# Converged, so that rounding does not show; a few iterations are enough to train with.
solver = ng.cg(100, tol=1e-6)
grad = jax.jit(jax.grad(loss))


def grey_levels(digits, part):
    grey = np.int32(16 * digits["image"].reshape(-1, 64))
    return {"grey": grey[part], "label": digits["label"][part]}


@pytest.fixture(scope="module")
def pixels(digits):
    return grey_levels(digits, slice(50))


@pytest.fixture(scope="module")
def more_pixels(digits):
    return grey_levels(digits, slice(50, 100))


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embedding": jax.random.normal(keys[0], (17, 2)),
        "hidden": jax.random.normal(keys[1], (64, 2, 6)) / 8,
        "head": jax.random.normal(keys[2], (6, 10)) / 2,
    }


def assert_close(found, expected, tolerance=1e3 * EPS):
    error = optax.tree.norm(optax.tree.sub(found, expected))
    assert error <= tolerance * optax.tree.norm(expected)


def natural():
    return ng.scale_by_natural_gradient(metric, solver=solver, damping=0.1)


def direction(params, batch, grads, **kwargs):
    tx = natural()
    return tx.update(grads, tx.init(params), params, batch=batch, **kwargs)[0]


@pytest.mark.smoke
def test_a_realistic_chain_learns_the_digits(params, pixels):
    """Clipping, schedules, decay, a bound on the KL, accidents skipped, parameters averaged."""
    rate = optax.schedules.warmup_cosine_decay_schedule(0.1, 1.0, 3, 20)
    damping = optax.schedules.exponential_decay(1e-1, 20, 1e-1)
    tx = optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            ng.natural_gradient(
                rate, metric, solver=ng.cg(10), damping=damping, max_kl=0.3, weight_decay=1e-4
            ),
        ),
        max_consecutive_errors=3,
    )

    @jax.jit
    def step(carry, _):
        params, average, state = carry
        updates, state = tx.update(jax.grad(loss)(params, pixels), state, params, batch=pixels)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, step_size=0.3)
        return (params, average, state), None

    (trained, average, _), _ = jax.lax.scan(step, (params, params, tx.init(params)), length=20)
    accuracy = lambda p: jnp.mean(jnp.argmax(model(p, pixels), axis=-1) == pixels["label"])
    assert accuracy(params) < 0.3
    assert accuracy(trained) > 0.95
    assert accuracy(average) > 0.95


def test_clipping_the_gradient_before_us_scales_the_direction(params, pixels):
    """The direction is linear in the gradient; clipping it afterwards gives another length."""
    grads = grad(params, pixels)
    limit = optax.tree.norm(grads) / 4
    clip = optax.clip_by_global_norm(limit)

    def update(tx):
        return tx.update(grads, tx.init(params), params, batch=pixels)[0]

    unclipped = update(natural())
    assert_close(update(optax.chain(clip, natural())), optax.tree.scale(0.25, unclipped))
    assert_close(optax.tree.norm(update(optax.chain(natural(), clip))), limit)


def test_multi_steps_applies_the_last_fisher_matrix_to_the_mean_gradient(
    params, pixels, more_pixels
):
    """optax averages the gradients over mini-batches; the metric sees the batch of the last one."""
    tx = optax.MultiSteps(natural(), every_k_schedule=2)
    first, second = grad(params, pixels), grad(params, more_pixels)
    silent, state = tx.update(first, tx.init(params), params, batch=pixels)
    emitted, _ = tx.update(second, state, params, batch=more_pixels)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), silent)
    mean = optax.tree.scale(0.5, optax.tree.add(first, second))
    assert_close(emitted, direction(params, more_pixels, mean))
    # The control: the first mini-batch has another Fisher matrix.
    other = direction(params, pixels, mean)
    assert optax.tree.norm(optax.tree.sub(emitted, other)) > 0.01 * optax.tree.norm(other)


def test_a_frozen_layer_stays_and_the_others_move_as_if_it_were_a_constant(params, pixels):
    """`full_params` gives the metric the layers that `optax.masked` hides from it."""
    train = {"embedding": False, "hidden": True, "head": True}
    frozen = jax.tree.map(lambda x: not x, train)
    tx = optax.chain(
        optax.masked(natural(), train),
        optax.masked(optax.set_to_zero(), frozen),
    )
    grads = grad(params, pixels)
    updates, _ = tx.update(grads, tx.init(params), params, batch=pixels, full_params=params)
    np.testing.assert_array_equal(updates["embedding"], 0)

    rest = lambda tree: {name: tree[name] for name in ("hidden", "head")}
    with_constant = lambda p, batch: model({**p, "embedding": params["embedding"]}, batch)
    constant = ng.exact_fisher(with_constant, categorical)
    alone = ng.scale_by_natural_gradient(constant, solver=solver, damping=0.1)
    expected, _ = alone.update(rest(grads), alone.init(rest(params)), rest(params), batch=pixels)
    assert_close(rest(updates), expected)
    # The control: the natural gradient of all layers together, with one dropped, is another one.
    dropped = rest(direction(params, pixels, grads))
    assert optax.tree.norm(optax.tree.sub(dropped, expected)) > 0.01 * optax.tree.norm(expected)


def test_a_mask_without_full_params_is_an_error_that_asks_for_them(params, pixels):
    tx = optax.masked(natural(), {"embedding": False, "hidden": True, "head": True})
    with pytest.raises(ValueError, match="pass full_params=params to update"):
        tx.update(params, tx.init(params), params, batch=pixels)


def test_adam_moves_the_embeddings_and_the_natural_gradient_the_rest(params, pixels):
    labels = {"embedding": "adam", "hidden": "natural", "head": "natural"}
    natural_step = ng.natural_gradient(0.5, metric, solver=solver, damping=0.1)
    tx = optax.partition({"adam": optax.adam(1e-2), "natural": natural_step}, labels)
    state, p = tx.init(params), params
    first, _ = tx.update(grad(p, pixels), state, p, batch=pixels, full_params=p)
    adam = optax.adam(1e-2)
    alone, _ = adam.update(grad(p, pixels), adam.init(p))
    assert_close(first["embedding"], alone["embedding"])
    assert optax.tree.norm(optax.tree.sub(first["head"], alone["head"])) > 0.1 * optax.tree.norm(
        alone["head"]
    )
    for _ in range(5):
        updates, state = tx.update(grad(p, pixels), state, p, batch=pixels, full_params=p)
        p = optax.apply_updates(p, updates)
    assert loss(p, pixels) < 0.7 * loss(params, pixels)


def test_apply_if_finite_skips_a_broken_gradient_and_goes_on(params, pixels):
    tx = optax.apply_if_finite(natural(), max_consecutive_errors=3)
    grads = grad(params, pixels)
    state = tx.init(params)
    broken = {**grads, "head": grads["head"].at[0, 0].set(jnp.nan)}
    skipped, after = tx.update(broken, state, params, batch=pixels)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), skipped)
    assert int(after.total_notfinite) == 1
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)

    resumed, after = tx.update(grads, after, params, batch=pixels)
    assert int(after.total_notfinite) == 1
    untouched, _ = tx.update(grads, state, params, batch=pixels)
    jax.tree.map(np.testing.assert_array_equal, resumed, untouched)


def test_injected_damping_can_be_changed_between_steps_without_compiling_again(params, pixels):
    tx = optax.inject_hyperparams(ng.natural_gradient)(
        learning_rate=1.0, metric=metric, solver=solver, damping=0.1
    )
    grads, traces = grad(params, pixels), []

    @jax.jit
    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state, params, batch=pixels)

    state = tx.init(params)
    before, state = update(grads, state)
    state.hyperparams["damping"] = jnp.asarray(10.0, state.hyperparams["damping"].dtype)
    # A fresh start for CG, so that only the damping differs.
    after, _ = update(grads, state._replace(inner_state=tx.init(params).inner_state))
    assert_close(before, optax.tree.scale(-1.0, direction(params, pixels, grads)))
    assert_close(after, optax.tree.scale(-1.0, direction(params, pixels, grads, damping=10.0)))
    assert optax.tree.norm(after) < 0.5 * optax.tree.norm(before)
    assert len(traces) == 1


def test_damping_as_a_keyword_of_update_goes_before_the_one_given_at_construction(params, pixels):
    grads = grad(params, pixels)
    tx = ng.scale_by_natural_gradient(metric, solver=solver, damping=10.0)
    expected, _ = tx.update(grads, tx.init(params), params, batch=pixels)
    assert_close(direction(params, pixels, grads, damping=10.0), expected)
    assert optax.tree.norm(expected) < 0.5 * optax.tree.norm(direction(params, pixels, grads))


def test_a_rate_that_falls_on_a_plateau_reads_its_value_beside_us(params, pixels):
    """`reduce_on_plateau` takes `value=`; both get all keywords and take what is theirs."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx, grads = optax.chain(natural(), plateau), grad(params, pixels)
    state, steps = tx.init(params), []
    for value in (1.0, 2.0, 2.0, 2.0):
        updates, state = tx.update(grads, state, params, batch=pixels, value=jnp.float32(value))
        steps.append(updates)
    assert_close(optax.tree.norm(steps[0]), optax.tree.norm(direction(params, pixels, grads)))
    assert optax.tree.norm(steps[-1]) < 0.6 * optax.tree.norm(steps[0])

"""Saving and resuming: the state holds arrays only, so training goes on bit for bit."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

categorical = ng.Categorical()


def model(params, batch):
    x = batch["image"].reshape(batch["image"].shape[0], -1)
    return jnp.tanh(x @ params["hidden"]) @ params["head"]


def loss(params, batch):
    return -jnp.mean(categorical.log_prob(model(params, batch), batch["label"]))


def start():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(first, (64, 8)) / 8,
        "head": jax.random.normal(second, (8, 10)) / 3,
    }


# All that a state can hold: a step count that a schedule reads, random bits, a velocity, and the
# last solution of the conjugate gradients.
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    ng.natural_gradient(
        0.5,
        ng.sampled_fisher(model, categorical),
        solver=ng.cg(5),
        damping=optax.schedules.exponential_decay(1.0, 3, 0.5),
        momentum=0.9,
        max_kl=0.1,
        key=7,
    ),
)


@jax.jit
def step(params, state, batch):
    updates, state = tx.update(jax.grad(loss)(params, batch), state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def train(params, state, batch, steps):
    for _ in range(steps):
        params, state = step(params, state, batch)
    return params, state


def through_pickle(tree, path):
    path.write_bytes(pickle.dumps(tree))
    return pickle.loads(path.read_bytes())


def through_orbax(tree, path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    # Orbax restores into a tree of the right structure: that of a new start.
    target = jax.eval_shape(lambda: (start(), tx.init(start())))
    with checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


@pytest.mark.parametrize(
    "save_and_load", [pytest.param(through_pickle, marks=pytest.mark.smoke), through_orbax]
)
def test_training_resumes_bit_for_bit(digits, tmp_path, save_and_load):
    params, state = train(start(), tx.init(start()), digits, 3)
    uninterrupted = train(params, state, digits, 3)
    loaded_params, loaded_state = save_and_load((params, state), tmp_path / "checkpoint")
    assert jax.tree.structure(loaded_state) == jax.tree.structure(state)
    resumed = train(loaded_params, loaded_state, digits, 3)
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


def test_training_without_the_state_goes_elsewhere(digits):
    """The control: the parameters alone do not tell how training went on."""
    params, state = train(start(), tx.init(start()), digits, 3)
    uninterrupted, _ = train(params, state, digits, 3)
    restarted, _ = train(params, tx.init(params), digits, 3)
    difference = optax.tree.norm(optax.tree.sub(restarted, uninterrupted))
    assert difference > 1e-2 * optax.tree.norm(optax.tree.sub(uninterrupted, params))


def test_every_leaf_of_the_state_is_an_ordinary_array():
    """No typed keys and no functions, which some formats refuse."""
    for leaf in jax.tree.leaves(tx.init(start())):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)

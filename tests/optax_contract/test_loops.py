"""P19: the train step in a scan, over an ensemble of seeds, and through checkpoints."""

import functools
import pickle

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
STEPS = 3
SOME = pytest.mark.parametrize("name", cases.CASES)
# vmap turns `cond` into both branches and batches while-loops.
LOOPED = list(cases.CASES)


def optimizer(name):
    rate = [] if name.startswith("natural_gradient") else [optax.scale(-0.01)]
    return optax.chain(cases.transformation(name), *rate)


def objective(params, batch):
    """The loss, tilted: logits of two classes have opposite gradients, ties for the 1-norm."""
    return cases.loss(params, batch) + 0.1 * cases.slope(params)


gradient = jax.jit(jax.grad(objective))


def train_step(tx, batch, params, state):
    grads = gradient(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch, value_fn=objective)
    return optax.apply_updates(params, updates), state


@functools.cache
def steps_one_by_one(name):
    """Parameters after each of a few eager steps."""
    tx, (params, _, batch) = optimizer(name), cases.arrays()
    state, path = tx.init(params), []
    for _ in range(STEPS):
        params, state = train_step(tx, batch, params, state)
        path.append(oracle.ravel(params))
    return np.stack(path)


def at(stacked, index):
    return jax.tree.map(lambda x: x[index], stacked)


def close(got, expected):
    # Steps of length about 1e-2 from systems of condition number 100; cg stops at 1e-6.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOOPED)
def test_a_scan_takes_the_same_steps(name, x64):
    tx, (params, _, batch) = optimizer(name), cases.arrays()

    def step(carry, _):
        params, state = train_step(tx, batch, *carry)
        return (params, state), jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(params)])

    _, scanned = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    close(scanned, steps_one_by_one(name))


@pytest.mark.parametrize("name", LOOPED)
def test_an_ensemble_trains_like_its_members(name, x64):
    tx, (params, _, batch) = optimizer(name), cases.arrays()
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 1.1 * p, 0.0 * p]), params)
    states = jax.vmap(tx.init)(ensemble)
    trained, new = jax.jit(jax.vmap(functools.partial(train_step, tx, batch)))(ensemble, states)
    assert checks.types(new) == checks.types(states)
    for i in range(3):
        member, got = at(ensemble, i), at(trained, i)
        alone, _ = train_step(tx, batch, member, tx.init(member))
        close(oracle.ravel(got), oracle.ravel(alone))


def test_an_ensemble_of_seeds_draws_different_samples(x64):
    """The seed is an argument of the factory; under vmap it is traced."""
    params, grads, batch = cases.arrays()

    def first_step(seed):
        metric = cases.METRICS["sampled_fisher"]
        tx = ng.scale_by_natural_gradient(metric, damping=cases.DAMPING, key=seed)
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    steps = jax.vmap(first_step)(jnp.arange(3))
    rows = np.stack([oracle.ravel(at(steps, i)) for i in range(3)])
    assert len({tuple(np.round(row, 6)) for row in rows}) == 3
    oracle.close(rows[2], first_step(2), EPS, 1e3)


def test_the_ensemble_meets_a_member_that_differs(x64):
    """The control: the tolerance of these comparisons is far below what a step does."""
    path = steps_one_by_one("scale_by_natural_gradient-automatic")
    assert np.min(np.max(np.abs(np.diff(path, axis=0)), axis=1)) > 1e-4


def trained(name):
    tx, (params, grads, batch) = cases.transformation(name), cases.arrays()
    _, state = tx.update(grads, tx.init(params), params, batch=batch)
    next_update = lambda state: tx.update(grads, state, params, batch=batch)[0]
    return state, next_update


@SOME
def test_a_pickled_state_is_the_same_bit_by_bit_and_continues(name, x64):
    state, next_update = trained(name)
    restored = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    oracle.close(next_update(restored), next_update(state), EPS, 100)


@pytest.mark.parametrize("name", [name for name in cases.CASES if "steepest_descent" not in name])
def test_a_state_from_orbax_is_the_same_bit_by_bit_and_continues(name, x64, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    state, next_update = trained(name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda s: s, state))
    assert checks.types(restored) == checks.types(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    oracle.close(next_update(restored), next_update(state), EPS, 100)

"""Training a network on handwritten digits, in float32: which metric goes with which solver."""

import jax
import jax.numpy as jnp
import optax
import pytest

import natgrad_jax as ng

categorical = ng.Categorical()


def model(params, batch):
    x = batch["image"].reshape(batch["image"].shape[0], -1)
    x = jnp.tanh(x @ params["hidden"]["weight"] + params["hidden"]["bias"][None])
    return x @ params["head"]["weight"] + params["head"]["bias"][None]


def log_prob(params, batch):
    return categorical.log_prob(model(params, batch), batch["label"])


def loss(params, batch):
    return -jnp.mean(log_prob(params, batch))


gradient = jax.jit(jax.grad(loss))


def start():
    """A 64-16-10 network."""
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": {"weight": jax.random.normal(first, (64, 16)) / 8, "bias": jnp.zeros(16)},
        "head": {"weight": jax.random.normal(second, (16, 10)) / 4, "bias": jnp.zeros(10)},
    }


def train(tx, batch, steps):
    """The share of digits known after some steps.

    `update` is compiled by itself: the whole step may be jitted, and need not be.
    """
    params = start()
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    return jnp.mean(jnp.argmax(model(params, batch), axis=-1) == batch["label"])


exact = ng.exact_fisher(model, categorical)
sampled = ng.sampled_fisher(model, categorical)
empirical = ng.empirical_fisher(log_prob)
woodbury = ng.woodbury()

# name: (transformation, steps that it gets)
TRAINING = {
    # Many output columns: no rows, products alone.
    "exact, cg": (
        ng.natural_gradient(1.0, exact, solver=ng.cg(20), damping=1e-2, max_kl=0.3),
        8,
    ),
    # One row for each example, but most of a gradient lies outside them: bound the step.
    "sampled, woodbury": (
        ng.natural_gradient(1.0, sampled, solver=woodbury, damping=0.1, max_kl=0.3),
        15,
    ),
    # The gradient lies in the row space, though the matrix is not the Fisher matrix.
    "empirical, woodbury": (
        ng.natural_gradient(1.0, empirical, solver=woodbury, damping=0.1),
        25,
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_network_learns_every_digit(digits, name):
    natural, steps = TRAINING[name]
    tx = optax.chain(optax.clip_by_global_norm(10.0), natural)
    assert train(tx, digits, 0) < 0.3
    assert train(tx, digits, steps) >= 0.98


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0, 3.0])
def test_gradient_descent_does_not_in_eight_steps(digits, rate):
    """The control of the exact Fisher matrix."""
    assert train(optax.with_extra_args_support(optax.sgd(rate)), digits, 8) < 0.9


def test_a_sampled_fisher_without_a_bound_does_not(digits):
    """The control of `max_kl`: outside the row space a small damping makes the step huge."""
    tx = ng.natural_gradient(1.0, sampled, solver=woodbury, damping=1e-3)
    assert train(tx, digits, 15) < 0.9

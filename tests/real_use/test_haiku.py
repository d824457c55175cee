"""dm-haiku: `hk.transform` gives the pure function that a metric needs.

A network with state (the averages of a batch normalisation in evaluation mode) gets it through the
batch, with `batch_axes=None` for what all examples share.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

hk = pytest.importorskip("haiku")

categorical = ng.Categorical()


def accuracy(logits, batch):
    return jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])


@hk.without_apply_rng
@hk.transform
def mlp(image):
    x = jnp.tanh(hk.Linear(12)(hk.Flatten()(image)))
    return hk.Linear(10)(hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x))


def model(params, batch):
    return mlp.apply(params, batch["image"])


def loss(params, batch):
    return -jnp.mean(categorical.log_prob(model(params, batch), batch["label"]))


gradient = jax.jit(jax.grad(loss))


def train(tx, batch, steps):
    params = jax.jit(mlp.init)(jax.random.key(0), batch["image"])
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    return accuracy(model(params, batch), batch)


def test_an_mlp_learns_its_digits_in_ten_steps(digits):
    metric = ng.exact_fisher(model, categorical)
    tx = ng.natural_gradient(1.0, metric, solver=ng.cg(20), damping=0.1)
    assert train(tx, digits, 10) == 1.0


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_gradient_descent_does_not_learn_them_in_ten_steps(digits, rate):
    assert train(optax.with_extra_args_support(optax.sgd(rate)), digits, 10) < 0.9


@hk.without_apply_rng
@hk.transform_with_state
def normalised(image, is_training):
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    x = norm(hk.Linear(4)(hk.Flatten()(image)), is_training=is_training)
    return hk.Linear(10)(jnp.tanh(x))


def normalised_model(params, batch):
    return normalised.apply(params, batch["net_state"], batch["image"], is_training=False)[0]


@pytest.fixture(scope="module")
def normalised_start(digits):
    """Parameters, and a batch that carries the network's state."""
    init = jax.jit(normalised.init, static_argnames="is_training")
    # Haiku's moving averages raise a float to an integer power.
    with jax.numpy_dtype_promotion("standard"):
        params, net_state = init(jax.random.key(0), digits["image"], is_training=True)
        _, net_state = normalised.apply(params, net_state, digits["image"], is_training=True)
    return params, {**digits, "net_state": net_state}


def test_a_state_in_the_batch_is_a_state_closed_over(normalised_start, digits):
    params, batch = normalised_start
    axes = {"image": 0, "label": 0, "net_state": None}
    carried = ng.exact_fisher(normalised_model, categorical, batch_axes=axes)

    def closed_over(params, digits):
        return normalised_model(params, {**digits, "net_state": batch["net_state"]})

    found = ng.fisher_diagonal(carried, params, batch)
    expected = ng.fisher_diagonal(ng.exact_fisher(closed_over, categorical), params, digits)
    distance = lambda a, b: optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)
    assert distance(found, expected) < 100 * np.finfo(np.float32).eps
    # The control: another state gives another matrix.
    shifted = jax.tree.map(lambda x: x + jnp.ones_like(x), batch["net_state"])
    other = ng.fisher_diagonal(carried, params, {**batch, "net_state": shifted})
    assert distance(found, other) > 0.1


def test_state_that_is_declared_per_example_is_an_error(normalised_start):
    """The control: without `batch_axes` the averages would count as examples."""
    params, batch = normalised_start
    metric = ng.exact_fisher(normalised_model, categorical)
    tx = ng.natural_gradient(1.0, metric)
    with pytest.raises(ValueError, match="batch_axes=None for leaves that all examples share"):
        tx.update(params, tx.init(params), params, batch=batch)

"""equinox: a network is one pytree; `eqx.partition` leaves None where there is nothing to train.

The metric sees what `eqx.partition(net, eqx.is_inexact_array)` gives, a tree with None leaves, and
puts the rest back with `eqx.combine`.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import natgrad_jax as ng

eqx = pytest.importorskip("equinox")


class MLP(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    calls: jax.Array  # an integer array: part of the network, not trained

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 12, key=first)
        self.norm = eqx.nn.LayerNorm(12)
        self.head = eqx.nn.Linear(12, 10, key=second)
        self.calls = jnp.zeros((), jnp.int32)

    def __call__(self, image):
        return self.head(self.norm(jnp.tanh(self.hidden(image.reshape(-1)))))


net = MLP(jax.random.key(0))
_, static = eqx.partition(net, eqx.is_inexact_array)
categorical = ng.Categorical()


def model(params, batch):
    return jax.vmap(eqx.combine(params, static))(batch["image"])


def loss(net, batch):
    return -jnp.mean(categorical.log_prob(jax.vmap(net)(batch["image"]), batch["label"]))


value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(loss))
metric = ng.exact_fisher(model, categorical)
natural = ng.natural_gradient(1.0, metric, solver=ng.cg(20), damping=0.1)


def train(tx, batch, steps):
    """Trains `net` and gives the trained network and its accuracy."""
    trained, state = net, tx.init(eqx.filter(net, eqx.is_inexact_array))
    for _ in range(steps):
        _, grads = value_and_grad(trained, batch)
        params = eqx.filter(trained, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, batch=batch)
        trained = eqx.apply_updates(trained, updates)
    logits = eqx.filter_vmap(trained)(batch["image"])
    return trained, jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])


def test_an_mlp_learns_its_digits_in_ten_steps(digits):
    trained, accuracy = train(natural, digits, 10)
    assert accuracy == 1.0
    assert jax.tree.structure(trained) == jax.tree.structure(net)


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_gradient_descent_does_not_learn_them_in_ten_steps(digits, rate):
    _, accuracy = train(optax.with_extra_args_support(optax.sgd(rate)), digits, 10)
    assert accuracy < 0.9


def test_none_leaves_stay_none_in_updates_and_state(digits):
    params = eqx.filter(net, eqx.is_inexact_array)
    assert params.calls is None
    _, grads = value_and_grad(net, digits)
    state = natural.init(params)
    updates, new_state = natural.update(grads, state, params, batch=digits)
    assert updates.calls is None
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_a_whole_network_in_place_of_its_parameters_is_an_error_that_names_the_leaf(digits):
    """Without `eqx.filter`, integer arrays come in as parameters."""
    state = natural.init(eqx.filter(net, eqx.is_inexact_array))
    with pytest.raises(TypeError, match=r"params\.calls has dtype int32"):
        natural.update(net, state, net, batch=digits)

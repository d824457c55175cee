"""flax nnx: `nnx.Optimizer.update` passes keywords on to the transformation, so `batch=` is enough.

The metric needs the model as a function of its parameters: `nnx.split` takes the network apart
once, `nnx.merge` puts it together around any parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

nnx = pytest.importorskip("flax.nnx")


class MLP(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(64, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, image):
        x = image.reshape(image.shape[0], -1)
        return self.head(self.norm(nnx.tanh(self.hidden(x))))


categorical = ng.Categorical()


def loss(net, batch):
    return -jnp.mean(categorical.log_prob(net(batch["image"]), batch["label"]))


@nnx.jit
def accuracy(net, batch):
    return jnp.mean(jnp.argmax(net(batch["image"]), axis=-1) == batch["label"])


def build(tx_of_metric):
    """A network, the transformation that `tx_of_metric` makes, and their optimizer."""
    net = MLP(rngs=nnx.Rngs(0))
    graph, _ = nnx.split(net, nnx.Param)

    def model(params, batch):
        return nnx.merge(graph, params)(batch["image"])

    tx = tx_of_metric(ng.exact_fisher(model, categorical))
    return net, tx, nnx.Optimizer(net, tx, wrt=nnx.Param)


@nnx.jit
def train_step(net, optimizer, batch):
    grads = nnx.grad(loss)(net, batch)
    optimizer.update(net, grads, batch=batch)


def test_an_mlp_learns_its_digits_in_ten_steps(digits):
    tx = lambda metric: ng.natural_gradient(1.0, metric, solver=ng.cg(20), damping=0.1)
    net, _, optimizer = build(tx)
    for _ in range(10):
        train_step(net, optimizer, digits)
    assert accuracy(net, digits) == 1.0


def test_gradient_descent_does_not_learn_them_in_ten_steps(digits):
    """The control: the same gradients without the metric, at the best of these rates."""

    def trained(rate):
        net, _, optimizer = build(lambda metric: optax.with_extra_args_support(optax.sgd(rate)))
        for _ in range(10):
            train_step(net, optimizer, digits)
        return accuracy(net, digits)

    assert max(trained(rate) for rate in (0.01, 0.1, 1.0)) < 0.9


def test_the_optimizer_takes_the_steps_of_optax_alone(digits):
    """`nnx.state` is a pytree of parameters like any other."""
    net, tx, optimizer = build(
        lambda metric: ng.natural_gradient(1.0, metric, solver=ng.diagonal(), damping=0.1)
    )
    before = jax.tree.map(jnp.array, nnx.state(net, nnx.Param))
    grads = nnx.jit(nnx.grad(loss))(net, digits)
    optimizer.update(net, grads, batch=digits)

    updates, _ = tx.update(grads, tx.init(before), before, batch=digits)
    after = nnx.state(net, nnx.Param)
    moved = optax.tree.norm(updates)
    distance = lambda step: optax.tree.norm(
        optax.tree.sub(after, optax.apply_updates(before, step))
    )
    assert distance(updates) < 1e3 * np.finfo(np.float32).eps * moved
    # The control: a step of another rate ends elsewhere.
    assert distance(optax.tree.scale(0.5, updates)) > 0.1 * moved


def test_the_optimizer_without_a_batch_fails_with_an_error_that_names_it():
    net, _, optimizer = build(lambda metric: ng.natural_gradient(1.0, metric))
    with pytest.raises(TypeError, match=r"update\(\) needs the keyword argument `batch`"):
        optimizer.update(net, nnx.state(net, nnx.Param))

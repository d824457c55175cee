"""flax linen: a convolutional network with LayerNorm, trained through a TrainState.

`TrainState.apply_gradients` calls `tx.update(grads, opt_state, params)` and passes nothing else,
but a natural gradient needs the batch. The three lines of `NaturalTrainState` hand it over.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import natgrad_jax as ng

nn = pytest.importorskip("flax.linen")
train_state = pytest.importorskip("flax.training.train_state")


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = jnp.tanh(nn.LayerNorm()(nn.Conv(4, (3, 3), strides=2)(image)))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class NaturalTrainState(train_state.TrainState):
    def apply_gradients(self, *, grads, batch, **kwargs):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, batch=batch)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


net, categorical = ConvNet(), ng.Categorical()


def model(params, batch):
    return net.apply({"params": params}, batch["image"])


def loss(params, batch):
    return -jnp.mean(categorical.log_prob(model(params, batch), batch["label"]))


@jax.jit
def accuracy(params, batch):
    return jnp.mean(jnp.argmax(model(params, batch), axis=-1) == batch["label"])


@jax.jit
def train_step(state, batch):
    grads = jax.grad(loss)(state.params, batch)
    return state.apply_gradients(grads=grads, batch=batch)


def create(kind, batch, tx):
    params = jax.jit(net.init)(jax.random.key(0), batch["image"])["params"]
    return kind.create(apply_fn=net.apply, params=params, tx=tx)


@pytest.fixture(scope="module")
def tx():
    metric = ng.exact_fisher(model, categorical)
    return optax.chain(
        optax.clip_by_global_norm(10.0),
        ng.natural_gradient(1.0, metric, solver=ng.cg(20), damping=0.1),
    )


@pytest.mark.smoke
def test_a_conv_net_with_layer_norm_learns_its_digits_in_ten_steps(tx, digits):
    state = create(NaturalTrainState, digits, tx)
    for _ in range(10):
        state = train_step(state, digits)
    assert int(state.step) == 10
    natural = state.opt_state[1][0]  # after the clipping, before the learning rate
    assert int(natural.count) == 10 and int(natural.info.iterations) > 0
    assert accuracy(state.params, digits) == 1.0


def test_gradient_descent_does_not_learn_them_in_ten_steps(digits):
    """The control: the same gradients without the metric."""

    def trained(rate):
        # `sgd` ignores the batch: `with_extra_args_support` makes it accept one.
        sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
        state = create(NaturalTrainState, digits, optax.with_extra_args_support(sgd))
        for _ in range(10):
            state = train_step(state, digits)
        return accuracy(state.params, digits)

    assert max(trained(rate) for rate in (0.01, 0.1, 1.0)) < 0.9


def test_the_plain_train_state_fails_with_an_error_that_names_the_batch(tx, digits):
    state = create(train_state.TrainState, digits, tx)
    with pytest.raises(TypeError, match=r"update\(\) needs the keyword argument `batch`"):
        state.apply_gradients(grads=state.params)

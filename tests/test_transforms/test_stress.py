"""Step control under stress, in float32: long runs, changing batches, any scale, noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(11)
INPUTS = RNG.normal(size=(16, 3)).astype(np.float32)
LABELS = RNG.integers(0, 2, size=16)
START = {
    "w": RNG.normal(size=(3, 4)).astype(np.float32),
    "v": RNG.normal(size=(4, 2)).astype(np.float32),
}
BATCHES = INPUTS.reshape(2, 8, 3), LABELS.reshape(2, 8)
CATEGORICAL = ng.Categorical()


def logits(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) @ params["v"]


def loss(params, batch):
    penalty = 1e-3 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return penalty - jnp.mean(CATEGORICAL.log_prob(logits(params, batch), batch[1]))


METRIC = ng.exact_fisher(logits, CATEGORICAL)
FIRST = jax.tree.map(lambda x: x[0], BATCHES)
OPTIMIZERS = {
    "adaptive": ng.adaptive_natural_gradient(METRIC, solver=ng.cholesky()),
    "adaptive_kfac": ng.adaptive_natural_gradient(METRIC, solver=ng.kfac(FIRST)),
    "levenberg_marquardt": ng.levenberg_marquardt(
        ng.natural_gradient(1.0, METRIC, solver=ng.woodbury()), METRIC
    ),
    "trpo": ng.trpo(logits, CATEGORICAL, max_kl=0.01),
}
ALL = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(tx, objective, steps, start, scale):
    """Alternating batches; the loss of each before its step, and the state at the end."""

    def step(carry, count):
        params, state = carry
        batch = jax.tree.map(lambda x: jnp.asarray(x)[count % 2], BATCHES)
        value_fn = lambda p, batch: scale * objective(p, batch, count)
        value, g = jax.value_and_grad(value_fn)(params, batch)
        updates, state = tx.update(g, state, params, batch=batch, value=value, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), value / scale

    (params, state), values = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), BATCHES)
    return params, state, values, loss(params, whole)


still = lambda params, batch, count: loss(params, batch)
finite = lambda tree: all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))
BEFORE = float(loss(START, (INPUTS, LABELS)))


@ALL
def test_ten_thousand_steps_neither_drift_nor_end_in_nan(name):
    # Between two batches a path is chaotic: where one ends is chance, the mean of eight is not.
    nudged = lambda k: jax.tree.map(lambda p: p * np.float32(1 + 1e-5 * k), START)
    runs = [run(OPTIMIZERS[name], still, 10_000, nudged(k), 1.0) for k in range(8)]
    assert finite([(params, values) for params, _, values, _ in runs])
    values = np.asarray([values for _, _, values, _ in runs])
    late, later = np.mean(values[:, -4000:-2000]), np.mean(values[:, -2000:])
    assert later < 1.1 * late and later < 0.95 * BEFORE
    # Steps of `trpo` keep their length, so that it swings between the batches to the end.
    assert name == "trpo" or np.mean([after for *_, after in runs]) < 0.8 * BEFORE


@ALL
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_no_harm(name, scale):
    """It makes the quadratic model wrong by as much; a rate of gradient descent, the control."""
    params, _, values, after = run(OPTIMIZERS[name], still, 300, START, scale)
    assert finite((params, values)) and after <= BEFORE
    if scale > 1:
        plain = optax.with_extra_args_support(optax.sgd(1.0))
        assert not run(plain, still, 300, START, scale)[3] <= BEFORE


@ALL
def test_a_badly_scaled_start_is_left_behind(name):
    """Plain natural gradient steps, the control, diverge from there."""
    far = jax.tree.map(lambda p: 20 * p, START)
    before = float(loss(far, (INPUTS, LABELS)))
    params, _, values, after = run(OPTIMIZERS[name], still, 300, far, 1.0)
    assert finite((params, values)) and after < 0.7 * before
    plain = ng.natural_gradient(1.0, METRIC, damping=1e-6, solver=ng.cholesky())
    _, _, values, _ = run(plain, still, 10, far, 1.0)
    assert not np.max(values) < 2 * before


@ALL
def test_noise_in_the_loss_does_no_harm(name):
    """The objective shivers by a few percent, from step to step and within one: five such runs."""

    def noisy(seed):
        def objective(params, batch, count):
            key = jax.random.fold_in(jax.random.key(seed), count)
            bits = jax.lax.bitcast_convert_type(params["w"][0, 0], jnp.int32)
            noise = jax.random.normal(jax.random.fold_in(key, bits))
            return loss(params, batch) + 0.02 * jax.lax.stop_gradient(noise)

        return objective

    one = lambda seed: run.__wrapped__(OPTIMIZERS[name], noisy(seed), 500, START, 1.0)
    params, _, values, after = jax.jit(jax.vmap(one))(jnp.arange(5))
    assert finite((params, values))
    # What one run ends with is chance: noise decides which steps are rejected.
    assert np.mean(after) < 0.9 * BEFORE

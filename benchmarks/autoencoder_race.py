"""The deep autoencoder on synthetic curves: adaptive natural gradient against tuned Adam.

784-400-200-100-50-25-6 and back, Bernoulli outputs, batches of 1000 of 10 000 images of smooth
random curves. Adam runs for 60 s with each of three learning rates; the best reconstruction error
it reaches is the target.

    seconds that `adaptive_natural_gradient` needs to the target       budget 15 (no rate to tune)
    its step with kfac, amortised / value_and_grad                     budget 3.5

Compilation stays outside the clock on both sides; so does the error on all images, after every
tenth of Adam's steps and every one of ours. `--seconds 20` runs a shorter race; `--plot FILE` draws
it.
"""

import argparse
import functools
import time

import _timing
import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgrad_jax as ng

SIZES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
CODE = SIZES.index(6)
IMAGES, BATCH = 10_000, 1_000
RATES = (3e-4, 1e-3, 3e-3)
PERIOD = 5
BERNOULLI = ng.Bernoulli()


def curves(key):
    """Images (28, 28) of cubic Bezier curves, values in [0, 1]."""
    points = jax.random.uniform(key, (2, 4), minval=4.0, maxval=24.0)
    t = jnp.linspace(0, 1, 60)[:, None]
    basis = jnp.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    x, y = points @ basis.T
    grid = jnp.arange(28.0)
    squares = (x[:, None, None] - grid[None, :, None]) ** 2 + (
        y[:, None, None] - grid[None, None, :]
    ) ** 2
    return jnp.max(jnp.exp(-squares / 1.5), axis=0).reshape(784)


def model(params, x):
    for i, layer in enumerate(params, start=1):
        x = x @ layer["w"] + layer["b"]
        if i not in (CODE, len(params)):
            x = jnp.tanh(x)
    return x


def loss(params, batch):
    return -jnp.mean(BERNOULLI.log_prob(model(params, batch), batch))


@jax.jit
def error(params, images):
    """The mean squared distance of an image and its reconstruction."""
    reconstructed = jax.nn.sigmoid(model(params, images))
    return jnp.mean(jnp.sum((reconstructed - images) ** 2, axis=1))


def batches(images, seed):
    """Endless batches in random order, each image once an epoch."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(images)).reshape(-1, BATCH)
        yield from (images[rows] for rows in order)


def stepper(tx, *, extra):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        more = {"batch": batch, "value": value, "value_fn": loss} if extra else {}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state, value

    return step


def race(tx, images, seconds, *, extra, target=None, look=1):
    """(seconds, error) after every `look` steps, until the time is over or the target reached."""
    params = _timing.mlp(SIZES, jax.random.key(1))
    state = tx.init(params)
    data = batches(images, 0)
    step = stepper(tx, extra=extra)
    copies = jax.tree.map(jnp.copy, (params, state))
    jax.block_until_ready(step(*copies, next(data)))
    elapsed, count, history = 0.0, 0, [(0.0, float(error(params, images)))]
    while elapsed < seconds:
        batch = next(data)
        begin = time.perf_counter()
        params, state, _ = jax.block_until_ready(step(params, state, batch))
        elapsed, count = elapsed + time.perf_counter() - begin, count + 1
        if count % look == 0:
            history.append((elapsed, float(error(params, images))))
            if target is not None and history[-1][1] <= target:
                break
    return history, count


def plot(histories, target, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, history in histories.items():
        axes.semilogy(*zip(*history, strict=True), label=name)
    axes.axhline(target, color="grey", linestyle=":", label="best of Adam")
    axes.set(xlabel="seconds", ylabel="reconstruction error")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def step_cost(tx, images):
    """The amortised adaptive step beside the gradient: every step of a period in its turn."""
    params, batch = _timing.mlp(SIZES, jax.random.key(1)), images[:BATCH]
    gradient = jax.jit(jax.value_and_grad(loss))
    step = stepper(tx, extra=True)
    state, own = tx.init(params), jax.tree.map(jnp.copy, params)
    times, gradients = [], []
    for _ in range(10 * PERIOD):
        begin = time.perf_counter()
        jax.block_until_ready(gradient(params, batch))
        gradients.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        own, state, _ = jax.block_until_ready(step(own, state, batch))
        times.append(time.perf_counter() - begin)
    phases = np.median(np.reshape(times, (-1, PERIOD))[2:], axis=0)
    return float(np.mean(phases) / np.median(gradients))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--plot", default=None)
    arguments = parser.parse_args()
    images = jax.jit(lambda keys: jax.lax.map(curves, keys, batch_size=100))(
        jax.random.split(jax.random.key(0), IMAGES)
    )
    metric = ng.sampled_fisher(model, BERNOULLI)
    solver = ng.kfac(images[:BATCH], factors_every=PERIOD, inverses_every=PERIOD)
    adaptive = ng.adaptive_natural_gradient(metric, solver=solver)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"adaptive step / gradient, kfac: {step_cost(adaptive, images):.2f}")

    histories = {}
    for rate in RATES:
        history, steps = race(optax.adam(rate), images, arguments.seconds, extra=False, look=10)
        histories[f"adam {rate:g}"] = history
        print(f"adam {rate:g}: error {history[-1][1]:.3f}, {steps} steps")
    target = min(e for history in histories.values() for _, e in history)
    history, steps = race(adaptive, images, arguments.seconds, extra=True, target=target)
    histories["adaptive natural gradient"] = history
    seconds, reached = history[-1]
    print(f"adaptive: error {reached:.3f} after {seconds:.1f} s, {steps} steps")
    print(f"target {target:.3f}; Adam's time / ours: {arguments.seconds / seconds:.1f}")
    if arguments.plot:
        plot(histories, target, arguments.plot)


if __name__ == "__main__":
    main()

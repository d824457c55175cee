"""The exact sampled step of a transformer block, whose weights are shared by all positions.

    value_and_grad, sampled Fisher, woodbury, apply_updates / value_and_grad        budget 4

A pre-norm block (T = 64, d = 128, 4 heads, MLP of 4 d) and a head of 10 classes at each position,
float32, batch 16: outputs (16, T, 10) are 16 examples, so M = 16. The direction is checked by a
Fisher-vector product of the linearised model, which knows no factors.
"""

import _timing
import jax
import jax.numpy as jnp
import optax

import natgrad_jax as ng

BATCH, LENGTH, WIDTH, HEADS, CLASSES = 16, 64, 128, 4, 10
DAMPING = 1.0


def block_params(key):
    keys = iter(jax.random.split(key, 5))

    def linear(m, n):
        return {"w": jax.random.normal(next(keys), (m, n)) / jnp.sqrt(m), "b": jnp.zeros((n,))}

    norm = lambda: {"scale": jnp.ones((WIDTH,)), "shift": jnp.zeros((WIDTH,))}
    return {
        "norm1": norm(),
        "qkv": linear(WIDTH, 3 * WIDTH),
        "out": linear(WIDTH, WIDTH),
        "norm2": norm(),
        "up": linear(WIDTH, 4 * WIDTH),
        "down": linear(4 * WIDTH, WIDTH),
        "norm3": norm(),
        "head": linear(WIDTH, CLASSES),
    }


def apply_linear(p, x):
    return x @ p["w"] + p["b"]


def apply_norm(p, x):
    return jax.nn.standardize(x, axis=-1) * p["scale"] + p["shift"]


def attention(p, x):
    split = lambda z: z.reshape(*z.shape[:2], HEADS, WIDTH // HEADS)
    q, k, v = (split(z) for z in jnp.split(apply_linear(p["qkv"], x), 3, axis=-1))
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / jnp.sqrt(WIDTH / HEADS)
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v)
    return apply_linear(p["out"], mixed.reshape(x.shape))


def transformer(p, batch):
    """Logits (N, T, CLASSES)."""
    x, _ = batch
    x = x + attention(p, apply_norm(p["norm1"], x))
    hidden = jax.nn.gelu(apply_linear(p["up"], apply_norm(p["norm2"], x)))
    x = x + apply_linear(p["down"], hidden)
    return apply_linear(p["head"], apply_norm(p["norm3"], x))


def main() -> None:
    params = block_params(jax.random.key(0))
    tokens = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
    batch = tokens, jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, CLASSES)
    likelihood = ng.Categorical()
    loss = lambda p, b: -jnp.mean(likelihood.log_prob(transformer(p, b), b[1]))
    metric, key = ng.sampled_fisher(transformer, likelihood), jax.random.key(3)
    gradient = jax.jit(jax.value_and_grad(loss))
    grads = gradient(params, batch)[1]

    direction, _ = ng.natural_gradient_direction(
        metric, params, batch, grads, solver=ng.woodbury(), damping=DAMPING, key=key
    )
    product = ng.fisher_vector_product(metric, params, batch, direction, key=key)
    solved = jax.tree.map(lambda f, d: f + DAMPING * d, product, direction)
    error = optax.tree.norm(optax.tree.sub(solved, grads)) / optax.tree.norm(grads)
    assert error < 1e-3, error

    tx = ng.natural_gradient(1e-2, metric, solver=ng.woodbury(), damping=DAMPING)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, value

    times = _timing.interleaved(
        {
            "value_and_grad": lambda: gradient(params, batch),
            "exact step": lambda: step(params, state, batch),
        },
        rounds=21,
    )
    title = (
        f"transformer block, P = {optax.tree.size(params)}, T = {LENGTH}, batch {BATCH} (budget 4)"
    )
    _timing.print_ratios(title, times, "value_and_grad")


if __name__ == "__main__":
    main()

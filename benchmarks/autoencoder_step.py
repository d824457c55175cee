"""The exact step on a 2.84 M-parameter autoencoder, batch 512: cost over value_and_grad, memory.

    step = value_and_grad + sampled Fisher + woodbury + apply_updates            budget 3
    one conjugate gradient iteration on the factored rows of a sampled Fisher    budget 1 gradient
    compile time of the first step                                               budget 4 s
    peak memory of the process                                                   budget 1 GB

An N x P array alone would be 5.8 GB. What XLA merges is read off its cost analysis: the flops of
the whole step against those of its parts.
"""

import resource
import time
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import optax

import natgrad_jax as ng


def flops(compiled: Any) -> float:
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def main() -> None:
    params, images, model = _timing.autoencoder()
    likelihood = ng.Bernoulli()
    loss = lambda p, b: -jnp.mean(likelihood.log_prob(model(p, b), b))
    metric = ng.sampled_fisher(model, likelihood)
    tx = ng.natural_gradient(1e-3, metric, solver=ng.woodbury(), damping=1e-2)
    state = tx.init(params)

    def step(params, state, images):
        value, grads = jax.value_and_grad(loss)(params, images)
        updates, state = tx.update(grads, state, params, batch=images)
        return optax.apply_updates(params, updates), state, value

    gradient = jax.jit(jax.value_and_grad(loss)).lower(params, images).compile()
    begin = time.perf_counter()
    lowered = jax.jit(step).lower(params, state, images)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    print(f"first step: traced in {traced - begin:.2f} s, compiled in {end - traced:.2f} s")
    print(f"flops of the step / value_and_grad: {flops(compiled) / flops(gradient):.2f}")
    new, _, _ = compiled(params, state, images)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(new))
    times = _timing.interleaved(
        {
            "value_and_grad": lambda: gradient(params, images),
            "exact step": lambda: compiled(params, state, images),
        },
        rounds=15,
    )
    _timing.print_ratios("autoencoder, batch 512, P = 2.84 M", times, "value_and_grad")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()

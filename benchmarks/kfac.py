"""K-FAC and EKFAC on the autoencoder of 2.84 M parameters, batch 512, sampled Fisher.

    amortised kfac step / Adam step, factors every step, inverses every 5th     budget 3.6
    the same with both every 5th                                                budget 2.8
    the dearest step of a period / the amortised one                            budget 1.5
    whole EKFAC step / gradient, one core, basis every step                     budget 13
    the same amortised with the basis every 5th                                 budget 8
    compile time of the first step                                              budget 4 s

A step is value_and_grad, the transformation and apply_updates in one jit. States are threaded
through, so every step of a period is timed in its turn; an amortised step is the mean over the
period of the medians.
"""

import os
import sys
import time

import _timing
import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgrad_jax as ng

PERIOD = 5
ONE_CORE = "--one-core" in sys.argv
if ONE_CORE:
    # Read when the first array is made.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def stepper(loss, tx, params, images, *, extra):
    """A compiled step and its state, with the seconds that tracing and compiling took."""

    def step(params, state, images):
        value, grads = jax.value_and_grad(loss)(params, images)
        more = {"batch": images} if extra else {}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    begin = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, images)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, state, (traced - begin, time.perf_counter() - traced)


def main() -> None:
    params, images, model = _timing.autoencoder()
    likelihood = ng.Bernoulli()
    loss = lambda p, b: -jnp.mean(likelihood.log_prob(model(p, b), b))
    metric = ng.sampled_fisher(model, likelihood)
    natural = lambda solver: ng.natural_gradient(1e-3, metric, solver=solver, damping=1e-1)
    optimisers = {
        "adam": optax.adam(1e-3),
        "kfac, inverses every 5th": natural(ng.kfac(images)),
        "kfac, both every 5th": natural(ng.kfac(images, factors_every=PERIOD)),
        "ekfac, basis every step": natural(ng.ekfac(images, basis_every=1)),
        "ekfac, basis every 5th": natural(ng.ekfac(images, basis_every=PERIOD)),
    }
    wanted = [name for name in optimisers if ONE_CORE or "ekfac" not in name]
    runs = {}
    for name in wanted:
        step, state, (traced, compiled) = stepper(
            loss, optimisers[name], params, images, extra=name != "adam"
        )
        print(f"{name}: traced in {traced:.2f} s, compiled in {compiled:.2f} s")
        held = step.memory_analysis().temp_size_in_bytes
        print(f"{'':24s} memory of a step {held / 2**20:.1f} MiB beside parameters and state")
        runs[name] = [step, (jax.tree.map(jnp.copy, params), state), []]
    gradient = jax.jit(jax.value_and_grad(loss)).lower(params, images).compile()
    gradients = []
    for turn in range((4 if ONE_CORE else 8) * PERIOD):
        begin = time.perf_counter()
        jax.block_until_ready(gradient(params, images))
        gradients.append(time.perf_counter() - begin)
        for run in runs.values():
            step, (p, state), times = run
            begin = time.perf_counter()
            p, state, value = jax.block_until_ready(step(p, state, images))
            times.append(time.perf_counter() - begin)
            run[1] = p, state
            assert bool(jnp.isfinite(value)), turn
    one = float(np.median(gradients))
    reference = float(np.median(runs["adam"][2]))
    print(f"gradient {1e3 * one:.1f} ms, adam step {1e3 * reference:.1f} ms")
    for name, (_, (_, state), times) in runs.items():
        by_phase = np.median(np.reshape(times, (-1, PERIOD))[1:], axis=0)
        mean = float(np.mean(by_phase))
        held = sum(x.nbytes for x in jax.tree.leaves(state))
        print(
            f"{name:28s} {1e3 * mean:8.1f} ms  {mean / reference:5.2f} adam steps"
            f"  {mean / one:5.2f} gradients  dearest step {by_phase.max() / mean:4.2f} x"
            f"  state {held / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()

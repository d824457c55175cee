"""How the exact sampled step grows: with parameters, with examples, with layers.

    step / gradient for P from 30 k to 3 M at N = 256            budget: no growth
    exponent of the step in N from 128 to 1024, P = 300 k        budget 1.8
    trace time of a net of 6, 12, 24 and 48 layers               budget: linear

A step is value_and_grad, the direction by `woodbury` with a sampled Fisher and `apply_updates` in
one jit, float32. Tracing is what the engine adds to a first step before XLA compiles; nothing is
compiled there. Before timing, the directions are checked by a Fisher-vector product of the
linearised model.
"""

import time

import _timing
import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgrad_jax as ng

INPUTS, CLASSES, DAMPING = 64, 10, 1e-2
WIDTHS = (140, 256, 512, 1024, 1696)
BATCHES = (128, 256, 512, 1024)
DEPTHS = (6, 12, 24, 48)

LIKELIHOOD = ng.Categorical()


def model(params, batch):
    return _timing.apply_mlp(params, batch[0])


def loss(params, batch):
    return -jnp.mean(LIKELIHOOD.log_prob(model(params, batch), batch[1]))


METRIC = ng.sampled_fisher(model, LIKELIHOOD)
TX = ng.natural_gradient(1e-2, METRIC, solver=ng.woodbury(), damping=DAMPING)


def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = TX.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state, value


def problem(hidden: tuple[int, ...], examples: int):
    params = _timing.mlp((INPUTS, *hidden, CLASSES), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (examples, INPUTS))
    return params, (x, jax.random.randint(jax.random.key(2), (examples,), 0, CLASSES))


def check(params, batch) -> None:
    """(F + damping I) d = g, where F is that of the linearised model."""
    grads, key = jax.grad(loss)(params, batch), jax.random.key(3)
    direction, _ = ng.natural_gradient_direction(
        METRIC, params, batch, grads, solver=ng.woodbury(), damping=DAMPING, key=key
    )
    product = ng.fisher_vector_product(METRIC, params, batch, direction, key=key)
    solved = jax.tree.map(lambda f, d: f + DAMPING * d, product, direction)
    error = optax.tree.norm(optax.tree.sub(solved, grads)) / optax.tree.norm(grads)
    assert error < 1e-3, error


def timed(cases: dict[str, tuple], unit: str, title: str, rounds: int) -> dict[str, float]:
    """Times of gradient and step of every case, all of them in turns."""
    gradient, compiled = jax.jit(jax.value_and_grad(loss)), jax.jit(step)
    functions = {}
    for name, (params, batch) in cases.items():
        check(params, batch)
        state = TX.init(params)
        functions[f"gradient, {name}"] = lambda p=params, b=batch: gradient(p, b)
        functions[f"step, {name}"] = lambda p=params, s=state, b=batch: compiled(p, s, b)
    times = _timing.interleaved(functions, rounds=rounds)
    _timing.print_ratios(title, times, unit)
    return times


def measure_parameters() -> None:
    cases = {}
    for width in WIDTHS:
        params, batch = problem((width, width), 256)
        cases[f"P = {optax.tree.size(params)}"] = params, batch
    first = f"gradient, {next(iter(cases))}"
    times = timed(cases, first, "growing P, N = 256 (budget: the ratio does not grow)", 11)
    for name in cases:
        print(
            f"  step / gradient, {name}: {times[f'step, {name}'] / times[f'gradient, {name}']:.2f}"
        )


def measure_examples() -> None:
    cases = {f"N = {n}": problem((512, 512), n) for n in BATCHES}
    times = timed(cases, f"gradient, N = {BATCHES[0]}", "growing N, P = 301 k (budget 1.8)", 11)
    for what in ("gradient", "step"):
        logs = [np.log(times[f"{what}, {name}"]) for name in cases]
        print(f"  exponent of the {what} in N: {np.polyfit(np.log(BATCHES), logs, 1)[0]:.2f}")


def measure_layers(rounds: int = 3) -> None:
    cases = {depth: problem((64,) * (depth - 1), 32) for depth in DEPTHS}
    states = {depth: TX.init(params) for depth, (params, _) in cases.items()}
    check(*cases[DEPTHS[0]])
    print("trace time of the step, lowered and not compiled (budget: linear)")
    for depth, (params, batch) in cases.items():
        seconds = []
        for _ in range(rounds):
            jax.clear_caches()
            begin = time.perf_counter()
            jax.jit(step).lower(params, states[depth], batch)
            seconds.append(time.perf_counter() - begin)
        best = min(seconds)
        print(f"  {depth:>3} layers: {best:7.2f} s, {1e3 * best / depth:7.1f} ms a layer")


def main() -> None:
    measure_parameters()
    measure_examples()
    measure_layers()


if __name__ == "__main__":
    main()

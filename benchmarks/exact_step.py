"""Cost of each exact solver's step over a gradient, for growing P and N.

A step is value_and_grad, the direction and `apply_updates` in one jit, with a sampled Fisher
(one row for each example). The committed figures were taken on materialised rows, M x P numbers:
the line from which the factored ones started.
"""

import sys

import _timing
import jax
import jax.numpy as jnp
import optax

import natgrad_jax as ng

WIDTHS = (16, 64, 256)
BATCHES = (64, 256, 1024)
#: Steps whose dense matrices would not fit a small machine are left out, and said so.
MAX_PARAMETERS_DENSE = 6000


def cases(width: int, batch: int) -> dict[str, tuple[ng.Solver, bool]]:
    size = 16 * width + width + width * width + width + width * 10 + 10
    dense = size <= MAX_PARAMETERS_DENSE
    return {
        "cholesky": (ng.cholesky(), dense),
        "spectral": (ng.spectral(), dense or batch <= 1024),
        "woodbury": (ng.woodbury(), True),
        "cg, 20 iterations": (ng.cg(max_iterations=20, tol=1e-30), True),
    }


def measure(width: int, batch: int) -> None:
    params = _timing.mlp((16, width, width, 10), jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    images = jax.random.normal(jax.random.key(1), (batch, 16))
    data = (images, jax.random.randint(jax.random.key(2), (batch,), 0, 10))
    likelihood = ng.Categorical()
    model = lambda p, b: _timing.apply_mlp(p, b[0])
    loss = lambda p, b: -jnp.mean(likelihood.log_prob(model(p, b), b[1]))
    metric = ng.sampled_fisher(model, likelihood)
    gradient = jax.jit(jax.value_and_grad(loss))
    functions = {"value_and_grad": lambda: gradient(params, data)}
    directions = {}
    for name, (solver, possible) in cases(width, batch).items():
        if not possible:
            print(f"  {name}: left out at P = {size}, N = {batch} (dense matrices too large)")
            continue
        tx = ng.natural_gradient(1e-2, metric, solver=solver, damping=1e-2)
        state = tx.init(params)

        def step(params, state, data, tx=tx):
            _, grads = jax.value_and_grad(loss)(params, data)
            updates, state = tx.update(grads, state, params, batch=data)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step)
        directions[name] = compiled(params, state, data)[0]
        functions[name] = lambda compiled=compiled, state=state: compiled(params, state, data)
    reference = directions["woodbury"]
    for name in directions:
        if not name.startswith("cg"):
            same = jax.tree.map(
                lambda a, b: jnp.allclose(a, b, atol=1e-3), directions[name], reference
            )
            assert all(jax.tree.leaves(same)), f"{name} and woodbury disagree"
    times = _timing.interleaved(functions, rounds=5, seconds=60)
    _timing.print_ratios(
        f"MLP 16-{width}-{width}-10, P = {size}, N = {batch}", times, "value_and_grad"
    )


def main() -> None:
    widths, batches = (WIDTHS, BATCHES) if "--quick" not in sys.argv else (WIDTHS[:2], BATCHES[:2])
    for width in widths:
        measure(width, batches[1])
    for batch in batches:
        if batch != batches[1]:
            measure(widths[1], batch)


if __name__ == "__main__":
    main()

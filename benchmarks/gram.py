"""Sample-space linear algebra of a plain MLP in float64 on one core, against what one would write.

    Gram matrix R R^T (16-307-307-1, tanh, N = 1024) / the formula by hand          budget 1.25
    the same rows by vmap(grad), J J^T, Cholesky, J^T / woodbury, P = 100 k         budget >= 30
    the same at P = 10 k (16-91-91-1)                                               budget >= 7

By hand is one forward pass, one backward pass and the sum over layers of (A A^T + 1) o (G G^T).
`gauss_newton` and `empirical_fisher` must both meet the first budget. The direction is that of
stochastic reconfiguration (centered rows), for a gradient in the row space. All of it runs on one
core: XLA's threads are off and the process is pinned.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import _timing
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

jax.config.update("jax_enable_x64", True)

EXAMPLES, INPUTS = 1024, 16
DAMPING = 1e-3


def log_psi(params, x):
    """The scalar output of the net, (N,)."""
    return _timing.apply_mlp(params, x)[:, 0]


def problem(width):
    """Parameters of 16-width-width-1, a batch, and coefficients that make a gradient R^T r."""
    params = _timing.mlp((INPUTS, width, width, 1), jax.random.key(0), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (EXAMPLES, INPUTS), jnp.float64)
    return params, x, jax.random.normal(jax.random.key(2), (EXAMPLES,), jnp.float64)


def gram_by_hand(params, x):
    """Inputs and cotangents of every layer by one pass each way, then products over the batch."""
    inputs = [x]
    for layer in params[:-1]:
        inputs.append(jnp.tanh(inputs[-1] @ layer["w"] + layer["b"]))
    g, total = jnp.ones((x.shape[0], 1), x.dtype), 0.0
    for layer, a in zip(params[::-1], inputs[::-1], strict=True):
        total += (a @ a.T + 1) * (g @ g.T)
        g = (g @ layer["w"].T) * (1 - a**2)
    return total / x.shape[0]


def direction_by_hand(params, x, grads):
    """(F + damping I)^-1 g with centered rows in a dense array (N, P)."""
    single = lambda p, x: log_psi(p, x[None])[0]
    jacobian = jax.vmap(lambda x: ravel_pytree(jax.grad(single)(params, x))[0])(x)
    rows = (jacobian - jnp.mean(jacobian, axis=0)) / jnp.sqrt(x.shape[0])
    g, unravel = ravel_pytree(grads)
    damped = rows @ rows.T + DAMPING * jnp.eye(x.shape[0])
    factor = jnp.linalg.cholesky(damped)
    solved = jax.scipy.linalg.cho_solve((factor, True), rows @ g)
    return unravel((g - rows.T @ solved) / DAMPING)


def measure_gram() -> None:
    params, x, _ = problem(307)
    by_hand = jax.jit(gram_by_hand)
    metrics = {
        "gram_matrix, gauss_newton": ng.gauss_newton(log_psi),
        "gram_matrix, empirical_fisher": ng.empirical_fisher(log_psi),
    }
    reference = by_hand(params, x)
    functions = {"by hand": lambda: by_hand(params, x)}
    for name, metric in metrics.items():
        assert jnp.allclose(ng.gram_matrix(metric, params, x), reference, rtol=1e-12), name
        functions[name] = lambda metric=metric: ng.gram_matrix(metric, params, x)
    times = _timing.interleaved(functions, rounds=21)
    _timing.print_ratios("Gram matrix, MLP 307-307, N = 1024 (budget 1.25)", times, "by hand")


def measure_direction(width: int, budget: int) -> None:
    params, x, coefficients = problem(width)
    score = jax.jit(jax.grad(lambda p: jnp.dot(coefficients, log_psi(p, x)) / EXAMPLES))
    centered = coefficients - jnp.mean(coefficients)
    grads = jax.jit(jax.grad(lambda p: jnp.dot(centered, log_psi(p, x)) / EXAMPLES))(params)
    metric = ng.empirical_fisher(log_psi, centered=True)
    ours = jax.jit(
        lambda p, x, g: ng.natural_gradient_direction(
            metric, p, x, g, solver=ng.woodbury(), damping=DAMPING
        )
    )
    by_hand = jax.jit(direction_by_hand)
    expected = ravel_pytree(by_hand(params, x, grads))[0]
    found = ravel_pytree(ours(params, x, grads)[0])[0]
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert error < 1e-9, error
    times = _timing.interleaved(
        {
            "woodbury": lambda: ours(params, x, grads),
            "dense rows by hand": lambda: by_hand(params, x, grads),
            "gradient": lambda: score(params),
        },
        rounds=5,
    )
    title = f"direction, MLP {width}-{width}, P = {expected.size}, N = 1024 (budget {budget} x)"
    _timing.print_ratios(title, times, "woodbury")


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    measure_gram()
    measure_direction(307, 30)
    measure_direction(91, 7)


if __name__ == "__main__":
    main()

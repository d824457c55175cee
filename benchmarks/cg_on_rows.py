"""One conjugate gradient iteration on the factored rows of a sampled Fisher, over one gradient.

    R^T (R v) and the vector updates, autoencoder of 2.84 M parameters, batch 512       budget 1.0

The rows are made once, then the iterations run in one jit. What making them costs is taken out by
timing 2 and 22 iterations: a twentieth of the difference is one iteration. Both are checked against
the solver `cg`, which works on the linearised model.
"""

import functools
from typing import Any

import _timing
import jax
import jax.numpy as jnp

import natgrad_jax as ng
from natgrad_jax.curvature import curvature

SHORT, LONG = 2, 22
DAMPING = 10.0
Tree = Any


def vdot(a: Tree, b: Tree) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def add_scaled(x: Tree, alpha: jax.Array, y: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x + alpha * y, x, y)


def conjugate_gradients(metric, iterations, params, images, grads, key):
    """(R^T R + damping I)^-1 grads, that many iterations from zero."""
    rows = curvature(metric, params, images, key).jacobian()

    def step(_, carry):
        x, r, p, rho = carry
        ap = add_scaled(rows.transposed_product(rows.product(p)), DAMPING, p)
        alpha = rho / vdot(p, ap)
        r = add_scaled(r, -alpha, ap)
        new = vdot(r, r)
        return add_scaled(x, alpha, p), r, add_scaled(r, new / rho, p), new

    zeros = jax.tree.map(jnp.zeros_like, grads)
    start = zeros, grads, grads, vdot(grads, grads)
    return jax.lax.fori_loop(0, iterations, step, start)[0]


def main() -> None:
    params, images, model = _timing.autoencoder()
    likelihood = ng.Bernoulli()
    loss = lambda p, x: -jnp.mean(likelihood.log_prob(model(p, x), x))
    metric, key = ng.sampled_fisher(model, likelihood), jax.random.key(2)
    gradient = jax.jit(jax.grad(loss))
    grads = gradient(params, images)
    short, long = (
        jax.jit(functools.partial(conjugate_gradients, metric, count)) for count in (SHORT, LONG)
    )
    for count, own in ((SHORT, short), (LONG, long)):
        solver = ng.cg(max_iterations=count, tol=1e-30, warm_start=False)
        expected, _ = ng.natural_gradient_direction(
            metric, params, images, grads, solver=solver, damping=DAMPING, key=key
        )
        difference = add_scaled(own(params, images, grads, key), -1.0, expected)
        error = jnp.sqrt(vdot(difference, difference) / vdot(expected, expected))
        assert error < 1e-3, (count, error)
    times = _timing.interleaved(
        {
            "gradient": lambda: gradient(params, images),
            f"rows and {SHORT} iterations": lambda: short(params, images, grads, key),
            f"rows and {LONG} iterations": lambda: long(params, images, grads, key),
        },
        rounds=9,
    )
    first, last = (times[f"rows and {count} iterations"] for count in (SHORT, LONG))
    times["one iteration"] = (last - first) / (LONG - SHORT)
    _timing.print_ratios("CG on factored rows, batch 512 (budget 1.0)", times, "gradient")


if __name__ == "__main__":
    main()

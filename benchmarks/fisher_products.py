"""Cost of a Fisher-vector product and of a CG iteration over a gradient, on the deep autoencoder.

Budgets: product <= 1.7, CG iteration <= 1.4 (model linearised once, exact Fisher).
"""

import _timing
import jax
import jax.numpy as jnp

import natgrad_jax as ng

ITERATIONS = 10


def main() -> None:
    params, images, model = _timing.autoencoder()
    likelihood = ng.Bernoulli()
    loss = lambda p, x: -jnp.mean(likelihood.log_prob(model(p, x), x))
    metric = ng.exact_fisher(model, likelihood)
    gradient = jax.jit(jax.grad(loss))
    grads = gradient(params, images)

    product = jax.jit(lambda p, x, v: ng.fisher_vector_product(metric, p, x, v))
    pushed = lambda p: jax.jvp(lambda q: model(q, images), (p,), (grads,))[1]
    form = jnp.vdot(
        pushed(params), likelihood.fisher_product(model(params, images), pushed(params))
    )
    inner = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, product(params, images, grads))))
    assert jnp.allclose(inner, form / images.shape[0], rtol=1e-4), (inner, form / images.shape[0])

    def direction(iterations: int):
        solver = ng.cg(max_iterations=iterations, tol=1e-30, warm_start=False)
        return jax.jit(
            lambda p, x, g: ng.natural_gradient_direction(
                metric, p, x, g, solver=solver, damping=1e-2
            )
        )

    short, long = direction(1), direction(1 + ITERATIONS)
    assert int(long(params, images, grads)[1].iterations) == 1 + ITERATIONS
    times = _timing.interleaved(
        {
            "gradient": lambda: gradient(params, images),
            "Fisher-vector product": lambda: product(params, images, grads),
            "direction, 1 CG iteration": lambda: short(params, images, grads),
            f"direction, {1 + ITERATIONS} CG iterations": lambda: long(params, images, grads),
        }
    )
    times["CG iteration"] = (
        times[f"direction, {1 + ITERATIONS} CG iterations"] - times["direction, 1 CG iteration"]
    ) / ITERATIONS
    _timing.print_ratios("autoencoder, 2.84 M parameters, batch 512, float32", times, "gradient")


if __name__ == "__main__":
    main()

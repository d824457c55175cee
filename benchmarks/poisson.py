"""The Poisson equation on the unit square: accuracy over ten seeds, and the price of a direction.

-Laplace u = f with solution sin(pi x) sin(pi y), a net 2-32-1 with tanh in float64, 784 interior
and 116 boundary points, Gauss-Newton metric with damping 1e-7, step lengths from a grid. The
reference is the same direction written by hand: rows by vmap(grad), J J^T, Cholesky, J^T.
"""

import functools
import sys

import _timing
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

jax.config.update("jax_enable_x64", True)

DAMPING = 1e-7
TARGET = 1e-5
LENGTHS = 0.5 ** jnp.arange(31)


def solution(x):
    return jnp.prod(jnp.sin(jnp.pi * x), -1)


def source(x):
    return 2 * jnp.pi**2 * solution(x)


def grid(size):
    axis = (jnp.arange(size) + 0.5) / size
    return jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def frame(size):
    """4 x size points on the boundary, the four corners among them once."""
    along, zero = jnp.arange(size) / size, jnp.zeros(size)
    sides = [(along, zero), (zero + 1, along), (1 - along, zero + 1), (zero, 1 - along)]
    return jnp.concatenate([jnp.stack(side, -1) for side in sides])


BATCH = {"interior": grid(28), "boundary": frame(29)}
TEST = grid(50)


def net(params, x):
    hidden, output = params
    return (jnp.tanh(x @ hidden["w"] + hidden["b"]) @ output["w"] + output["b"])[..., 0]


def laplacian_at(params, x):
    """At one point: the trace of the Hessian matrix."""
    return jnp.trace(jax.hessian(net, argnums=1)(params, x))


def laplacian_points(params, x):
    return jax.vmap(laplacian_at, (None, 0))(params, x)


def laplacian_whole(params, x):
    """At all points at once: one second directional derivative for each coordinate."""

    def second(direction):
        v = jnp.broadcast_to(direction, x.shape)
        slope = lambda y: jax.jvp(functools.partial(net, params), (y,), (v,))[1]
        return jax.jvp(slope, (x,), (v,))[1]

    return sum(second(direction) for direction in jnp.eye(2))


def problem(laplacian):
    def residual(params, batch):
        inside, edge = batch["interior"], batch["boundary"]
        return {"pde": laplacian(params, inside) + source(inside), "bc": net(params, edge)}

    def loss(params, batch):
        return sum(jnp.mean(r**2) / 2 for r in jax.tree.leaves(residual(params, batch)))

    return loss, ng.gauss_newton(residual)


def ours(loss, metric, params, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    direction, info = ng.natural_gradient_direction(
        metric, params, batch, grads, solver=ng.woodbury(), damping=DAMPING
    )
    return value, direction, info


def by_hand(params, batch):
    theta, unravel = ravel_pytree(params)
    inside = lambda t, x: laplacian_at(unravel(t), x) + source(x)
    edge = lambda t, x: net(unravel(t), x)
    residuals, rows = [], []
    for function, points in [(inside, batch["interior"]), (edge, batch["boundary"])]:
        scale = 1 / jnp.sqrt(len(points))
        r, j = jax.vmap(jax.value_and_grad(function), (None, 0))(theta, points)
        residuals.append(r * scale)
        rows.append(j * scale)
    r, j = jnp.concatenate(residuals), jnp.concatenate(rows)
    factor = jax.scipy.linalg.cho_factor(j @ j.T + DAMPING * jnp.eye(len(r)), lower=True)
    return r @ r / 2, unravel(j.T @ jax.scipy.linalg.cho_solve(factor, r))


def error(params):
    wanted = solution(TEST)
    return jnp.linalg.norm(net(params, TEST) - wanted) / jnp.linalg.norm(wanted)


def main() -> None:
    quick = "--quick" in sys.argv
    loss, metric = problem(laplacian_points)
    _, metric_whole = problem(laplacian_whole)
    start = lambda seed: _timing.mlp((2, 32, 1), jax.random.key(seed), jnp.float64)

    @jax.jit
    def iterate(params, batch):
        value, direction, _ = ours(loss, metric, params, batch)
        moved = lambda length: jax.tree.map(lambda p, d: p - length * d, params, direction)
        values = jax.vmap(lambda length: loss(moved(length), batch))(LENGTHS)
        best = jnp.nanargmin(values)
        length = jnp.where(values[best] < value, LENGTHS[best], 0.0)
        params = moved(length)
        return params, error(params)

    reached = []
    for seed in range(2 if quick else 10):
        params, errors = start(seed), []
        for _ in range(200):
            params, now = iterate(params, BATCH)
            errors.append(float(now))
            if now <= TARGET:
                break
        reached.append(errors[-1] <= TARGET)
        print(f"  seed {seed}: relative L2 error {errors[-1]:.1e} after {len(errors)} iterations")
    print(f"{sum(reached)} of {len(reached)} seeds reach {TARGET:.0e} within 200 iterations")

    # The same without a line search: damping follows the ratio of actual to predicted decrease.
    inner = ng.natural_gradient(1.0, metric, solver=ng.cholesky())
    tx = ng.levenberg_marquardt(inner, metric, geodesic_acceleration=True)

    @jax.jit
    def damped(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=value, value_fn=loss)
        params = optax.apply_updates(params, updates)
        return params, state, error(params)

    counts = []
    for seed in range(2 if quick else 10):
        here = start(seed)
        state, now, count = tx.init(here), 1.0, 0
        while now > TARGET and count < 600:
            here, state, now = damped(here, state, BATCH)
            count += 1
        counts.append(count if now <= TARGET else None)
    print(f"levenberg_marquardt with geodesic acceleration: iterations to {TARGET:.0e}: {counts}")

    hand = jax.jit(by_hand)
    steps = {
        "Laplacian point by point": jax.jit(functools.partial(ours, loss, metric)),
        "Laplacian of all points at once": jax.jit(functools.partial(ours, loss, metric_whole)),
    }
    for name, here in [("at the start", start(0)), ("after training", params)]:
        wanted, _ = ravel_pytree(hand(here, BATCH)[1])
        for step in steps.values():
            value, got, info = step(here, BATCH)
            off = np.linalg.norm(ravel_pytree(got)[0] - wanted) / np.linalg.norm(wanted)
            residual = float(info.relative_residual)
            print(f"  {name}: directions differ by {off:.1e}, residual of ours {residual:.1e}")
            assert off < 1e-3, "the two directions disagree"
            assert np.isclose(value, hand(here, BATCH)[0])

    params = start(0)
    functions = {"by hand": lambda: hand(params, BATCH)}
    for name, step in steps.items():
        functions[name] = lambda step=step: step(params, BATCH)
    times = _timing.interleaved(functions, rounds=11 if quick else 51, seconds=60)
    _timing.print_ratios("direction, P = 129, M = 900, float64, woodbury", times, "by hand")


if __name__ == "__main__":
    main()

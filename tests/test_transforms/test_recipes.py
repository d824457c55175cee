"""The chains that the README shows: line searches of optax, SPRING with bounded steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

RNG = np.random.default_rng(12)
TIMES = np.linspace(0, 1, 10)
DATA = np.exp(-3 * TIMES) + 0.5 * np.exp(-0.4 * TIMES)
START = np.array([0.3, 2.0, 8.0, -1.0])


def residual(p, batch):
    times, data = batch
    return p[0] * jnp.exp(-p[2] * times) + p[1] * jnp.exp(-p[3] * times) - data


def loss(params, batch):
    return 0.5 * jnp.mean(residual(params, batch) ** 2)


METRIC = ng.gauss_newton(residual)
BATCH = TIMES, DATA


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses(tx, steps):
    def step(carry, _):
        params, state = carry
        value, g = jax.value_and_grad(loss)(params, BATCH)
        updates, state = tx.update(
            g, state, params, batch=BATCH, value=value, grad=g, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.lax.scan(step, (START, tx.init(jnp.asarray(START))), length=steps)
    return values


SEARCHES = {
    "backtracking": optax.scale_by_backtracking_linesearch(40),
    "zoom": optax.scale_by_zoom_linesearch(20),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_line_search_of_optax_follows_the_natural_gradient(name):
    tx = optax.chain(ng.natural_gradient(1.0, METRIC, damping=1e-6), SEARCHES[name])
    values = losses(tx, 60)
    assert np.all(np.diff(values) <= 1e-12) and values[-1] < 1e-8 * values[0]
    # The control: the full step alone makes the loss larger.
    alone = losses(optax.with_extra_args_support(ng.natural_gradient(1.0, METRIC, damping=1e-6)), 2)
    assert not alone[1] <= alone[0]


BOUND = 0.05


@pytest.mark.parametrize("corrected", [False, True])
def test_spring_with_its_norm_constraint(corrected):
    """phi_k = mu phi_{k-1} + (F + lambda I)^-1 (g - mu F phi_{k-1}); bounded.

    Its start corrected: phi_k / sqrt(1 - mu^2k).
    """
    rate, damping, momentum = 0.5, 1e-3, 0.9
    start = optax.scale_by_schedule(lambda k: (1 - momentum ** (2 * (k + 1))) ** -0.5)
    tx = optax.chain(
        ng.scale_by_natural_gradient(METRIC, damping=damping, momentum=momentum),
        start if corrected else optax.identity(),
        optax.scale(-rate),
        optax.clip_by_global_norm(BOUND),
    )
    params, phi, state = jnp.asarray(START), np.zeros(4), tx.init(jnp.asarray(START))
    lengths = []
    for k in range(1, 7):
        g = jax.grad(loss)(params, BATCH)
        updates, state = tx.update(g, state, params, batch=BATCH)
        jacobian = np.asarray(jax.jacobian(residual)(params, BATCH))
        fisher = jacobian.T @ jacobian / len(TIMES)
        rhs = g - momentum * fisher @ phi
        phi = momentum * phi + np.linalg.solve(fisher + damping * np.eye(4), rhs)
        expected = -rate * phi * (1 - momentum ** (2 * k)) ** (-0.5 if corrected else 0)
        expected *= min(1, BOUND / np.linalg.norm(expected))
        np.testing.assert_allclose(updates, expected, rtol=1e-7)
        params = optax.apply_updates(params, updates)
        lengths.append(np.linalg.norm(updates))
    assert max(lengths) <= BOUND * (1 + 1e-12)
    assert rate * np.linalg.norm(phi) > BOUND  # the bound was at work

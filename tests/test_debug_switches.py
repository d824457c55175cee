"""JAX's switches for finding mistakes change no number, and find none here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

SWITCHES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": lambda: jax.disable_jit(),
    "checking_leaks": lambda: jax.checking_leaks(),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
SOLVERS = {
    "automatic": lambda batch: None,
    "cholesky": lambda batch: ng.cholesky(),
    "woodbury": lambda batch: ng.woodbury(),
    "cg": lambda batch: ng.cg(),
    "qr": lambda batch: ng.qr(),
    "spectral": lambda batch: ng.spectral(),
    "diagonal": lambda batch: ng.diagonal(),
    "block_diagonal": lambda batch: ng.block_diagonal(),
    "kfac": ng.kfac,
    "ekfac": ng.ekfac,
}


def model(params, batch):
    z = batch @ params["w"]
    return jnp.tanh(z + jnp.broadcast_to(params["b"], z.shape)) @ params["v"]


def arguments():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return (
        {"b": draw(3), "v": draw(3, 2), "w": draw(4, 3)},
        draw(6, 4),
        {
            "b": draw(3),
            "v": draw(3, 2),
            "w": draw(4, 3),
        },
    )


def one_step(solver, damping):
    """The updates of one step, by a model of its own: nothing of it has been traced."""
    params, batch, grads = arguments()
    metric = ng.gauss_newton(lambda p, b: model(p, b))
    made = SOLVERS[solver](batch)
    tx = ng.natural_gradient(0.5, metric, solver=made, damping=damping, max_kl=0.1)
    updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
    return jax.tree.map(np.asarray, updates)


without_switch = functools.cache(one_step)


def assert_same(found, expected, rtol):
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol, rtol * scale, err_msg=name)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_one_step_is_the_same_under_every_switch(switch, solver):
    expected = without_switch(solver, 0.1)
    with SWITCHES[switch]():
        found = one_step(solver, 0.1)
    assert_same(found, expected, 2e-5)


@pytest.mark.parametrize("solver", ["automatic", "cholesky", "qr", "woodbury", "cg", "spectral"])
@pytest.mark.parametrize("switch", ["debug_nans", "debug_infs"])
def test_the_pseudo_inverse_divides_by_no_zero(switch, solver):
    """Damping 0, and fewer rows than parameters."""
    expected = without_switch(solver, 0.0)
    with SWITCHES[switch]():
        found = one_step(solver, 0.0)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("switch", ["debug_nans", "debug_infs", "checking_leaks"])
def test_step_control_is_the_same_under_a_switch(switch):
    def one():
        params, batch, _ = arguments()
        loss = lambda p, b: 0.5 * jnp.mean(jnp.sum(model(p, b) ** 2, axis=-1))
        metric = ng.gauss_newton(lambda p, b: model(p, b))
        tx = ng.adaptive_natural_gradient(metric, solver=ng.kfac(batch))
        grads = jax.grad(loss)(params, batch)
        return tx.update(grads, tx.init(params), params, batch=batch, value_fn=loss)[0]

    expected = one()
    with SWITCHES[switch]():
        found = one()
    assert_same(found, expected, 2e-5)

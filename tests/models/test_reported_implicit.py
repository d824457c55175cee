"""Models without a forward mode whose backward pass cannot be transposed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import exact
from tests.models import implicit
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
kinds = pytest.mark.parametrize("model", implicit.KINDS, ids=lambda f: f.__name__)


def loss_of(model):
    return lambda p, x: 0.5 * jnp.mean(jnp.sum(model(p, x) ** 2, axis=-1))


def at(model):
    """Parameters, batch, gradient and the Gauss-Newton matrix."""
    params, batch = implicit.arguments()
    grads = oracle.compiled(jax.grad(loss_of(model)), params, batch)
    return params, batch, grads, exact.fisher_of(model, params, batch)


def assert_close(model, actual, expected, name):
    exact.assert_close(actual, expected, name, implicit.RTOL.get(model, 1e-8))


def heard(function, *args):
    """The result, and the warnings about the forward mode."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(w.message) for w in caught if "forward mode" in str(w.message)]


@pytest.mark.smoke
@pytest.mark.parametrize("model", implicit.MODELS, ids=lambda f: f.__name__)
def test_the_rows_are_those_of_reverse_mode(model):
    rtol = implicit.RTOL.get(model, 1e-8)
    exact.assert_exact(model, *implicit.arguments(), mode=None, rtol=rtol)


@kinds
def test_approximations_are_those_of_the_dense_matrix(model):
    params, batch, grads, fisher = at(model)
    solvers = {
        "spectral": ng.spectral(),
        "diagonal": ng.diagonal(),
        "block_diagonal": ng.block_diagonal(),
        "kfac": ng.kfac(batch),
        "ekfac": ng.ekfac(batch),
    }
    found, _ = exact.found_by(ng.gauss_newton(model), params, batch, grads, solvers)
    assert_close(model, found["spectral"], exact.solved(fisher, grads), "spectral")
    diagonal = exact.solved(np.diag(np.diag(fisher)), grads)
    assert_close(model, found["diagonal"], diagonal, "diagonal")
    blocks = exact.solved(exact.blocks_only(fisher, params), grads)
    assert_close(model, found["block_diagonal"], blocks, "block_diagonal")
    for name in ("kfac", "ekfac"):
        d, g = oracle.flat(found[name]), oracle.flat(grads)
        assert np.all(np.isfinite(d)), name
        assert 0 < d @ g <= g @ g / exact.DAMPING * (1 + 1e-9), name


@kinds
def test_lengths_and_limits_of_the_divergence_are_exact(model):
    params, batch, grads, fisher = at(model)
    metric, g = ng.gauss_newton(model), oracle.flat(grads)
    tx = ng.natural_gradient(1.0, metric, damping=exact.DAMPING, max_kl=1e-3)

    def everything(params, batch, grads):
        form = ng.fisher_quadratic_form(metric, params, batch, grads)
        return form, tx.update(grads, tx.init(params), params, batch=batch)[0]

    (form, step), _ = oracle.quietly(oracle.compiled, everything, params, batch, grads)
    assert_close(model, form, g @ fisher @ g, "quadratic form")
    d = exact.solved(fisher, grads)
    length = min(1.0, (2e-3 / (d @ fisher @ d)) ** 0.5)
    assert length < 1
    assert_close(model, step, -length * d, "step")


@kinds
def test_step_control_is_exact(model):
    params, batch, grads, fisher = at(model)
    metric, loss = ng.gauss_newton(model), loss_of(model)
    inner = ng.natural_gradient(1.0, metric)
    lm = ng.levenberg_marquardt(inner, metric, initial_damping=exact.DAMPING, reject=False)
    quadratic = ng.scale_by_quadratic_model(metric)

    def everything(params, batch, grads):
        more = {"batch": batch, "value_fn": loss}
        damped, _ = lm.update(grads, lm.init(params), params, **more)
        rated, _ = quadratic.update(
            grads, quadratic.init(params), params, batch=batch, grad=grads, damping=0.0
        )
        return damped, rated

    (damped, rated), _ = oracle.quietly(oracle.compiled, everything, params, batch, grads)
    g = oracle.flat(grads)
    assert_close(model, damped, -exact.solved(fisher, grads), "levenberg_marquardt")
    assert_close(model, rated, g * (g @ g) / (g @ fisher @ g), "scale_by_quadratic_model")


@kinds
def test_adaptive_steps_with_kfac_make_the_loss_smaller(model):
    params, batch = implicit.arguments()
    loss = loss_of(model)
    tx = ng.adaptive_natural_gradient(ng.gauss_newton(model), solver=ng.kfac(batch))

    def step(params, batch):
        grads = jax.grad(loss)(params, batch)
        updates, _ = tx.update(grads, tx.init(params), params, batch=batch, value_fn=loss)
        moved = jax.tree.map(jnp.add, params, updates)
        return loss(params, batch), loss(moved, batch)

    (before, after), _ = oracle.quietly(oracle.compiled, step, params, batch)
    assert after < before


@kinds
@pytest.mark.parametrize("solver", [None, ng.cg(), ng.woodbury(), ng.cholesky()])
def test_products_come_with_one_warning_and_rows_with_none(model, solver):
    params, batch = implicit.arguments()
    metric = ng.gauss_newton(model)
    if solver is None:
        call = ng.fisher_vector_product
    else:
        call = lambda *args: exact.direction(*args, solver)
    _, said = heard(call, metric, params, batch, params)
    products = solver is None or solver.name == "cg"
    assert len(said) == products, said


def test_a_model_with_a_forward_mode_hears_nothing():
    """The control: activations with a `custom_jvp`."""
    params, batch = implicit.arguments()
    model = lambda p, x: jax.nn.relu(x @ p["u"]) @ p["v"] + jax.nn.silu(x @ p["u"]) @ p["w"][:, :2]
    _, said = heard(ng.fisher_vector_product, ng.gauss_newton(model), params, batch, params)
    assert not said

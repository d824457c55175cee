"""Batches of a size that a model insists on, weights of rows, groups of residuals, wrong claims."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import exact
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")


class WrongSizeError(Exception):
    """What a model of the user may raise."""


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def multiple_of_four(p, x):
    assert x.shape[0] % 4 == 0
    return network(p, x)


def this_size_alone(size):
    def model(p, x):
        assert x.shape == (size, 3), f"expected {size} examples, got {x.shape}"
        return network(p, x)

    return model


def own_exception(size):
    def model(p, x):
        if x.shape[0] % size:
            raise WrongSizeError(x.shape)
        return network(p, x)

    return model


def windows(p, x):
    """Folded, as einops does: no batch of another size divides."""
    return network(p, x.reshape(4, -1, 3)).reshape(-1, 2)


def arguments(size):
    p = exact.normals(0, w=(3, 4), b=4, v=(4, 2))
    return p, exact.normals(1, x=(size, 3))["x"]


INSISTING = {
    "multiple of four": lambda size: multiple_of_four,
    "this size alone": this_size_alone,
    "own exception": own_exception,
    "own exception for all but quarters": lambda size: own_exception(size // 4),
    "folded": lambda size: windows,
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", INSISTING)
def test_a_model_that_insists_on_its_batch_size_keeps_its_numbers(name):
    exact.assert_exact(INSISTING[name](12), *arguments(12), mode=None)


def adaptive_step(model, solver, params, batch, **more):
    """The updates of one step, and the loss before and after."""
    loss = lambda p, x: 0.5 * jnp.mean(jnp.sum((model(p, x) - 1) ** 2, axis=-1))
    tx = ng.adaptive_natural_gradient(ng.gauss_newton(model), solver=solver, **more)

    def step(params, batch):
        grads = jax.grad(loss)(params, batch)
        updates, _ = tx.update(grads, tx.init(params), params, batch=batch, value_fn=loss)
        moved = jax.tree.map(jnp.add, params, updates)
        return updates, loss(params, batch), loss(moved, batch)

    return oracle.quietly(oracle.compiled, step, params, batch)[0]


@functools.cache
def plain_steps(make):
    """The updates of the model that insists on nothing, from 256 examples and from all."""
    params, batch = arguments(300)
    step = lambda **more: adaptive_step(network, make(batch), params, batch, **more)
    return [oracle.flat(step()[0]), oracle.flat(step(model_examples=300)[0])]


@pytest.mark.parametrize("name", INSISTING)
@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac], ids=["kfac", "ekfac"])
def test_adaptive_steps_of_a_model_that_insists_on_its_batch_size(name, make):
    """The quadratic model takes 256 examples where the model takes these, and all elsewhere."""
    params, batch = arguments(300)
    updates, before, after = adaptive_step(INSISTING[name](300), make(batch), params, batch)
    assert after < before
    assert any(np.allclose(oracle.flat(updates), u, rtol=1e-6) for u in plain_steps(make))


def with_groups(residual, params, batch):
    """F and the directions of K-FAC and EKFAC."""
    metric = ng.gauss_newton(residual)
    solvers = {"kfac": ng.kfac(batch), "ekfac": ng.ekfac(batch)}
    grads = oracle.draw_like(params, 1)
    found, _ = exact.found_by(metric, params, batch, grads, solvers)
    return found, grads, exact.fisher_of(residual, params, batch)


def one_column(p, b):
    return {"a": b["a"] @ p["w"] ** 2, "b": b["b"] @ p["w"]}


def one_row(p, b):
    w = p["w"].reshape(1, 3)
    return {"a": jnp.sin(w) * b["a"], "b": b["b"][:, :1] @ w}


def dense_in_the_second(p, b):
    return {"a": b["a"] @ p["w"], "b": jnp.exp(b["b"] @ p["w"] ** 3)}


GROUPS = [one_column, one_row, dense_in_the_second]


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [3, (3, 1)], ids=str)
@pytest.mark.parametrize("residual", GROUPS, ids=lambda f: f.__name__)
def test_a_leaf_dense_in_one_group_and_linear_in_another(residual, shape):
    params, batch = exact.normals(0, w=shape), exact.normals(1, a=(4, 3), b=(5, 3))
    found, grads, fisher = with_groups(residual, params, batch)
    exact.assert_close(found["fisher"], fisher, "fisher")
    for name in ("kfac", "ekfac"):
        d, g = oracle.flat(found[name]), oracle.flat(grads)
        assert np.all(np.isfinite(d)) and d @ g > 0, name


@pytest.mark.parametrize("residual", GROUPS, ids=lambda f: f.__name__)
def test_the_block_of_a_leaf_in_two_groups_of_one_example_is_exact(residual):
    """Plain rows are a block of their own, without approximation.

    The second group holds another example, of zeros: groups of one size would be one group.
    """
    params, batch = exact.normals(0, w=3), exact.normals(1, a=(1, 3), b=(2, 3))
    batch["b"][1] = 0
    found, grads, fisher = with_groups(residual, params, batch)
    for name in ("kfac", "ekfac"):
        exact.assert_close(found[name], exact.solved(fisher, grads), name)


def poisson(p, batch):
    """A net of one column, with a boundary term."""
    u = lambda x: network(p, x)[..., 0]
    laplacian = jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(batch["inside"])
    return {"inside": laplacian + 1, "boundary": u(batch["boundary"])}


def test_a_net_of_one_column_with_a_boundary_term():
    params = exact.normals(0, w=(2, 4), b=4, v=(4, 1))
    batch = exact.normals(1, inside=(6, 2), boundary=(4, 2))
    found, grads, fisher = with_groups(poisson, params, batch)
    for name in ("kfac", "ekfac"):
        d, g = oracle.flat(found[name]), oracle.flat(grads)
        assert np.all(np.isfinite(d)) and d @ g > 0, name
    exact.assert_exact(poisson, params, batch, fisher=fisher)


def centred(p, x):
    h = network(p, x)
    return h - h.mean(0)


def mixed_by_attention(p, x):
    h = network(p, x)
    return jax.nn.softmax(h @ h.T) @ h


@pytest.mark.parametrize("model", [centred, mixed_by_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("solver", [None, ng.cholesky(), ng.woodbury(), ng.cg()])
def test_a_wrong_claim_of_independence_is_noticed(model, solver):
    params, x = arguments(5)
    metric = ng.gauss_newton(model, independent=True)
    with pytest.warns(UserWarning, match="independent"):
        exact.direction(metric, params, x, params, solver)


@pytest.mark.parametrize("solver", [None, ng.cholesky(), ng.woodbury(), ng.cg()])
def test_a_true_claim_of_independence_is_not_questioned(solver):
    """The control: pytest turns any warning into an error."""
    params, x = arguments(5)
    metric = ng.gauss_newton(network, independent=True)
    exact.direction(metric, params, x, params, solver)


@pytest.mark.parametrize("solver", [ng.cholesky(), ng.woodbury(), ng.cg(), ng.spectral()])
def test_a_gradient_that_f_does_not_see_is_outside_of_its_rows(solver):
    params, x = arguments(5)
    metric = ng.gauss_newton(lambda p, x: 0 * network(p, x) + x[:, :2])
    d, info = ng.natural_gradient_direction(
        metric, params, x, params, solver=solver, damping=exact.DAMPING
    )
    np.testing.assert_allclose(oracle.flat(d), oracle.flat(params) / exact.DAMPING, rtol=1e-6)
    np.testing.assert_allclose(info.outside_row_space, 1, rtol=1e-4)


@pytest.mark.parametrize("solver", [ng.cholesky(), ng.woodbury(), ng.cg(tol=1e-12)])
def test_the_share_of_the_direction_outside_of_the_rows_is_told(solver):
    params, x = arguments(2)
    metric, grads = ng.gauss_newton(network), oracle.draw_like(params, 3)
    d, info = ng.natural_gradient_direction(
        metric, params, x, grads, solver=solver, damping=exact.DAMPING
    )
    values, vectors = np.linalg.eigh(exact.fisher_of(network, params, x))
    outside = vectors[:, values < 1e-10 * values.max()].T @ oracle.flat(d)
    share = np.linalg.norm(outside) / np.linalg.norm(oracle.flat(d))
    assert 0.1 < share < 1
    np.testing.assert_allclose(info.outside_row_space, share, rtol=1e-3)


def weighted_direction(make, x, weights, batch_axes, params):
    batch = {"x": x, "weights": weights}
    metric = ng.exact_fisher(
        lambda p, b: network(p, b["x"]),
        ng.Categorical(),
        batch_axes=batch_axes,
        weights=lambda b: b["weights"],
    )
    call = lambda params, batch: exact.direction(metric, params, batch, params, make(batch))
    return oracle.flat(oracle.quietly(oracle.compiled, call, params, batch)[0])


block_solvers = pytest.mark.parametrize("make", [ng.kfac, ng.ekfac], ids=["kfac", "ekfac"])


@pytest.mark.smoke
@block_solvers
@pytest.mark.parametrize("size", [1.0, 10.0])
@pytest.mark.parametrize("batch_axes", [None, 0])
def test_a_row_of_weight_zero_is_padding(make, size, batch_axes):
    params, x = arguments(6)
    x[-1] *= size
    weights = np.array([1.0, 1, 1, 1, 1, 0])
    padded = weighted_direction(make, x, weights, batch_axes, params)
    without = weighted_direction(make, x[:-1], weights[:-1], batch_axes, params)
    np.testing.assert_allclose(padded, without, rtol=1e-8)


@block_solvers
def test_rows_are_weighted_whether_or_not_they_are_examples(make):
    params, x = arguments(6)
    weights = np.random.default_rng(5).uniform(0.1, 2, size=6)
    in_one_piece = weighted_direction(make, x, weights, None, params)
    by_examples = weighted_direction(make, x, weights, 0, params)
    np.testing.assert_allclose(in_one_piece, by_examples, rtol=1e-8)
    unweighted = weighted_direction(make, x, np.ones(6), None, params)
    assert not np.allclose(in_one_piece, unweighted, rtol=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        lambda p, x: jax.lax.map(lambda x: network(p, x), x),
        lambda p, x: jax.checkpoint(network)(p, x),
        lambda p, x: jax.nn.relu(network(p, x)),
        centred,
    ],
    ids=["map", "checkpoint", "custom_jvp", "mixing"],
)
def test_no_tracer_leaks_from_a_model_with_a_body_of_its_own(model):
    params, x = arguments(5)
    jax.clear_caches()
    with jax.checking_leaks():
        oracle.quietly(ng.fisher_matrix, ng.gauss_newton(model), params, x)

"""J3 and the whole-batch map: models whose examples mix, or depend on their place or number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
RNG = np.random.default_rng(0)
P = {"w": RNG.normal(size=(4, 3)), "g": RNG.normal(size=3)}
X = RNG.normal(size=(5, 4))


def batch_norm(p, x):
    h = x @ p["w"]
    return p["g"] * (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-2)


def test_j3_products_matrices_and_solves_agree_for_batch_normalisation():
    metric = ng.exact_fisher(batch_norm, ng.Categorical())
    v = oracle.draw_like(P, 1)
    fisher, warned = oracle.quietly(ng.fisher_matrix, metric, P, X)
    assert len(warned) == 1
    assert "reduce_sum" in warned[0] and "exact_fisher" in warned[0]
    product = oracle.flat(ng.fisher_vector_product(metric, P, X, v))
    np.testing.assert_allclose(fisher @ oracle.flat(v), product, rtol=1e-10)
    g = oracle.draw_like(P, 2)
    solve = lambda solver: oracle.flat(
        ng.natural_gradient_direction(metric, P, X, g, solver=solver, damping=0.1)[0]
    )
    expected = np.linalg.solve(fisher + 0.1 * np.eye(15), oracle.flat(g))
    for solver in (ng.woodbury(), ng.cholesky()):
        actual, _ = oracle.quietly(solve, solver)
        np.testing.assert_allclose(actual, expected, rtol=1e-8)


def test_j3_control_rows_taken_one_by_one_are_another_matrix():
    whole, _ = oracle.quietly(ng.fisher_matrix, ng.exact_fisher(batch_norm, ng.Categorical()), P, X)
    claim = ng.exact_fisher(batch_norm, ng.Categorical(), independent=True)
    with pytest.warns(UserWarning, match="independent=True at exact_fisher"):
        vouched = ng.fisher_matrix(claim, P, X)
    assert np.linalg.norm(vouched - whole) > 0.3 * np.linalg.norm(whole)


def opaque_but_independent(p, x):
    """Reversed and back again: each example is by itself, which the reader cannot show."""
    return jnp.tanh(x[::-1] @ p["w"])[::-1] * p["g"]


def test_vouching_gives_the_same_numbers_without_the_price():
    metrics = [ng.gauss_newton(opaque_but_independent, independent=i) for i in (None, True)]
    gram, warned = oracle.quietly(ng.gram_matrix, metrics[0], P, X)
    assert len(warned) == 1
    np.testing.assert_allclose(ng.gram_matrix(metrics[1], P, X), gram, rtol=1e-9, atol=1e-12)
    assert ng.explain(metrics[0], P, X).mode == "whole"
    assert ng.explain(metrics[1], P, X).mode == "vouched"


@pytest.mark.parametrize("size", [1, 5])
def test_a_loss_divided_by_the_size_of_the_batch_keeps_its_size(size):
    def model(p, x):
        y = jax.lax.cond(True, lambda: jnp.tanh(x @ p["w"]), lambda: x[:, :3])
        return y * p["g"] / x.shape[0]

    x = X[:size]
    rows = np.asarray(oracle.gauss_newton_rows(model, P, x))
    np.testing.assert_allclose(ng.gram_matrix(ng.gauss_newton(model), P, x), rows @ rows.T)


def test_labels_in_another_order_than_the_examples_mix():
    model = lambda p, x: (x @ p["w"])[::-1]
    rows = np.asarray(oracle.gauss_newton_rows(model, P, X))
    gram, warned = oracle.quietly(ng.gram_matrix, ng.gauss_newton(model), P, X)
    assert len(warned) == 1
    np.testing.assert_allclose(gram, rows @ rows.T, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("sum", lambda x: x + x.sum(0)),
        ("sort", lambda x: jnp.sort(x, axis=0)),
        ("cumulative", lambda x: jnp.cumsum(x, axis=0)),
        ("attention over the batch", lambda x: jax.nn.softmax(x @ x.T) @ x),
        ("roll", lambda x: jnp.roll(x, 1, axis=0)),
        ("pairs", lambda x: x.reshape(-1, 2, 4).sum(1).repeat(2, axis=0)),
        ("gather", lambda x: x[jnp.array([1, 0, 3, 2])]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_mixes_is_found(name, mix):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)))
    model = lambda p, x: jnp.tanh(mix(x) @ p["w"]) * p["g"]
    rows = np.asarray(oracle.gauss_newton_rows(model, P, x))
    gram, warned = oracle.quietly(ng.gram_matrix, ng.gauss_newton(model), P, x)
    assert len(warned) == 1, name
    np.testing.assert_allclose(gram, rows @ rows.T, atol=1e-12)


def test_vouching_for_a_model_that_one_example_changes_says_so():
    model = lambda p, x: (x @ p["w"]) if x.shape[0] > 1 else (x @ p["w"])[:, :1]
    with pytest.raises(ValueError, match="gauss_newton: on a batch of one example"):
        ng.gram_matrix(ng.gauss_newton(model, independent=True), P, X)

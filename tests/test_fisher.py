"""The pure functions of (metric, params, batch): they agree with definitions and one another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import natgrad_jax as ng

TOL = 1e4 * np.finfo(np.float64).eps
RNG = np.random.default_rng(4)
CATEGORICAL = ng.Categorical()
KEY = jax.random.key(0)

# P = 4 + 6 parameters, five examples, three classes.
PARAMS = {"v": RNG.normal(size=(2, 3)), "w": RNG.normal(size=(2, 2))}
TANGENT = {"v": RNG.normal(size=(2, 3)), "w": RNG.normal(size=(2, 2))}
BATCH = {"x": RNG.normal(size=(5, 2)), "y": np.array([0, 2, 1, 1, 0])}


def model(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]


def log_prob(params, batch):
    return CATEGORICAL.log_prob(model(params, batch), batch["y"])


def loss(params, batch):
    return -jnp.mean(log_prob(params, batch))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def unflat(theta):
    return {"v": theta[:6].reshape(2, 3), "w": theta[6:].reshape(2, 2)}


def derivative(function: Callable[[Any, Any], jax.Array], transform=jax.jacrev) -> np.ndarray:
    theta = flat(PARAMS)
    return np.asarray(jax.jit(transform(lambda t: function(unflat(t), BATCH)))(theta))


def exact() -> np.ndarray:
    z = np.tanh(BATCH["x"] @ PARAMS["w"]) @ PARAMS["v"]
    p = scipy.special.softmax(z, axis=-1)
    jacobian = derivative(model)
    return (
        sum(j.T @ (np.diag(q) - np.outer(q, q)) @ j for j, q in zip(jacobian, p, strict=True)) / 5
    )


def sampled() -> np.ndarray:
    # The samples are those that the public description gives: one key a row, `fold_in(key, row)`.
    def row_scores(key):
        keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n), 2))(jnp.arange(5))
        z = model(PARAMS, BATCH)
        draw = jax.vmap(lambda k, z: jax.random.categorical(k, z[None], axis=-1)[0])
        return jnp.stack([draw(keys[:, s], z) for s in range(2)])

    labels = np.asarray(jax.jit(row_scores)(KEY))
    rows = [derivative(lambda p, b, y=y: CATEGORICAL.log_prob(model(p, b), y)) for y in labels]
    return sum(s.T @ s for s in rows) / 10


def empirical() -> np.ndarray:
    scores = derivative(log_prob)
    return scores.T @ scores / 5


def centered() -> np.ndarray:
    return np.cov(derivative(log_prob).T, ddof=0)


def gauss_newton() -> np.ndarray:
    jacobian = derivative(model).reshape(15, 10)
    return jacobian.T @ jacobian / 5


class Case(NamedTuple):
    metric: ng.Metric
    matrix: Callable[[], np.ndarray]
    rows: int | None


CASES = {
    "exact_fisher": Case(ng.exact_fisher(model, CATEGORICAL), exact, 15),
    "sampled_fisher": Case(ng.sampled_fisher(model, CATEGORICAL, num_samples=2), sampled, 10),
    "empirical_fisher": Case(ng.empirical_fisher(log_prob), empirical, 5),
    "centered": Case(ng.empirical_fisher(log_prob, centered=True), centered, 5),
    "gauss_newton": Case(ng.gauss_newton(model), gauss_newton, 15),
    "hessian": Case(ng.hessian(loss), lambda: derivative(loss, jax.hessian), None),
    "euclidean": Case(ng.euclidean(), lambda: np.eye(10), None),
}


@pytest.mark.smoke
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_every_function_sees_the_same_matrix(name):
    metric, matrix, rows = CASES[name]
    noise = 1.0 if name == "gauss_newton" else None

    @jax.jit
    def everything(params, batch, tangent, key):
        arguments = metric, params, batch
        return {
            "matrix": ng.fisher_matrix(*arguments, key=key),
            "product": ng.fisher_vector_product(*arguments, tangent, key=key),
            "form": ng.fisher_quadratic_form(*arguments, tangent, key=key),
            "diagonal": ng.fisher_diagonal(*arguments, key=key),
            "covariance": ng.asymptotic_covariance(*arguments, 20, noise_variance=noise, key=key),
            "gram": None if rows is None else ng.gram_matrix(*arguments, key=key),
        }

    found, fisher, v = everything(PARAMS, BATCH, TANGENT, KEY), matrix(), flat(TANGENT)
    np.testing.assert_allclose(found["matrix"], fisher, atol=TOL)
    np.testing.assert_allclose(flat(found["product"]), fisher @ v, atol=10 * TOL)
    np.testing.assert_allclose(found["form"], v @ fisher @ v, rtol=TOL)
    np.testing.assert_allclose(flat(found["diagonal"]), np.diag(fisher), atol=TOL)
    inverse = np.linalg.pinv(fisher, rcond=1e-12, hermitian=True)
    np.testing.assert_allclose(
        found["covariance"] * 20, inverse, atol=TOL * np.linalg.norm(inverse) ** 2
    )
    if rows is not None:
        assert found["gram"].shape == (rows, rows)
        spectrum = lambda a: np.linalg.eigvalsh(a)[-min(rows, 10) :]
        np.testing.assert_allclose(spectrum(found["gram"]), spectrum(fisher), atol=TOL)


@pytest.mark.usefixtures("x64")
def test_the_same_key_draws_the_same_samples_also_in_a_solve():
    metric = CASES["sampled_fisher"].metric
    fisher = np.asarray(ng.fisher_matrix(metric, PARAMS, BATCH, key=KEY))
    d, _ = ng.natural_gradient_direction(metric, PARAMS, BATCH, TANGENT, damping=0.1, key=KEY)
    expected = np.linalg.solve(fisher + 0.1 * np.eye(10), flat(TANGENT))
    np.testing.assert_allclose(flat(d), expected, atol=TOL)
    other = ng.fisher_matrix(metric, PARAMS, BATCH, key=jax.random.key(1))
    assert np.abs(other - fisher).max() > 0.01


def test_typed_and_legacy_keys_draw_the_same():
    metric = CASES["sampled_fisher"].metric
    typed = ng.fisher_diagonal(metric, narrow(PARAMS), narrow(BATCH), key=jax.random.key(3))
    legacy = ng.fisher_diagonal(metric, narrow(PARAMS), narrow(BATCH), key=jax.random.PRNGKey(3))
    np.testing.assert_array_equal(flat(typed), flat(legacy))


def narrow(tree, dtype=jnp.float32):
    real = lambda x: np.issubdtype(x.dtype, np.floating)
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype) if real(x) else x, tree)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["exact_fisher", "hessian"])
def test_dtypes_follow_the_convention(name, dtype, x64):
    metric, matrix, _ = CASES[name]
    params, batch, tangent = (narrow(t, dtype) for t in (PARAMS, BATCH, TANGENT))
    work = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    fisher, v = matrix(), flat(TANGENT)
    # The model itself runs in the dtype of its parameters; rounding grows through its two layers.
    tolerance = 30 * float(jnp.finfo(dtype).eps) * np.abs(fisher).max()

    @jax.jit
    def everything(*arguments):
        return (
            ng.fisher_matrix(metric, *arguments[:2]),
            ng.fisher_vector_product(metric, *arguments),
            ng.fisher_diagonal(metric, *arguments[:2]),
            ng.fisher_quadratic_form(metric, *arguments),
        )

    found, product, diagonal, form = everything(params, batch, tangent)
    assert found.dtype == form.dtype == work
    np.testing.assert_allclose(found, fisher, atol=tolerance)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(
        flat(narrow(product, jnp.float64)), fisher @ v, atol=tolerance * np.linalg.norm(v)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(diagonal)} == {work}


def test_leaves_of_different_dtypes():
    params = {"v": narrow(PARAMS["v"], jnp.bfloat16), "w": narrow(PARAMS["w"])}
    mixed = lambda p, b: model({"v": p["v"].astype(jnp.float32), "w": p["w"]}, b)
    metric, batch = ng.exact_fisher(mixed, CATEGORICAL), narrow(BATCH)
    fisher = np.asarray(ng.fisher_matrix(metric, params, batch))
    product = ng.fisher_vector_product(metric, params, batch, params)
    assert product["v"].dtype == jnp.bfloat16
    assert product["w"].dtype == jnp.float32
    # Rows of the narrow leaf come out of its backward pass in its dtype.
    tolerance = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    expected = fisher @ flat(narrow(params))
    np.testing.assert_allclose(
        flat(narrow(product)), expected, atol=tolerance * np.linalg.norm(expected)
    )


@jax.custom_vjp
def squash(x):
    return jnp.tanh(x)


squash.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, cotangent: (cotangent * (1 - y * y),))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", [ng.cg(tol=1e-12), ng.cholesky()], ids=["cg", "cholesky"])
def test_models_without_forward_mode(solver):
    reverse_only = lambda p, b: squash(b["x"] @ p["w"]) @ p["v"]
    metric, plain = ng.exact_fisher(reverse_only, CATEGORICAL), CASES["exact_fisher"].metric
    for function in (ng.fisher_vector_product, ng.fisher_quadratic_form):
        np.testing.assert_allclose(
            flat(function(metric, PARAMS, BATCH, TANGENT)),
            flat(function(plain, PARAMS, BATCH, TANGENT)),
            atol=10 * TOL,
        )
    d, _ = ng.natural_gradient_direction(metric, PARAMS, BATCH, TANGENT, solver=solver, damping=0.1)
    expected = np.linalg.solve(exact() + 0.1 * np.eye(10), flat(TANGENT))
    np.testing.assert_allclose(flat(d), expected, atol=100 * TOL)


@pytest.mark.usefixtures("x64")
def test_an_error_of_the_model_in_forward_mode_is_not_swallowed():
    def broken(params, batch):
        raise TypeError("the model is broken")

    metric = ng.exact_fisher(broken, CATEGORICAL)
    with pytest.raises(TypeError, match="the model is broken"):
        ng.fisher_vector_product(metric, PARAMS, BATCH, TANGENT)


@pytest.mark.usefixtures("x64")
def test_functions_map_over_parameters_and_batches():
    metric = CASES["exact_fisher"].metric
    scales = np.array([0.5, 1.0, 2.0])
    stacked = jax.tree.map(lambda x: np.multiply.outer(scales, x), PARAMS)

    def pair(params, batch):
        direction = ng.natural_gradient_direction(metric, params, batch, TANGENT, damping=0.1)
        return ng.fisher_matrix(metric, params, batch), direction[0]

    matrices, directions = jax.jit(jax.vmap(pair, in_axes=(0, None)))(stacked, BATCH)
    np.testing.assert_allclose(matrices[1], exact(), atol=TOL)
    for i in range(3):
        d = flat(jax.tree.map(lambda leaf, i=i: leaf[i], directions))
        expected = np.linalg.solve(matrices[i] + 0.1 * np.eye(10), flat(TANGENT))
        np.testing.assert_allclose(d, expected, atol=TOL)


@pytest.mark.usefixtures("x64")
def test_the_quadratic_form_is_differentiable():
    metric = CASES["exact_fisher"].metric
    form = lambda t: ng.fisher_quadratic_form(metric, PARAMS, BATCH, t)
    gradient = jax.jit(jax.grad(form))(TANGENT)
    np.testing.assert_allclose(flat(gradient), 2 * exact() @ flat(TANGENT), atol=10 * TOL)


@pytest.mark.parametrize("metric", [ng.euclidean(), ng.exact_fisher(lambda p, b: b, CATEGORICAL)])
def test_empty_trees_give_empty_results(metric):
    batch = jnp.zeros((2, 3))
    assert ng.fisher_matrix(metric, {}, batch).shape == (0, 0)
    assert ng.fisher_vector_product(metric, {}, batch, {}) == {}
    assert ng.fisher_diagonal(metric, {}, batch) == {}
    assert float(ng.fisher_quadratic_form(metric, {}, batch, {})) == 0
    assert ng.natural_gradient_direction(metric, {}, batch, {})[0] == {}


def test_leaves_without_numbers_and_scalars_are_parameters():
    params = {"empty": jnp.zeros((0, 3)), "scalar": jnp.asarray(2.0)}
    metric = ng.gauss_newton(lambda p, x: p["scalar"] * x + jnp.sum(p["empty"]))
    x = jnp.asarray([1.0, 3.0])
    assert ng.fisher_matrix(metric, params, x).tolist() == [[pytest.approx(5)]]
    d, _ = ng.natural_gradient_direction(metric, params, x, params, damping=1.0)
    assert d["empty"].shape == (0, 3)
    assert float(d["scalar"]) == pytest.approx(2 / 6)


@pytest.mark.usefixtures("x64")
def test_score_is_the_gradient_of_each_example():
    scores = ng.score(log_prob, PARAMS, BATCH)
    assert jax.tree.map(lambda s: s.shape, scores) == {"v": (5, 2, 3), "w": (5, 2, 2)}
    stacked = np.concatenate([np.reshape(s, (5, -1)) for s in jax.tree.leaves(scores)], axis=1)
    np.testing.assert_allclose(stacked, derivative(log_prob), atol=TOL)


@pytest.mark.usefixtures("x64")
def test_kl_divergence_is_the_weighted_mean_over_rows():
    moved = jax.tree.map(np.add, PARAMS, TANGENT)
    weights = np.array([1.0, 0.0, 2.0, 0.0, 0.5])

    def kl(p, q):
        logs = [
            scipy.special.log_softmax(np.tanh(BATCH["x"] @ t["w"]) @ t["v"], axis=-1)
            for t in (p, q)
        ]
        return np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)

    mean = ng.kl_divergence(model, CATEGORICAL, PARAMS, moved, BATCH)
    assert float(mean) == pytest.approx(kl(PARAMS, moved).mean(), rel=TOL)
    weighted = ng.kl_divergence(
        model, CATEGORICAL, PARAMS, moved, BATCH, weights=lambda b: jnp.asarray(weights)
    )
    assert float(weighted) == pytest.approx(np.average(kl(PARAMS, moved), weights=weights), rel=TOL)
    assert float(ng.kl_divergence(model, CATEGORICAL, PARAMS, PARAMS, BATCH)) == 0
    assert kl(PARAMS, moved).mean() != pytest.approx(kl(moved, PARAMS).mean(), rel=0.01)


@pytest.mark.usefixtures("x64")
def test_asymptotic_covariance_of_a_known_model():
    x = RNG.normal(size=(30, 3))
    metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal(0.5))
    covariance = ng.asymptotic_covariance(metric, np.zeros(3), x, 30)
    np.testing.assert_allclose(covariance, 0.25 * np.linalg.inv(x.T @ x), rtol=1e-10)

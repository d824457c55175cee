"""Metrics: which rows are averaged, with which weights, along which axes of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

TOL = 1e4 * np.finfo(np.float64).eps
RNG = np.random.default_rng(3)
CATEGORICAL, NORMAL = ng.Categorical(), ng.Normal(0.5)

# A linear classifier, whose Jacobian is known: row n of z = X W has d z_n / d W = x_n (x) I.
W = RNG.normal(size=(2, 3))
X = RNG.normal(size=(5, 2))
TOKENS = RNG.normal(size=(3, 2, 2))
KEY = jax.random.key(0)


def linear(w, x):
    return x @ w


def per_token(w, x):
    return (x @ w).reshape(-1, 3)


def classifier_fisher(x, weights=None) -> np.ndarray:
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights
    p = scipy.special.softmax(x @ W, axis=-1)
    information = [np.diag(q) - np.outer(q, q) for q in p]
    return sum(
        w * np.kron(np.outer(row, row), m)
        for w, row, m in zip(weights, x, information, strict=True)
    )


def close(value: Any, expected: np.ndarray) -> None:
    scale = max(float(np.max(np.abs(expected), initial=0)), 1.0)
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOL * scale)


# Weights.

EXAMPLE_WEIGHTS, TOKEN_WEIGHTS = np.array([0.5, 0.0, 2.0]), RNG.uniform(size=6)


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_weights_make_the_mean_a_weighted_mean(factor):
    weights = factor * np.array([1.0, 2.0, 0.0, 0.5, 3.0])
    metric = ng.exact_fisher(lambda w, b: b[0] @ w, CATEGORICAL, weights=lambda b: b[1])
    fisher = ng.fisher_matrix(metric, W, (X, weights))
    close(fisher, classifier_fisher(X, weights / weights.sum()))


def test_without_weights_the_mean_is_over_rows():
    close(ng.fisher_matrix(ng.exact_fisher(linear, CATEGORICAL), W, X), classifier_fisher(X))


@pytest.mark.parametrize(
    ("given", "of_rows"),
    [(EXAMPLE_WEIGHTS, np.repeat(EXAMPLE_WEIGHTS, 2)), (TOKEN_WEIGHTS, TOKEN_WEIGHTS)],
    ids=["one an example", "one a row"],
)
def test_weights_of_tokens_come_by_example_or_by_row(given, of_rows):
    weights = lambda batch: jnp.asarray(given)
    metric = ng.exact_fisher(per_token, CATEGORICAL, weights=weights)
    expected = classifier_fisher(TOKENS.reshape(6, 2), of_rows / of_rows.sum())
    close(ng.fisher_matrix(metric, W, TOKENS), expected)
    v = RNG.normal(size=(2, 3))
    close(np.ravel(ng.fisher_vector_product(metric, W, TOKENS, v)), expected @ v.ravel())


def masked(make):
    """A metric on (x, labels, mask), whatever `make` is."""
    outputs = lambda w, batch: batch[0] @ w
    if make is ng.empirical_fisher:
        log_prob = lambda w, batch: CATEGORICAL.log_prob(outputs(w, batch), batch[1])
        return make(log_prob, weights=lambda batch: batch[2])
    return make(outputs, CATEGORICAL, weights=lambda batch: batch[2])


@pytest.mark.smoke
@pytest.mark.parametrize(
    "make", [ng.exact_fisher, ng.sampled_fisher, ng.empirical_fisher], ids=lambda f: f.__name__
)
def test_masked_padding_equals_dropping_the_rows(make):
    metric = masked(make)
    labels, ones = np.array([0, 1, 2, 2, 0]), np.ones(5)
    padded = (
        np.concatenate([X, 7 * np.ones((3, 2))]),
        np.concatenate([labels, np.zeros(3, int)]),
        np.concatenate([ones, np.zeros(3)]),
    )
    dropped = ng.fisher_matrix(metric, W, (X, labels, ones), key=KEY)
    # For the sampled metric this also says that the other rows draw what they drew.
    close(ng.fisher_matrix(metric, W, padded, key=KEY), dropped)
    unmasked = (*padded[:2], np.ones(8))
    assert np.abs(ng.fisher_matrix(metric, W, unmasked, key=KEY) - dropped).max() > 0.01


@pytest.mark.parametrize(
    "make", [ng.exact_fisher, ng.sampled_fisher, ng.empirical_fisher], ids=lambda f: f.__name__
)
def test_weights_that_sum_to_zero_mean_a_zero_matrix(make):
    batch = (X, np.zeros(5, int), np.zeros(5))
    np.testing.assert_array_equal(ng.fisher_matrix(masked(make), W, batch, key=KEY), 0)


def test_boolean_and_integer_weights_count_as_numbers():
    mask = np.array([True, False, True, True, False])
    for weights in (mask, mask.astype(np.int32)):
        metric = ng.exact_fisher(linear, CATEGORICAL, weights=lambda _, w=weights: jnp.asarray(w))
        close(ng.fisher_matrix(metric, W, X), classifier_fisher(X[mask]))


# Axes along which the batch holds examples.


@pytest.mark.parametrize(
    ("model", "batch", "axes"),
    [
        (lambda w, x: x.T @ w, X.T, 1),
        (lambda w, x: x.T @ w, X.T, -1),
        (lambda w, x: x[0] @ w, X[None], -2),
        (lambda w, b: (b[0] @ b[1]) @ w, (X, np.eye(2)), (0, None)),
        (
            lambda w, b: b["a"]["x"] @ b["shared"][0] @ w @ b["shared"][1],
            {"a": {"x": X}, "shared": [np.eye(2), np.eye(3)]},
            {"a": 0, "shared": None},
        ),
        (
            lambda w, b: jnp.stack([b["first"], b["second"][0]], axis=-1) @ w,
            {"first": X[:, 0], "second": X[None, :, 1]},
            {"first": 0, "second": 1},
        ),
        (lambda w, b: b["x"] @ w, {"x": X, "nothing": None}, 0),
    ],
    ids=["1", "-1", "-2", "shared leaf", "prefix of a nested tree", "mixed", "None in the batch"],
)
def test_examples_lie_along_the_axes_given(model, batch, axes):
    metric = ng.exact_fisher(model, CATEGORICAL, batch_axes=axes)
    close(ng.fisher_matrix(metric, W, batch), classifier_fisher(X))


def test_batch_axes_serve_every_metric_and_function():
    v = RNG.normal(size=(2, 3))
    model, labels = lambda w, x: x.T @ w, np.array([0, 1, 2, 2, 0])
    log_prob = lambda w, b: CATEGORICAL.log_prob(model(w, b[0]), b[1])
    axes = (1, 0)
    scores = np.asarray(ng.score(log_prob, W, (X.T, labels), batch_axes=axes)).reshape(5, 6)
    plain = ng.score(lambda w, b: CATEGORICAL.log_prob(b[0] @ w, b[1]), W, (X, labels))
    close(scores, np.reshape(plain, (5, 6)))
    empirical = ng.empirical_fisher(log_prob, batch_axes=axes)
    close(ng.fisher_matrix(empirical, W, (X.T, labels)), scores.T @ scores / 5)
    residual = ng.gauss_newton(model, batch_axes=1)
    close(ng.fisher_matrix(residual, W, X.T), np.kron(X.T @ X / 5, np.eye(3)))
    kl = lambda model, x, axis: ng.kl_divergence(model, CATEGORICAL, W, W + v, x, batch_axes=axis)
    close(kl(model, X.T, 1), kl(linear, X, 0))


# Rows and examples.


def test_tokens_are_rows_and_the_mean_is_over_tokens():
    metric = ng.exact_fisher(per_token, CATEGORICAL)
    expected = classifier_fisher(TOKENS.reshape(6, 2))
    close(ng.fisher_matrix(metric, W, TOKENS), expected)
    # Unflattened, positions are summed within an example.
    summed = ng.exact_fisher(linear, CATEGORICAL)
    close(ng.fisher_matrix(summed, W, TOKENS), 2 * expected)


def test_without_a_mapped_leaf_every_output_row_is_an_example():
    metric = ng.exact_fisher(lambda w, _: jnp.asarray(X) @ w, CATEGORICAL)
    close(ng.fisher_matrix(metric, W, None), classifier_fisher(X))
    shared = ng.exact_fisher(linear, CATEGORICAL, batch_axes=None)
    close(ng.fisher_matrix(shared, W, X), classifier_fisher(X))
    weighted = ng.exact_fisher(
        linear, CATEGORICAL, batch_axes=None, weights=lambda _: jnp.asarray([1.0, 0, 0, 0, 0])
    )
    close(ng.fisher_matrix(weighted, W, X), classifier_fisher(X[:1]))


def test_a_mapped_batch_of_one_example_may_give_many_rows():
    metric = ng.exact_fisher(per_token, CATEGORICAL)
    close(ng.fisher_matrix(metric, W, X[None]), classifier_fisher(X))


def test_a_sampled_metric_has_one_row_for_each_token_and_sample():
    metric = ng.sampled_fisher(per_token, CATEGORICAL, num_samples=2)
    gram = ng.gram_matrix(metric, W, TOKENS, key=KEY)
    fisher = ng.fisher_matrix(metric, W, TOKENS, key=KEY)
    assert gram.shape == (12, 12)
    close(np.linalg.eigvalsh(gram)[-6:], np.linalg.eigvalsh(fisher))


def test_outputs_with_several_leaves():
    # Mean and log scale of one target: J is block diagonal in the two columns of the weight.
    metric = ng.exact_fisher(lambda w, x: (x @ w[:, 0], x @ w[:, 1]), ng.DiagonalNormal())
    log_scale = X @ W[:, 1]
    fisher = np.asarray(ng.fisher_matrix(metric, W[:, :2], X)).reshape(2, 2, 2, 2)
    close(fisher[:, 0, :, 0], (X.T * np.exp(-2 * log_scale)) @ X / 5)
    close(fisher[:, 1, :, 1], 2 * X.T @ X / 5)
    close(fisher[:, 0, :, 1], np.zeros((2, 2)))


@pytest.mark.parametrize("kind", [dict, tuple])
def test_joint_heads_add_up(kind):
    heads = lambda first, second: (
        (first, second) if kind is tuple else {"policy": first, "value": second}
    )
    model = lambda w, x: heads(x @ w, x @ w[:, 0])
    joint = ng.Joint(heads(CATEGORICAL, NORMAL))
    value = np.kron(X.T @ X / 5 / 0.5**2, np.diag([1.0, 0, 0]))
    fisher = ng.fisher_matrix(ng.exact_fisher(model, joint), W, X)
    close(fisher, classifier_fisher(X) + value)

    key = jax.random.key(1)
    sampled = ng.sampled_fisher(model, joint)
    assert ng.gram_matrix(sampled, W, X, key=key).shape == (5, 5)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_joint_heads_with_rows_of_their_own_are_averaged_over_their_own(kind):
    heads = lambda first, second: (
        (first, second) if kind is tuple else {"policy": first, "value": second}
    )
    model = lambda w, x: heads(per_token(w, x), jnp.sum(x, axis=1) @ w[:, 0])
    joint, total = ng.Joint(heads(CATEGORICAL, NORMAL)), TOKENS.sum(axis=1)
    value = np.kron(total.T @ total / 3 / 0.5**2, np.diag([1.0, 0, 0]))
    exact = ng.exact_fisher(model, joint)
    expected = classifier_fisher(TOKENS.reshape(6, 2)) + value
    close(ng.fisher_matrix(exact, W, TOKENS), expected)

    sampled = ng.sampled_fisher(model, joint)
    keys = jax.random.split(KEY, 2000)
    draw = jax.jit(jax.vmap(lambda key: ng.fisher_matrix(sampled, W, TOKENS, key=key)))
    draws = np.asarray(draw(keys))
    deviation = np.abs(draws.mean(axis=0) - expected) / (draws.std(axis=0) / 2000**0.5)
    assert deviation.max() < 5

    step = 1e-4 * RNG.normal(size=(2, 3))
    kl = ng.kl_divergence(model, joint, W, W + step, TOKENS)
    assert float(kl) == pytest.approx(step.ravel() @ expected @ step.ravel() / 2, rel=1e-3)


# Groups of examples of different sizes.

POINTS = {"interior": RNG.normal(size=(7, 2)), "boundary": RNG.normal(size=(3, 2))}


def residuals(w, points):
    inside = points["interior"] @ w[:, 0]
    return {"bc": points["boundary"] @ w[:, 1:], "pde": inside * inside}


def residual_fisher(weights=None) -> np.ndarray:
    interior, boundary = POINTS["interior"], POINTS["boundary"]
    inner, outer = weights or (np.full(7, 1 / 7), np.full(3, 1 / 3))
    slope = 2 * (interior @ W[:, 0])[:, None] * interior
    pde = np.kron((slope.T * inner) @ slope, np.diag([1.0, 0, 0]))
    return pde + np.kron((boundary.T * outer) @ boundary, np.diag([0, 1.0, 1.0]))


def test_groups_of_residuals_are_averaged_over_their_own_points():
    metric = ng.gauss_newton(residuals)
    close(ng.fisher_matrix(metric, W, POINTS), residual_fisher())
    v = RNG.normal(size=(2, 3))
    product = ng.fisher_vector_product(metric, W, POINTS, v)
    close(np.ravel(product), residual_fisher() @ v.ravel())
    assert ng.gram_matrix(metric, W, POINTS).shape == (13, 13)


def test_groups_of_residuals_take_a_tree_of_weights():
    inner, outer = RNG.uniform(size=7), np.array([1.0, 0.0, 3.0])
    metric = ng.gauss_newton(
        residuals, weights=lambda b: {"bc": jnp.asarray(outer), "pde": jnp.asarray(inner)}
    )
    expected = residual_fisher((inner / inner.sum(), outer / outer.sum()))
    close(ng.fisher_matrix(metric, W, POINTS), expected)


def test_a_residual_sees_the_points_of_other_groups_whole():
    def coupled(w, points):
        return {
            "bc": points["boundary"] @ w[:, 1],
            "pde": points["interior"] @ w[:, 0] + jnp.sum(points["boundary"] @ w[:, 1]),
        }

    metric = ng.gauss_newton(coupled)
    zeros = np.zeros((7, 2))
    total = np.tile(POINTS["boundary"].sum(axis=0), (7, 1))
    pde = np.stack([POINTS["interior"], total, zeros], axis=-1).reshape(7, 6)
    bc = np.stack([zeros[:3], POINTS["boundary"], zeros[:3]], axis=-1).reshape(3, 6)
    close(ng.fisher_matrix(metric, W, POINTS), pde.T @ pde / 7 + bc.T @ bc / 3)


def test_a_group_may_have_no_residual_of_its_own():
    metric = ng.gauss_newton(lambda w, b: b["interior"] @ w[:, 0] + jnp.sum(b["boundary"]))
    expected = np.kron(POINTS["interior"].T @ POINTS["interior"] / 7, np.diag([1.0, 0, 0]))
    v = RNG.normal(size=(2, 3))
    close(np.ravel(ng.fisher_vector_product(metric, W, POINTS, v)), expected @ v.ravel())
    close(ng.fisher_matrix(metric, W, POINTS), expected)


# The other metrics.


@pytest.mark.parametrize("weighted", [False, True])
def test_centered_empirical_fisher_is_the_covariance_of_scores(weighted):
    labels, weights = np.array([0, 1, 2, 2, 0]), np.array([1.0, 2.0, 0.0, 0.5, 3.0])
    log_prob = lambda w, b: CATEGORICAL.log_prob(b[0] @ w, b[1])
    metric = ng.empirical_fisher(
        log_prob, centered=True, weights=(lambda b: b[2]) if weighted else None
    )
    batch = (X, labels, weights)
    p = scipy.special.softmax(X @ W, axis=-1)
    scores = np.einsum("np,nk->npk", X, np.eye(3)[labels] - p).reshape(5, 6)
    expected = np.cov(scores.T, ddof=0, aweights=weights if weighted else None)
    close(ng.fisher_matrix(metric, W, batch), expected)
    v = RNG.normal(size=(2, 3))
    close(np.ravel(ng.fisher_vector_product(metric, W, batch, v)), expected @ v.ravel())
    close(np.trace(ng.gram_matrix(metric, W, batch)), np.trace(expected))


def test_hessian_keeps_the_sign_of_its_eigenvalues():
    a = np.diag([2.0, -3.0, 0.5]) + 0.1
    metric = ng.hessian(lambda p, batch: 0.5 * p @ (batch @ p))
    close(ng.fisher_matrix(metric, np.ones(3), a), a)
    close(ng.fisher_diagonal(metric, np.ones(3), a), np.diag(a))
    assert float(ng.fisher_quadratic_form(metric, np.ones(3), a, np.array([0, 1.0, 0]))) < 0


def test_euclidean_is_the_identity():
    v = RNG.normal(size=(2, 3))
    close(ng.fisher_matrix(ng.euclidean(), W, None), np.eye(6))
    close(ng.fisher_vector_product(ng.euclidean(), W, None, v), v)


# Metrics and solvers as objects.


@pytest.mark.parametrize(
    "thing",
    [
        ng.exact_fisher(linear, CATEGORICAL),
        ng.sampled_fisher(linear, CATEGORICAL, weights=lambda b: b),
        ng.empirical_fisher(lambda p, b: b @ p, batch_axes=[0, None]),
        ng.gauss_newton(linear, batch_axes={"x": 0}),
        ng.hessian(lambda p, b: b @ p),
        ng.euclidean(),
        ng.cholesky(),
        ng.woodbury(),
        ng.spectral(lambda h, damping: h),
        ng.cg(preconditioner=ng.diagonal()),
        ng.diagonal(),
        ng.block_diagonal(),
    ],
    ids=lambda thing: thing.name,
)
def test_metrics_and_solvers_are_hashable_and_hold_no_arrays(thing):
    assert hash(thing) == hash(thing)
    assert thing == thing
    assert not [leaf for leaf in jax.tree.leaves(thing) if isinstance(leaf, jax.Array)]


def test_new_values_do_not_trace_the_model_again():
    traces = []

    def model(w, x):
        traces.append(None)
        return x @ w

    metric, solver = ng.exact_fisher(model, CATEGORICAL), ng.cholesky()
    for scale in (1.0, 2.0, 3.0):
        ng.fisher_matrix(metric, scale * W, X)
        ng.natural_gradient_direction(metric, W, scale * X, W, solver=solver, damping=scale)
        if scale == 1.0:
            first = len(traces)
    assert len(traces) == first

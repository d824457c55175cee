"""Identities B, C, D, F, G: where K-FAC and EKFAC are exact, and where they must not be."""

# ruff: noqa: N802 - tests carry the tag of the identity they show

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

TOL = 1e5 * np.finfo(np.float64).eps
VISIBLE = 0.1
RNG = np.random.default_rng(5)
SIZES = (3, 4, 2)
PARAMS = [
    {"w": RNG.normal(size=(p, q)), "b": RNG.normal(size=q)} for p, q in itertools.pairwise(SIZES)
]
BLOCKS = [np.r_[0:16], np.r_[16:26]]  # bias and weight of each layer, in tree order
X = RNG.normal(size=(7, 3))
LABELS = RNG.integers(2, size=7)
CATEGORICAL, NORMAL = ng.Categorical(), ng.Normal(0.7)


def net(activation):
    def apply(params, x):
        for i, layer in enumerate(params):
            z = (activation(x) if i else x) @ layer["w"]
            x = z + jnp.broadcast_to(layer["b"], z.shape)
        return x

    return apply


TANH, LINEAR = net(jnp.tanh), net(lambda x: x)


def scores(model, likelihood):
    return lambda params, batch: likelihood.log_prob(model(params, batch[0]), batch[1])


def approximate(metric, batch, params=PARAMS, **settings):
    made = ng.kronecker_approximation(metric, params, batch, key=jax.random.key(3), **settings)
    return np.asarray(made.matrix())


def exact(metric, batch, params=PARAMS):
    return np.asarray(ng.fisher_matrix(metric, params, batch, key=jax.random.key(3)))


def errors(metric, batch, **settings):
    """Relative errors of the diagonal blocks, a layer each."""
    found, wanted = approximate(metric, batch, **settings), exact(metric, batch)
    distance = lambda own: np.linalg.norm((found - wanted)[np.ix_(own, own)])
    return [distance(own) / np.linalg.norm(wanted[np.ix_(own, own)]) for own in BLOCKS]


EXACT_TABLE = {
    "B1 one example, exact Fisher": (ng.exact_fisher(TANH, CATEGORICAL), X[:1]),
    "B2 one example, empirical Fisher": (
        ng.empirical_fisher(scores(TANH, CATEGORICAL)),
        (X[:1], LABELS[:1]),
    ),
    "B3 one example, the same samples": (ng.sampled_fisher(TANH, CATEGORICAL), X[:1]),
    "B4 deep linear, Normal": (ng.exact_fisher(LINEAR, NORMAL), X),
    "B5 identical inputs": (ng.exact_fisher(TANH, CATEGORICAL), np.tile(X[:1], (7, 1))),
}
INEXACT_TABLE = {
    "B1 seven examples": (ng.exact_fisher(TANH, CATEGORICAL), X),
    "B4 Categorical": (ng.exact_fisher(LINEAR, CATEGORICAL), X),
    "B4 empirical": (ng.empirical_fisher(scores(LINEAR, CATEGORICAL)), (X, LABELS)),
    "B4 tanh": (ng.exact_fisher(TANH, NORMAL), X),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", EXACT_TABLE)
def test_B_kronecker_products_are_exact(name):
    assert max(errors(*EXACT_TABLE[name])) < TOL


@pytest.mark.parametrize("name", INEXACT_TABLE)
def test_B_and_elsewhere_they_are_not(name):
    assert max(errors(*INEXACT_TABLE[name])) > VISIBLE


def test_B6_the_last_layer_is_exact_for_normal_outputs_and_the_first_is_not():
    first, last = errors(ng.exact_fisher(TANH, NORMAL), X)
    assert last < TOL
    assert first > VISIBLE


METRICS = {
    "exact": (ng.exact_fisher(TANH, CATEGORICAL), X),
    "sampled": (ng.sampled_fisher(TANH, CATEGORICAL, num_samples=2), X),
    "empirical": (ng.empirical_fisher(scores(TANH, CATEGORICAL)), (X, LABELS)),
    "gauss_newton": (ng.gauss_newton(TANH), X),
}


@pytest.mark.parametrize("name", METRICS)
def test_C1_ekfac_is_nearer_and_C2_has_the_trace_of_the_blocks(name):
    metric, batch = METRICS[name]
    wanted = exact(metric, batch)
    kfac, ekfac = (approximate(metric, batch, eigenvalue_corrected=c) for c in (False, True))
    others = []
    for own in BLOCKS:
        at = np.ix_(own, own)
        size = np.linalg.norm(wanted[at])
        distance = lambda matrix, at=at: np.linalg.norm(matrix[at] - wanted[at])
        assert distance(ekfac) < 0.99 * distance(kfac) + TOL * size
        np.testing.assert_allclose(np.trace(ekfac[at]), np.trace(wanted[at]), rtol=TOL)
        others.append(abs(np.trace(kfac[at]) / np.trace(wanted[at]) - 1))
    assert max(others) > 1e-3


def last_layer(metric_scores):
    """The last layer by hand: inputs with a one for the bias, cotangents, and its entries."""
    inputs = np.tanh(X @ PARAMS[0]["w"] + PARAMS[0]["b"])
    return np.c_[inputs, np.ones(7)], metric_scores(inputs @ PARAMS[1]["w"] + PARAMS[1]["b"])


def empirical_cotangents(z):
    return np.eye(2)[LABELS] - scipy.special.softmax(z, axis=1)


def in_layout(matrix):
    """From entries (input, output) with the bias last to bias first, then the weight."""
    p, q = 5, 2
    order = np.arange(p * q).reshape(p, q)
    order = np.r_[order[-1], order[:-1].reshape(-1)]
    return matrix[np.ix_(order, order)]


def test_C3_eigenvalues_are_second_moments_in_the_eigenbasis():
    a, g = last_layer(empirical_cotangents)
    _, q_a = np.linalg.eigh(a.T @ a / 7)
    _, q_g = np.linalg.eigh(g.T @ g / 7)
    moments = ((a @ q_a) ** 2).T @ ((g @ q_g) ** 2) / 7
    basis = np.kron(q_a, q_g)
    expected = in_layout(basis @ np.diag(moments.reshape(-1)) @ basis.T)
    metric, batch = METRICS["empirical"]
    found = approximate(metric, batch, eigenvalue_corrected=True)
    np.testing.assert_allclose(found[np.ix_(BLOCKS[1], BLOCKS[1])], expected, atol=TOL)


def test_C4_where_kfac_is_exact_ekfac_equals_it():
    metric, batch = EXACT_TABLE["B4 deep linear, Normal"]
    pair = [approximate(metric, batch, eigenvalue_corrected=c) for c in (False, True)]
    np.testing.assert_allclose(*pair, atol=TOL * np.abs(pair[0]).max())


GRADS = jax.tree.map(lambda x: RNG.normal(size=x.shape), PARAMS)


def last_direction(solver, damping, batch=(X, LABELS)):
    d, _ = ng.natural_gradient_direction(
        METRICS["empirical"][0], PARAMS, batch, GRADS, solver=solver, damping=damping
    )
    return np.r_[np.asarray(d[1]["w"]), np.asarray(d[1]["b"])[None]]


def test_D1_D2_the_exact_split_is_the_inverse_of_the_damped_product():
    a, g = last_layer(empirical_cotangents)
    left, right = a.T @ a / 7, g.T @ g / 7
    matrix = np.kron(left, right) + 0.3 * np.eye(10)
    gradient = np.r_[GRADS[1]["w"], GRADS[1]["b"][None]]
    expected = np.linalg.solve(matrix, gradient.reshape(-1)).reshape(5, 2)
    found = last_direction(ng.kfac((X, LABELS), damping_split="exact"), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # The control: the factored split is another matrix.
    other = last_direction(ng.kfac((X, LABELS)), 0.3)
    assert np.linalg.norm(other - expected) > 0.01 * np.linalg.norm(expected)


def test_D3_the_factored_split_divides_the_damping_by_pi():
    a, g = last_layer(empirical_cotangents)
    left, right = a.T @ a / 7, g.T @ g / 7
    pi = np.sqrt((np.trace(left) / 5) / (np.trace(right) / 2))
    gradient = np.r_[GRADS[1]["w"], GRADS[1]["b"][None]]

    def expected(pi, c=1.0):
        inverse = lambda m, damping: np.linalg.inv(m + damping * np.eye(len(m)))
        sides = inverse(c * left, pi * 0.3**0.5), inverse(right / c, 0.3**0.5 / pi)
        return sides[0] @ gradient @ sides[1]

    found = last_direction(ng.kfac((X, LABELS)), 0.3)
    np.testing.assert_allclose(found, expected(pi), rtol=1e-9)
    # pi takes part in a change of units of the factors, A -> 100 A and B -> B / 100.
    np.testing.assert_allclose(expected(100 * pi, 100.0), expected(pi), rtol=1e-9)
    # The control: the same damping on both factors does not.
    same = [expected(1.0), expected(1.0, 100.0)]
    assert np.linalg.norm(same[0] - same[1]) > VISIBLE * np.linalg.norm(same[0])


SEQUENCES = RNG.normal(size=(7, 5, 3))


def every_position(params, x):
    """A loss at every position."""
    return LINEAR(params, x)


def pooled(params, x):
    """A loss after the mean over positions."""
    return jnp.mean(LINEAR(params, x), axis=1)


@pytest.mark.parametrize(
    ("model", "right", "wrong"),
    [(every_position, "expand", "reduce"), (pooled, "reduce", "expand")],
)
def test_F1_F2_each_setting_is_exact_where_it_belongs(model, right, wrong):
    metric = ng.exact_fisher(model, NORMAL)
    assert max(errors(metric, SEQUENCES, weight_sharing=right)) < TOL
    assert max(errors(metric, SEQUENCES, weight_sharing=wrong)) > VISIBLE


def test_F3_with_one_position_both_are_equal():
    metric = ng.exact_fisher(every_position, NORMAL)
    pair = [approximate(metric, SEQUENCES[:, :1], weight_sharing=s) for s in ("expand", "reduce")]
    np.testing.assert_allclose(*pair, atol=TOL * np.abs(pair[0]).max())


def test_G1_an_undamped_step_does_not_see_linear_changes_of_inputs():
    """x -> x P, W -> P^-1 W: the model moves in the same way; with the gradient it does not."""
    mixing = RNG.normal(size=(3, 3))
    examples = RNG.normal(size=(40, 3))
    weight = RNG.normal(size=(3, 2))
    model = lambda params, x: jnp.tanh(x @ params)
    metric = ng.exact_fisher(model, NORMAL)
    loss = lambda w, x: jnp.mean((model(w, x) - 1.0) ** 2)

    def moved(step, x, w):
        return x @ step(w, x)

    def natural(w, x):
        grads = jax.grad(loss)(w, x)
        solver = ng.kfac(x)
        return ng.natural_gradient_direction(metric, w, x, grads, solver=solver, damping=0.0)[0]

    there = (examples @ mixing, np.linalg.solve(mixing, weight))
    one, two = (moved(natural, x, w) for x, w in [(examples, weight), there])
    np.testing.assert_allclose(one, two, rtol=1e-7)
    plain = [moved(jax.grad(loss), x, w) for x, w in [(examples, weight), there]]
    assert np.linalg.norm(plain[0] - plain[1]) > VISIBLE * np.linalg.norm(plain[0])

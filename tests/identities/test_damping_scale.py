"""E10: solves of (F + damping diag(s)) d = g, against dense formulas in float64."""

# ruff: noqa: N802 - tests carry the tag of the identity they show

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import oracle as rows_oracle
from tests.optax_contract import cases
from tests.optax_contract import oracle

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


TOL = 1e6 * np.finfo(np.float64).eps
VISIBLE = 0.05
DAMPING = 0.05
SCALE = {"b": 40.0, "w": 0.3}
KEY = jax.random.key(4)
RNG = np.random.default_rng(5)

#: Solvers, the part of F that each works with, and whether they need rows.
SOLVERS = {
    "None": (None, "dense"),
    "cholesky": (ng.cholesky(), "dense"),
    "woodbury": (ng.woodbury(), "dense"),
    "qr": (ng.qr(), "dense"),
    "spectral": (ng.spectral(), "dense"),
    "cg": (ng.cg(tol=1e-13), "dense"),
    "cg, preconditioned": (ng.cg(tol=1e-13, preconditioner=ng.diagonal()), "dense"),
    "diagonal": (ng.diagonal(), "diagonal"),
    "block_diagonal": (ng.block_diagonal(), "blocks"),
}
METRICS = {
    **cases.METRICS,
    "centered": ng.empirical_fisher(cases.log_prob, centered=True),
}
PAIRS = [
    *(("exact_fisher", solver) for solver in SOLVERS),
    *((metric, "None") for metric in METRICS if metric != "exact_fisher"),
    *(("hessian", solver) for solver in ("cg", "spectral", "diagonal", "block_diagonal")),
]


def error(value, expected):
    value, expected = (
        x if isinstance(x, np.ndarray) else oracle.ravel(x) for x in (value, expected)
    )
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def wide(scale, params):
    """A prefix of numbers as a vector with one for each entry."""
    fill = lambda s, part: jax.tree.map(lambda x: np.full(np.shape(x), s), part)
    return oracle.ravel(jax.tree.map(fill, scale, params))


def matrix(metric, params, batch):
    if metric == "sampled_fisher":
        return np.asarray(ng.fisher_matrix(METRICS[metric], params, batch, key=KEY))
    if metric == "centered":
        r = oracle.rows("empirical_fisher", params, batch)
        r = r - r.mean(axis=0)
        return r.T @ r
    return oracle.matrix(metric, params, batch)


def solved(fisher, damping, s, g):
    return np.linalg.solve(fisher + damping * np.diag(s), g)


def direction(metric, solver, params, batch, grads, scale, damping=DAMPING):
    key = KEY if metric.needs_key else None
    return ng.natural_gradient_direction(
        metric, params, batch, grads, solver=solver, damping=damping, damping_scale=scale, key=key
    )


@pytest.mark.parametrize("kind", ["numbers", "diagonal"])
@pytest.mark.parametrize(("metric", "solver"), PAIRS)
def test_E10_every_solver_and_metric_gives_the_dense_formula(metric, solver, kind):
    params, grads, batch = cases.arrays()
    chosen, structure = SOLVERS[solver]
    whole = matrix(metric, params, batch)
    s = np.abs(np.diag(whole)) if kind == "diagonal" else wide(SCALE, params)
    g, fisher = oracle.ravel(grads), oracle.structured(whole, structure, params)
    # Where nothing depends on the bias, "diagonal" takes the largest for it.
    s = np.where(s > 1e-20 * s.max(), s, s.max())
    # Away from the negative eigenvalues of the Hessian, which conjugate gradients stop at.
    damping = 3.0 if metric == "hessian" else DAMPING
    scale = "diagonal" if kind == "diagonal" else SCALE
    d, info = direction(METRICS[metric], chosen, params, batch, grads, scale, damping)
    expected = solved(fisher, damping, s, g)
    assert error(d, expected) < TOL
    if np.ptp(s):
        assert error(d, solved(fisher, damping, np.ones_like(s), g)) > VISIBLE
    assert float(info.grad_dot_direction) == pytest.approx(g @ expected, rel=1e-5)
    if structure == "dense":
        assert 0 <= info.relative_residual < 1e-10


class Model(NamedTuple):
    """A model, and why it is here."""

    function: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    scale: Any


def normal(*shape):
    return 0.7 * RNG.normal(size=shape)


def askew(p, x):
    return jnp.tanh(x @ jnp.concatenate([p["u"], p["v"]]).reshape(3, 4))


def scanned(p, x):
    stacked = jnp.stack([p["one"], p["two"]])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stacked)[0]


def fused_layer(p, x):
    joint = jnp.concatenate([p["wa"], p["wb"]], axis=1), jnp.concatenate([p["ba"], p["bb"]])
    return x @ joint[0] + joint[1]


def fused(p, x):
    a, b = jnp.split(fused_layer(p, x), [2], axis=1)
    return jnp.tanh(a).sum(1, keepdims=True) * b


X, SEQUENCE, INDICES = normal(5, 3), normal(5, 4, 3), RNG.integers(0, 5, (5, 3))
MODELS = {
    "layers with biases": Model(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"],
        {"w": normal(3, 4), "b": normal(4), "v": normal(4, 2)},
        X,
        {"w": 0.2, "b": 30.0, "v": 5.0},
    ),
    "several positions": Model(
        lambda p, x: jnp.mean(jnp.tanh(x @ p["w"] + p["b"]), axis=1),
        {"w": normal(3, 4), "b": normal(4)},
        SEQUENCE,
        {"w": 0.2, "b": 30.0},
    ),
    "tied, upright and transposed": Model(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"],
        {"w": normal(3, 4), "b": normal(3)},
        X,
        {"w": 0.2, "b": 30.0},
    ),
    "looked up and used as the head": Model(
        lambda p, i: p["e"][i].mean(1) @ p["e"].T + p["b"],
        {"e": normal(5, 3), "b": normal(5)},
        INDICES,
        {"e": 0.2, "b": 30.0},
    ),
    "normalised weights": Model(
        lambda p, x: x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]),
        {"v": normal(3, 4), "g": normal(4)},
        X,
        {"v": 0.2, "g": 30.0},
    ),
    "enters nonlinearly": Model(
        lambda p, x: jnp.exp(p["a"] * x) + x / (2 + p["c"] ** 2),
        {"a": normal(), "c": normal(3)},
        X,
        {"a": 0.2, "c": 30.0},
    ),
    "joined along inputs": Model(
        lambda p, x: jnp.tanh(x @ jnp.concatenate([p["u"], p["v"]])),
        {"u": normal(1, 4), "v": normal(2, 4)},
        X,
        {"u": 0.2, "v": 30.0},
    ),
    "joined along outputs, with biases": Model(
        fused,
        {"wa": normal(3, 2), "wb": normal(3, 3), "ba": normal(2), "bb": normal(3)},
        X,
        {"wa": 0.2, "wb": 30.0, "ba": 5.0, "bb": 0.7},
    ),
    "joined for a scan": Model(
        scanned, {"one": normal(3, 3), "two": normal(3, 3)}, X, {"one": 0.2, "two": 30.0}
    ),
    "joined tables": Model(
        lambda p, i: jnp.tanh(jnp.concatenate([p["u"], p["v"]])[i]).sum(1),
        {"u": normal(2, 3), "v": normal(3, 3)},
        INDICES,
        {"u": 0.2, "v": 30.0},
    ),
    "joined across inputs and outputs": Model(
        askew, {"u": normal(5), "v": normal(7)}, X, {"u": 0.2, "v": 30.0}
    ),
    "several groups": Model(
        lambda p, x: {"in": jnp.tanh(x["in"] @ p["w"]), "on": (x["on"] @ p["w"]) ** 2 + p["b"]},
        {"w": normal(3, 2), "b": normal(2)},
        {"in": X, "on": normal(4, 3)},
        {"w": 0.2, "b": 30.0},
    ),
    "a prefix, and a leaf that nothing depends on": Model(
        lambda p, x: jnp.tanh(x @ p["in"]["w"] + p["in"]["b"]) @ p["out"],
        {"in": {"w": normal(3, 4), "b": normal(4)}, "out": normal(4, 2), "unused": normal(2)},
        X,
        {"in": 0.2, "out": 30.0, "unused": 4.0},
    ),
}


@pytest.mark.filterwarnings("ignore:gauss_newton. no output depends on:UserWarning")
@pytest.mark.parametrize("kind", ["numbers", "diagonal"])
@pytest.mark.parametrize("name", MODELS)
def test_E10_rows_of_every_form_are_scaled(name, kind):
    function, params, batch, scale = MODELS[name]
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    metric, grads = ng.gauss_newton(function), rows_oracle.draw_like(params, 0)
    rows = np.asarray(jax.jit(lambda p: rows_oracle.gauss_newton_rows(function, p, batch))(params))
    fisher, g = rows.T @ rows, oracle.ravel(grads)
    s = np.diag(fisher) if kind == "diagonal" else wide(scale, params)
    s = np.where(s > 0, s, s.max())
    given = "diagonal" if kind == "diagonal" else scale
    d, info = direction(metric, ng.woodbury(), params, batch, grads, given)
    assert error(d, solved(fisher, DAMPING, s, g)) < TOL
    assert error(d, solved(fisher, DAMPING, np.ones_like(s), g)) > VISIBLE
    # The row space is that of R s^(-1/2), in which the whole of d is measured.
    scaled = oracle.ravel(d) * np.sqrt(s)
    inside = np.linalg.pinv(rows / np.sqrt(s), rcond=1e-10) @ (rows @ oracle.ravel(d))
    outside = np.linalg.norm(scaled - inside) / np.linalg.norm(scaled)
    assert float(info.outside_row_space) == pytest.approx(outside, abs=1e-4)


@pytest.mark.parametrize("solver", ["cholesky", "qr", "woodbury", "spectral", "cg"])
def test_E10_without_damping_it_is_the_pseudo_inverse_in_scaled_variables(solver):
    params, x, g = normal(7), normal(4, 7), normal(7)
    metric, s = ng.gauss_newton(lambda p, x: x @ p["a"] + x @ p["b"]), np.repeat([0.3, 40.0], 7)
    both, grads = {"a": params, "b": params}, {"a": g, "b": normal(7)}
    d, _ = direction(metric, SOLVERS[solver][0], both, x, grads, {"a": 0.3, "b": 40.0}, 0.0)
    rows = np.concatenate([x, x], axis=1) / 2
    inverse = lambda s: (
        np.diag(s**-0.5)
        @ np.linalg.pinv(np.diag(s**-0.5) @ rows.T @ rows @ np.diag(s**-0.5), rcond=1e-10)
        @ np.diag(s**-0.5)
    )
    assert error(d, inverse(s) @ oracle.ravel(grads)) < 1e3 * TOL
    assert error(d, inverse(np.ones(14)) @ oracle.ravel(grads)) > VISIBLE


@pytest.mark.parametrize("damping_scale", [SCALE, "diagonal"])
@pytest.mark.parametrize("solver", ["None", "qr", "woodbury", "cg"])
def test_E10_momentum_is_that_of_the_scaled_damping(solver, damping_scale):
    params, grads, batch = cases.arrays()
    mu, g = 0.7, oracle.ravel(grads)
    tx = ng.scale_by_natural_gradient(
        METRICS["exact_fisher"],
        solver=SOLVERS[solver][0],
        damping=DAMPING,
        damping_scale=damping_scale,
        momentum=mu,
    )
    state, phi, unscaled = tx.init(params), np.zeros(8), np.zeros(8)
    for i in range(3):
        shifted = {**batch, "x": batch["x"] + 0.5 * i}
        d, state = tx.update(grads, state, params, batch=shifted)
        fisher = oracle.matrix("exact_fisher", params, shifted)
        s = np.diag(fisher) if damping_scale == "diagonal" else wide(SCALE, params)
        phi = mu * phi + solved(fisher, DAMPING, s, g - mu * fisher @ phi)
        # With the scale taken for the old velocity, too, which F alone acts on.
        wrong = fisher / np.sqrt(np.outer(s, s))
        unscaled = mu * unscaled + solved(fisher, DAMPING, s, g - mu * wrong @ unscaled)
        assert error(d, phi) < 10 * TOL
    assert error(d, unscaled) > 0.01


UNITS = {"w": 10.0 ** RNG.uniform(-2, 2, (3, 4)), "b": 10.0 ** RNG.uniform(-2, 2, 4)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_damping_by_the_diagonal_does_not_see_units(solver):
    """theta_i -> c_i theta_i, entry by entry. The control: plain damping sees them."""
    params, grads = ({"w": normal(3, 4), "b": normal(4)} for _ in range(2))
    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    times = lambda a, b: jax.tree.map(np.multiply, a, b)
    metric = ng.gauss_newton(model)
    other = ng.gauss_newton(
        lambda p, x: model({k: UNITS[k] * v for k, v in p.items()}, x), independent=True
    )
    phi = jax.tree.map(np.divide, params, UNITS)

    def gap(scale):
        chosen = SOLVERS[solver][0]
        d, _ = direction(metric, chosen, params, X, grads, scale)
        there, _ = direction(other, chosen, phi, X, times(UNITS, grads), scale)
        return error(times(UNITS, there), oracle.ravel(d))

    assert gap("diagonal") < 1e3 * TOL
    assert gap(None) > VISIBLE


@pytest.mark.smoke
def test_a_scale_common_to_all_is_a_factor_of_the_damping():
    params, grads, batch = cases.arrays()
    metric = METRICS["exact_fisher"]
    d, _ = direction(metric, ng.woodbury(), params, batch, grads, 7.0)
    more, _ = direction(metric, ng.woodbury(), params, batch, grads, None, 7 * DAMPING)
    less, _ = direction(metric, ng.woodbury(), params, batch, grads, None)
    assert error(d, oracle.ravel(more)) < TOL
    assert error(d, oracle.ravel(less)) > VISIBLE


@pytest.mark.parametrize("solver", ["None", "cholesky", "woodbury", "cg", "diagonal"])
def test_entries_without_a_diagonal_are_damped_like_the_largest(solver):
    model = lambda p, x: x @ p["w"] * jnp.array([1.0, 0.0])
    params, grads = {"w": normal(3, 2)}, {"w": normal(3, 2)}
    metric = ng.gauss_newton(model)
    d, _ = direction(metric, SOLVERS[solver][0], params, X, grads, "diagonal")
    largest = (X**2).mean(0).max()
    np.testing.assert_allclose(d["w"][:, 1], grads["w"][:, 1] / (DAMPING * largest), rtol=1e-9)
    # Without any there is nothing to compare with: one.
    d, _ = direction(metric, SOLVERS[solver][0], params, 0 * X, grads, "diagonal")
    np.testing.assert_allclose(d["w"], grads["w"] / DAMPING, rtol=1e-9)


@pytest.mark.parametrize("name", ["layers", "fused layers"])
def test_numbers_for_leaves_keep_rows_factored(name):
    """No N x P array is formed. The control: "diagonal" needs one."""
    shapes = {"wa": (60, 80), "wb": (60, 80), "ba": (80,), "bb": (80,)}
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    apart = lambda p, x: (x @ p["wa"] + p["ba"]) * (x @ p["wb"] + p["bb"])
    function = fused_layer if name == "fused layers" else apart
    log_prob = lambda p, x: jnp.sum(jnp.tanh(function(p, x)), axis=1)
    metric, batch = ng.empirical_fisher(log_prob), jnp.zeros((50, 60))

    def transient(scale):
        core = lambda p: direction(metric, ng.woodbury(), p, batch, p, scale)[0]
        return jax.jit(core).lower(params).compile().memory_analysis().temp_size_in_bytes

    dense = 8 * len(batch) * params["wa"].size
    assert transient({"wa": 0.2, "wb": 30.0, "ba": 5.0, "bb": 0.7}) < dense / 2
    assert transient("diagonal") > dense

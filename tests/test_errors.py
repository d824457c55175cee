"""Bad input: an error at once, that names the public function, what it got and what it needs.

What depends on values alone never raises.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

CATEGORICAL, NORMAL = ng.Categorical(), ng.Normal()
W, X, LABELS = jnp.ones((2, 3)), jnp.ones((4, 2)), jnp.zeros(4, jnp.int32)


def linear(w, x):
    return x @ w


def log_prob(w, batch):
    return CATEGORICAL.log_prob(batch[0] @ w, batch[1])


EXACT = ng.exact_fisher(linear, CATEGORICAL)
SAMPLED = ng.sampled_fisher(linear, CATEGORICAL)
EMPIRICAL = ng.empirical_fisher(log_prob)
RESIDUAL = ng.gauss_newton(linear)
HESSIAN = ng.hessian(lambda w, x: jnp.sum(linear(w, x) ** 2))


class Bad(NamedTuple):
    """A call, the type of its error, and patterns that all occur in the message."""

    call: Callable[[], object]
    error: type[Exception]
    patterns: tuple[str, ...]


def bad(error, call, *patterns):
    return Bad(call, error, patterns)


def check(case: Bad) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    for pattern in case.patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} not in {caught.value}"


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


# Functions of (metric, params, batch), under their public names.
FUNCTIONS = {
    "fisher_matrix": lambda m, p, b, **kw: ng.fisher_matrix(m, p, b, **kw),
    "fisher_vector_product": lambda m, p, b, **kw: ng.fisher_vector_product(m, p, b, p, **kw),
    "fisher_quadratic_form": lambda m, p, b, **kw: ng.fisher_quadratic_form(m, p, b, p, **kw),
    "fisher_diagonal": lambda m, p, b, **kw: ng.fisher_diagonal(m, p, b, **kw),
    "gram_matrix": lambda m, p, b, **kw: ng.gram_matrix(m, p, b, **kw),
    "asymptotic_covariance": lambda m, p, b, **kw: ng.asymptotic_covariance(m, p, b, 4, **kw),
    "natural_gradient_direction": lambda m, p, b, **kw: ng.natural_gradient_direction(
        m, p, b, p, **kw
    ),
}
TRANSFORMATIONS = {
    "scale_by_natural_gradient": ng.scale_by_natural_gradient,
    "natural_gradient": lambda metric, **kw: ng.natural_gradient(0.1, metric, **kw),
    "scale_to_kl": lambda metric: ng.scale_to_kl(metric, 0.1),
    "clip_by_kl": lambda metric: ng.clip_by_kl(metric, 0.1),
}
# What an alias is made of is what its messages name.
NAMED = {name: "scale_by_" * (name == "natural_gradient") + name for name in TRANSFORMATIONS}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def update(name, params=W, updates=W, metric=EXACT, **keywords):
    tx = TRANSFORMATIONS[name](metric)
    return tx.update(updates, tx.init(W), params, **keywords)


# What every function and transformation refuses.


@every_function
def test_functions_refuse_params_none(name):
    check(bad(ValueError, lambda: FUNCTIONS[name](EXACT, None, X), name, "params is None"))


@every_function
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_functions_refuse_parameters_that_are_not_real(name, dtype):
    params = {"w": jnp.ones((2, 3), dtype)}
    patterns = (name, r"params\['w'\]", jnp.dtype(dtype).name, "real floating")
    check(bad(TypeError, lambda: FUNCTIONS[name](EXACT, params, X), *patterns))


@every_function
def test_functions_refuse_what_is_no_metric(name):
    call = lambda: FUNCTIONS[name](ng.exact_fisher, W, X)
    check(bad(TypeError, call, name, "metric must come from", "exact_fisher"))


@every_function
def test_functions_refuse_leaves_that_are_no_arrays(name):
    check(bad(TypeError, lambda: FUNCTIONS[name](EXACT, 1.5, X), name, "params", "array", "float"))
    call = lambda: FUNCTIONS[name](EXACT, W, {"x": X, "name": "train"})
    check(bad(TypeError, call, name, r"batch\['name'\]", "array", "str"))


@every_function
def test_functions_refuse_a_sampling_metric_without_key(name):
    call = lambda: FUNCTIONS[name](SAMPLED, W, X)
    check(bad(ValueError, call, "sampled_fisher|" + name, "key"))


@every_function
def test_functions_refuse_leading_axes_that_disagree(name):
    call = lambda: FUNCTIONS[name](EMPIRICAL, W, (X, LABELS[:3]))
    check(bad(ValueError, call, "empirical_fisher|" + name, r"\b4\b", r"\b3\b", "batch_axes"))


@every_function
def test_functions_refuse_outputs_without_leading_axis(name):
    metric = ng.exact_fisher(lambda w, x: jnp.sum(x @ w), NORMAL)
    call = lambda: FUNCTIONS[name](metric, W, X)
    check(bad(ValueError, call, "exact_fisher|" + name, "scalar|shape \\(\\)", "leading axis"))


@every_transformation
def test_transformations_refuse_a_missing_batch(name):
    check(bad(TypeError, lambda: update(name), NAMED[name], "batch"))


@every_transformation
def test_transformations_refuse_params_none(name):
    call = lambda: update(name, params=None, batch=X)
    check(bad(ValueError, call, NAMED[name], "params is None"))


@every_transformation
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_transformations_refuse_parameters_that_are_not_real(name, dtype):
    call = lambda: update(name, params=W.astype(dtype), batch=X)
    check(bad(TypeError, call, NAMED[name], jnp.dtype(dtype).name, "real floating"))


@every_transformation
def test_transformations_refuse_updates_unlike_params(name):
    call = lambda: update(name, updates=jnp.ones((3, 2)), batch=X)
    check(bad(ValueError, call, NAMED[name], "updates", r"\(3, 2\)", r"\(2, 3\)"))
    call = lambda: update(name, updates={"w": W}, batch=X)
    check(bad(ValueError, call, NAMED[name], "updates", "tree"))


@every_transformation
def test_transformations_refuse_leading_axes_that_disagree(name):
    call = lambda: update(name, metric=EMPIRICAL, batch=(X, LABELS[:3]))
    check(bad(ValueError, call, "empirical_fisher|" + NAMED[name], r"\b4\b", r"\b3\b"))


@every_transformation
def test_transformations_refuse_hidden_leaves_without_the_full_parameters(name):
    params = {"hidden": W, "seen": W}
    model = lambda p, x: x @ (p["hidden"] + p["seen"])
    tx = TRANSFORMATIONS[name](ng.exact_fisher(model, CATEGORICAL))
    masked = optax.masked(tx, {"hidden": False, "seen": True})
    state = masked.init(params)
    call = lambda: masked.update(params, state, params, batch=X)
    check(bad(ValueError, call, "exact_fisher|" + NAMED[name], "MaskedNode", "full_params"))
    masked.update(params, state, params, batch=X, full_params=params)


@every_transformation
@pytest.mark.parametrize("bad_metric", [None, "fisher", ng.exact_fisher])
def test_transformations_refuse_what_is_no_metric(name, bad_metric):
    call = lambda: TRANSFORMATIONS[name](bad_metric)
    check(bad(TypeError, call, NAMED[name], "metric must come from"))


@every_transformation
def test_init_with_nothing_in_it_works(name):
    tx = TRANSFORMATIONS[name](EXACT)
    for empty in ({}, [], (), {"w": {}}, None):
        state = tx.init(empty)
        if empty is not None:
            updates, _ = tx.update(empty, state, empty, batch=X)
            assert updates == empty


# Metrics.

METRICS = {
    "exact_fisher of no likelihood": bad(
        TypeError, lambda: ng.exact_fisher(linear, "normal"), "exact_fisher", "Likelihood", "normal"
    ),
    "exact_fisher of a likelihood class": bad(
        TypeError, lambda: ng.exact_fisher(linear, ng.Normal), "exact_fisher", "Likelihood"
    ),
    "exact_fisher without kl": bad(
        TypeError,
        lambda: ng.exact_fisher(linear, type("Own", (ng.Likelihood,), {})()),
        "exact_fisher",
        "Own",
        "kl",
        "sampled_fisher",
    ),
    "sampled_fisher of no likelihood": bad(
        TypeError, lambda: ng.sampled_fisher(linear, None), "sampled_fisher", "Likelihood"
    ),
    "no samples": bad(
        ValueError,
        lambda: ng.sampled_fisher(linear, NORMAL, num_samples=0),
        "sampled_fisher",
        "num_samples",
        "0",
    ),
    "half a sample": bad(
        ValueError,
        lambda: ng.sampled_fisher(linear, NORMAL, num_samples=0.5),
        "sampled_fisher",
        "num_samples",
        "0.5",
    ),
    "log-probabilities of several columns": bad(
        ValueError,
        lambda: ng.fisher_matrix(ng.empirical_fisher(linear), W, X),
        "empirical_fisher",
        r"\(N,\)",
        r"\(4, 3\)",
    ),
    "loss that is no scalar": bad(
        ValueError, lambda: ng.fisher_matrix(ng.hessian(linear), W, X), "hessian", "scalar"
    ),
    "outputs that do not count examples": bad(
        ValueError,
        lambda: ng.fisher_matrix(ng.exact_fisher(lambda w, x: x[:3] @ w, CATEGORICAL), W, X),
        "exact_fisher",
        r"\b3\b",
        r"\b4\b",
    ),
    "residuals of a size that no group has": bad(
        ValueError,
        lambda: ng.fisher_matrix(
            ng.gauss_newton(lambda w, b: b[0][:2] @ w), W, (X, jnp.ones((3, 2)))
        ),
        "gauss_newton",
        r"\b2 rows",
        r"\b4 and 3\b",
    ),
    "integer outputs": bad(
        TypeError,
        lambda: ng.fisher_matrix(
            ng.gauss_newton(lambda w, x: jnp.sign(x @ w).astype(jnp.int32)), W, X
        ),
        "gauss_newton",
        "int32",
        "floating",
    ),
    "scalar in a mapped batch": bad(
        ValueError,
        lambda: ng.fisher_matrix(
            ng.exact_fisher(lambda w, b: b[0] @ w, CATEGORICAL), W, (X, jnp.ones(()))
        ),
        "exact_fisher",
        r"\(\)",
        "batch_axes",
    ),
    "an axis that is not there": bad(
        ValueError,
        lambda: ng.fisher_matrix(ng.exact_fisher(linear, CATEGORICAL, batch_axes=2), W, X),
        "exact_fisher",
        r"\(4, 2\)",
        "axis 2",
    ),
    "batch_axes unlike the batch": bad(
        ValueError,
        lambda: ng.fisher_matrix(ng.exact_fisher(linear, CATEGORICAL, batch_axes=(0, 0)), W, X),
        "exact_fisher",
        "batch_axes",
    ),
    "too few weights": bad(
        ValueError,
        lambda: ng.fisher_matrix(
            ng.exact_fisher(linear, CATEGORICAL, weights=lambda x: jnp.ones(3)), W, X
        ),
        "exact_fisher",
        "weights",
        r"\(3,\)",
        r"\b4\b",
    ),
    "weights of two axes": bad(
        ValueError,
        lambda: ng.fisher_matrix(
            ng.exact_fisher(linear, CATEGORICAL, weights=lambda x: jnp.ones((4, 1))), W, X
        ),
        "exact_fisher",
        "weights",
        r"\(4, 1\)",
    ),
    "weights for other outputs": bad(
        ValueError,
        lambda: ng.fisher_matrix(
            ng.gauss_newton(
                lambda w, x: {"a": x @ w, "b": x @ w}, weights=lambda x: {"a": jnp.ones(4)}
            ),
            W,
            X,
        ),
        "gauss_newton",
        "weights",
    ),
    "samples of heads that are no Joint": bad(
        ValueError,
        lambda: ng.fisher_matrix(
            ng.sampled_fisher(
                lambda w, x: (x @ w, jnp.concatenate([x, x]) @ w), ng.DiagonalNormal()
            ),
            W,
            X,
            key=jax.random.key(0),
        ),
        "sampled_fisher|DiagonalNormal",
        "rows|shape",
    ),
}


@cases(METRICS)
def test_metrics_refuse(case):
    check(case)


# Likelihoods.

LIKELIHOODS = {
    "zero scale": bad(ValueError, lambda: ng.Normal(0.0), "Normal", "scale", "positive", r"0\.0"),
    "negative scale": bad(ValueError, lambda: ng.Normal(-1.0), "Normal", "scale", "-1"),
    "a scale of which one is zero": bad(
        ValueError, lambda: ng.Normal(jnp.array([1.0, 0.0])), "Normal", "scale"
    ),
    "targets of another length": bad(
        ValueError,
        lambda: CATEGORICAL.log_prob(jnp.ones((4, 3)), LABELS[:3]),
        r"Categorical.log_prob",
        r"\(4,\)",
        r"\(3,\)",
    ),
    "one-hot targets": bad(
        ValueError,
        lambda: CATEGORICAL.log_prob(jnp.ones((4, 3)), jnp.ones((4, 3), jnp.int32)),
        "Categorical.log_prob",
        r"\(4, 3\)",
        r"\(4,\)",
    ),
    "targets with a trailing axis": bad(
        ValueError,
        lambda: NORMAL.log_prob(jnp.ones(4), jnp.ones((4, 1))),
        "Normal.log_prob",
        r"\(4,\)",
        r"\(4, 1\)",
    ),
    "float labels": bad(
        TypeError,
        lambda: CATEGORICAL.log_prob(jnp.ones((4, 3)), jnp.ones(4)),
        "Categorical.log_prob",
        "integer",
        "float32",
    ),
    "heads that do not match": bad(
        ValueError,
        lambda: ng.Joint({"a": NORMAL}).log_prob({"b": jnp.ones(4)}, {"a": jnp.ones(4)}),
        "Joint",
        "'a'",
        "'b'",
    ),
    "a head that is none": bad(TypeError, lambda: ng.Joint([NORMAL, "b"]), "Joint", "Likelihood"),
    "no head": bad(ValueError, lambda: ng.Joint([]), "Joint", "at least one"),
}


@cases(LIKELIHOODS)
def test_likelihoods_refuse(case):
    check(case)


def test_targets_of_another_shape_are_refused_inside_a_metric():
    case = bad(
        ValueError,
        lambda: ng.fisher_matrix(EMPIRICAL, W, (X, LABELS[:, None])),
        "Categorical.log_prob",
        r"\(4, 1\)",
    )
    check(case)


# Pure functions.

PURE = {
    "tangent of another shape": bad(
        ValueError,
        lambda: ng.fisher_vector_product(EXACT, W, X, W.T),
        "fisher_vector_product",
        "tangent",
        r"\(3, 2\)",
        r"\(2, 3\)",
    ),
    "tangent of another structure": bad(
        ValueError,
        lambda: ng.fisher_quadratic_form(EXACT, W, X, [W]),
        "fisher_quadratic_form",
        "tangent",
        "tree",
    ),
    "gradient of another structure": bad(
        ValueError,
        lambda: ng.natural_gradient_direction(EXACT, W, X, {"w": W}),
        "natural_gradient_direction",
        "grads",
        "tree",
    ),
    "gram_matrix of a Hessian": bad(
        ValueError, lambda: ng.gram_matrix(HESSIAN, W, X), "gram_matrix", "hessian", "rows"
    ),
    "gram_matrix of the identity": bad(
        ValueError, lambda: ng.gram_matrix(ng.euclidean(), W, None), "gram_matrix", "euclidean"
    ),
    "score without examples": bad(
        ValueError, lambda: ng.score(lambda w, b: w[0], W, None), "score", "batch"
    ),
    "score of sizes that disagree": bad(
        ValueError, lambda: ng.score(log_prob, W, (X, LABELS[:3])), "score", r"\b4\b", r"\b3\b"
    ),
    "score of integer parameters": bad(
        TypeError, lambda: ng.score(log_prob, LABELS, (X, LABELS)), "score", "int32"
    ),
    "kl_divergence between unlike parameters": bad(
        ValueError,
        lambda: ng.kl_divergence(linear, CATEGORICAL, W, W.T, X),
        "kl_divergence",
        "params_q",
        r"\(3, 2\)",
    ),
    "kl_divergence of params None": bad(
        ValueError,
        lambda: ng.kl_divergence(linear, CATEGORICAL, None, None, X),
        "kl_divergence",
        "None",
    ),
    "kl_divergence of no likelihood": bad(
        TypeError,
        lambda: ng.kl_divergence(linear, "categorical", W, W, X),
        "kl_divergence",
        "Likelihood",
    ),
    "kl_divergence of outputs without leading axis": bad(
        ValueError,
        lambda: ng.kl_divergence(lambda w, x: jnp.sum(w), NORMAL, W, W, X),
        "kl_divergence",
        "leading axis",
    ),
}


@cases(PURE)
def test_pure_functions_refuse(case):
    check(case)


# Solvers and transformations.


def direction(**keywords):
    return lambda: ng.natural_gradient_direction(EXACT, W, X, W, **keywords)


SOLVERS = {
    "unknown solver": bad(
        ValueError, direction(solver="cholesky"), "unknown solver", "'cholesky'", r"cholesky\(\)"
    ),
    "a solver that was not called": bad(
        ValueError, direction(solver=ng.cg), "unknown solver", "cg"
    ),
    "unknown solver of a transformation": bad(
        ValueError,
        lambda: ng.scale_by_natural_gradient(EXACT, solver="kfac"),
        "scale_by_natural_gradient",
        "unknown solver",
        "'kfac'",
    ),
    "negative damping": bad(ValueError, direction(damping=-1.0), "damping", "-1"),
    "negative damping of a transformation": bad(
        ValueError,
        lambda: ng.natural_gradient(0.1, EXACT, damping=-1e-3),
        "natural_gradient",
        "damping",
        r"-0\.001",
    ),
    "no iterations": bad(ValueError, lambda: ng.cg(0), "cg", "max_iterations", "0"),
    "half an iteration": bad(ValueError, lambda: ng.cg(0.5), "cg", "max_iterations"),
    "preconditioner by name": bad(
        ValueError, lambda: ng.cg(preconditioner="diagonal"), "cg", "preconditioner", "diagonal"
    ),
    "preconditioner that is not linear": bad(
        ValueError, lambda: ng.cg(preconditioner=ng.cg()), "cg", "preconditioner"
    ),
    "gain that is no function": bad(
        TypeError, lambda: ng.spectral(0.5), "spectral", "gain", r"0\.5"
    ),
    "rows of a Hessian": bad(
        ValueError,
        lambda: ng.natural_gradient_direction(HESSIAN, W, X, W, solver=ng.woodbury()),
        "natural_gradient_direction",
        "woodbury",
        "hessian",
    ),
    "rows of the identity": bad(
        ValueError,
        lambda: ng.scale_by_natural_gradient(ng.euclidean(), solver=ng.woodbury()),
        "scale_by_natural_gradient",
        "woodbury",
        "euclidean",
    ),
    "rows for a preconditioner of a Hessian": bad(
        ValueError,
        lambda: ng.scale_by_natural_gradient(HESSIAN, solver=ng.cg(preconditioner=ng.woodbury())),
        "scale_by_natural_gradient",
        "cg",
        "hessian",
    ),
    "no radius": bad(
        ValueError, lambda: ng.scale_to_kl(EXACT, 0.0), "scale_to_kl", "positive", "0"
    ),
    "negative radius": bad(
        ValueError, lambda: ng.clip_by_kl(EXACT, -0.1), "clip_by_kl", "positive", r"-0\.1"
    ),
    "negative radius of an alias": bad(
        ValueError, lambda: ng.natural_gradient(0.1, EXACT, max_kl=-1.0), "kl", "positive", "-1"
    ),
    "unknown norm": bad(
        ValueError,
        lambda: ng.scale_by_steepest_descent("l3"),
        "scale_by_steepest_descent",
        "'l3'",
        "'l1'",
        "'l2'",
    ),
    "a key that is none": bad(
        TypeError,
        lambda: ng.scale_by_natural_gradient(SAMPLED, key="seed"),
        "scale_by_natural_gradient",
        "key",
        "'seed'",
    ),
    "a key of floats": bad(
        TypeError, lambda: ng.natural_gradient(0.1, SAMPLED, key=0.5), "natural_gradient", "key"
    ),
}


@cases(SOLVERS)
def test_solvers_and_transformations_refuse(case):
    check(case)


# Values.


@pytest.mark.parametrize("metric", [EXACT, SAMPLED, RESIDUAL], ids=lambda m: m.name)
@pytest.mark.parametrize("solver", [None, ng.cg()], ids=["None", "cg"])
def test_values_never_raise(metric, solver):
    key = jax.random.key(0)
    values = {
        "singular Fisher": (W, jnp.zeros((4, 2)), W),
        "zero gradient": (W, X, 0 * W),
        "NaN gradient": (W, X, jnp.nan * W),
        "NaN parameters": (jnp.nan * W, X, W),
        "infinite data": (W, jnp.inf * X, W),
    }
    for damping in (0.0, 0.1):
        for params, batch, grads in values.values():
            d, _ = ng.natural_gradient_direction(
                metric, params, batch, grads, solver=solver, damping=damping, key=key
            )
            assert d.shape == W.shape


@pytest.mark.parametrize("name", ["scale_to_kl", "clip_by_kl"])
def test_steps_of_no_length_are_left_alone(name):
    for step in (0 * W, W):
        updates, _ = update(name, updates=step, batch=jnp.zeros((4, 2)))
        np.testing.assert_array_equal(updates, step)


def test_hyperparameters_that_are_arrays_are_not_judged():
    d, _ = ng.natural_gradient_direction(EXACT, W, X, W, damping=jnp.asarray(-1.0))
    assert d.shape == W.shape


ROUGH = {
    "a model that is none": bad(
        TypeError, lambda: ng.exact_fisher(None, CATEGORICAL), "exact_fisher", "model", "None"
    ),
    "weights that are an array": bad(
        TypeError,
        lambda: ng.exact_fisher(linear, CATEGORICAL, weights=jnp.ones(4)),
        "exact_fisher",
        "weights must be a function of the batch",
    ),
    "damping that is a word": bad(
        TypeError, lambda: ng.natural_gradient(0.1, EXACT, damping="1e-3"), "damping", "number"
    ),
    "damping that is complex": bad(
        TypeError, lambda: ng.natural_gradient(0.1, EXACT, damping=1j), "damping", "1j"
    ),
    "damping that is no number": bad(
        ValueError, lambda: ng.natural_gradient(0.1, EXACT, damping=float("nan")), "damping", "nan"
    ),
    "momentum that is a word": bad(
        TypeError, lambda: ng.natural_gradient(0.1, EXACT, momentum="a"), "momentum", "number"
    ),
    "a limit that is a word": bad(
        TypeError, lambda: ng.natural_gradient(0.1, EXACT, max_kl="x"), "clip_by_kl", "number"
    ),
    "negative damping at a call": bad(
        ValueError,
        lambda: ng.scale_by_natural_gradient(EXACT).update(
            W, ng.scale_by_natural_gradient(EXACT).init(W), W, batch=X, damping=-3.0
        ),
        "scale_by_natural_gradient",
        "damping must not be negative",
    ),
    "scores of a batch mean": bad(
        ValueError, lambda: ng.score(lambda w, x: jnp.mean(x @ w), W, X), "score", r"\(N,\)"
    ),
}


@pytest.mark.parametrize("name", ROUGH)
def test_rough_input_is_refused(name):
    check(ROUGH[name])

"""P10, P16: wrong arguments are errors at once, and name what is wrong."""

import jax
import jax.numpy as jnp
import optax
import pytest

import natgrad_jax as ng

from . import cases

NEEDS_BATCH = [name for name, case in cases.CASES.items() if case.uses_batch]
WITHOUT_BATCH = [name for name, case in cases.CASES.items() if not case.uses_batch]


def update(name, params, grads, **extra):
    tx = cases.transformation(name)
    return tx.update(grads, tx.init(cases.arrays()[0]), params, **extra)


@pytest.mark.parametrize("name", NEEDS_BATCH)
def test_a_forgotten_batch_is_an_error_that_names_it(name):
    params, grads, _ = cases.arrays()
    with pytest.raises(TypeError, match=r"update\(\) needs the keyword argument `batch`"):
        update(name, params, grads)


@pytest.mark.parametrize("name", NEEDS_BATCH)
def test_a_batch_that_holds_no_arrays_is_an_error_that_names_the_leaf(name):
    params, grads, batch = cases.arrays()
    with pytest.raises(TypeError, match=r"batch\['y'\] must be an array, got str"):
        update(name, params, grads, batch={**batch, "y": "labels"})


@pytest.mark.parametrize("name", NEEDS_BATCH)
def test_missing_parameters_are_an_error_that_names_them(name):
    _, grads, batch = cases.arrays()
    with pytest.raises(ValueError, match="params is None"):
        update(name, None, grads, batch=batch)


@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_steepest_descent_needs_neither(name):
    """It looks at the gradient alone."""
    params, grads, batch = cases.arrays()
    expected = update(name, params, grads, batch=batch)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, update(name, None, grads), expected))


# bool and integer arrays are no complex numbers, but the same branch refuses them.
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
@pytest.mark.parametrize("name", NEEDS_BATCH)
def test_parameters_that_are_not_real_floats_are_an_error_that_names_the_dtype(name, dtype):
    params, grads, batch = cases.arrays()
    params = {**params, "b": params["b"].astype(dtype)}
    with pytest.raises(TypeError, match=rf"params\['b'\] has dtype {dtype}"):
        update(name, params, grads, batch=batch)


@pytest.mark.parametrize("name", [n for n in cases.CASES if n in NEEDS_BATCH])
def test_complex_gradients_are_an_error_that_names_the_dtype(name):
    params, grads, batch = cases.arrays()
    grads = {**grads, "b": grads["b"].astype("complex64")}
    with pytest.raises(TypeError, match="complex64"):
        update(name, params, grads, batch=batch)


@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_steepest_descent_refuses_complex_gradients(name):
    params, grads, _ = cases.arrays()
    grads = {**grads, "b": grads["b"].astype("complex64")}
    with pytest.raises(TypeError, match="complex64"):
        update(name, params, grads)


@pytest.mark.parametrize("name", NEEDS_BATCH)
def test_gradients_unlike_the_parameters_are_an_error_that_names_both(name):
    params, grads, batch = cases.arrays()
    with pytest.raises(ValueError, match=r"updates must be a tree like params"):
        update(name, params, {"b": grads["b"]}, batch=batch)
    with pytest.raises(ValueError, match=r"updates\['b'\] has shape \(3,\).* \(2,\)"):
        update(name, params, {**grads, "b": jnp.ones(3)}, batch=batch)


# `euclidean` does not look at the batch, the loss of `hessian` is the user's own, and residuals of
# `gauss_newton` may come in several sizes.
COUNTS_EXAMPLES = [
    n for n in NEEDS_BATCH if n.split("-")[-1] not in ("euclidean", "hessian", "gauss_newton")
]


@pytest.mark.parametrize("name", COUNTS_EXAMPLES)
def test_leading_axes_that_disagree_are_an_error_with_both_sizes(name):
    params, grads, batch = cases.arrays()
    wrong = {**batch, "y": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match="4.*3"):
        update(name, params, grads, batch=wrong)


BAD_ARGUMENTS = {
    "metric": (
        "scale_by_natural_gradient",
        dict(metric=cases.logits),
        TypeError,
        "metric must come from",
    ),
    "alias_metric": (
        "natural_gradient",
        dict(learning_rate=0.1, metric=None),
        TypeError,
        "metric must come from",
    ),
    "kl_metric": (
        "scale_to_kl",
        dict(metric="exact", kl=0.1),
        TypeError,
        "scale_to_kl: metric must",
    ),
    "solver": (
        "scale_by_natural_gradient",
        dict(metric=cases.METRICS["exact_fisher"], solver="cholesky"),
        ValueError,
        "unknown solver 'cholesky'",
    ),
    "rows_of_hessian": (
        "scale_by_natural_gradient",
        dict(metric=cases.METRICS["hessian"], solver=ng.woodbury()),
        ValueError,
        "woodbury.*hessian",
    ),
    "rows_of_euclidean": (
        "natural_gradient",
        dict(learning_rate=0.1, metric=ng.euclidean(), solver=ng.woodbury()),
        ValueError,
        "woodbury.*euclidean",
    ),
    "damping": (
        "scale_by_natural_gradient",
        dict(metric=ng.euclidean(), damping=-1.0),
        ValueError,
        "damping must not be negative, got -1.0",
    ),
    "key": (
        "scale_by_natural_gradient",
        dict(metric=cases.METRICS["sampled_fisher"], key="seed"),
        TypeError,
        "key must be an int seed or a jax.random key, got 'seed'",
    ),
    "kl": ("scale_to_kl", dict(metric=ng.euclidean(), kl=0.0), ValueError, "positive, got 0.0"),
    "max_kl": (
        "clip_by_kl",
        dict(metric=ng.euclidean(), max_kl=-1),
        ValueError,
        "positive, got -1",
    ),
    "alias_max_kl": (
        "natural_gradient",
        dict(learning_rate=0.1, metric=ng.euclidean(), max_kl=0),
        ValueError,
        "positive, got 0",
    ),
    "norm": (
        "scale_by_steepest_descent",
        dict(norm="linf"),
        ValueError,
        "unknown norm 'linf'.*'l1' or 'l2'",
    ),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_what_is_wrong_at_construction_is_said_there(bad):
    factory, arguments, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error, match=message):
        getattr(ng, factory)(**arguments)


def test_hidden_parameters_without_the_full_ones_are_an_error_that_names_the_keyword():
    params, grads, batch = cases.arrays()
    tx = optax.masked(
        cases.transformation("scale_by_natural_gradient-automatic"), {"b": False, "w": True}
    )
    with pytest.raises(ValueError, match="full_params=params"):
        tx.update(grads, tx.init(params), params, batch=batch)

"""Mistakes that a new user makes: the message names the call, what it got and what it needs."""

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

CATEGORICAL = ng.Categorical()
W, X, LABELS = jnp.ones((2, 3)), jnp.ones((4, 2)), jnp.zeros(4, jnp.int32)
BATCH = {"x": X, "y": LABELS}


def model(w, batch):
    return batch["x"] @ w


def loss(w, batch):
    return -jnp.mean(CATEGORICAL.log_prob(model(w, batch), batch["y"]))


EXACT = ng.exact_fisher(model, CATEGORICAL)
SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)


class Mistake(NamedTuple):
    """A call, the same done right, the type of the error, and what the message holds."""

    call: Callable[[], object]
    right: Callable[[], object]
    error: type[Exception]
    patterns: tuple[str, ...]


def mistake(error, call, right, *patterns):
    return Mistake(call, right, error, patterns)


TRANSFORMATIONS = {
    "scale_by_natural_gradient": ng.scale_by_natural_gradient(EXACT),
    "natural_gradient": ng.natural_gradient(0.1, EXACT, max_kl=0.1),
    "trpo": ng.trpo(EXACT),
    "clip_by_kl": ng.clip_by_kl(EXACT, 0.1),
    "scale_to_kl": ng.scale_to_kl(EXACT, 0.1),
    "scale_by_quadratic_model": ng.scale_by_quadratic_model(EXACT),
    "scale_by_kl_line_search": ng.scale_by_kl_line_search(EXACT),
    "levenberg_marquardt": ng.levenberg_marquardt(ng.natural_gradient(1.0, EXACT), EXACT),
    "adaptive_natural_gradient": ng.adaptive_natural_gradient(EXACT),
}
# What an alias is made of may be what its messages name.
NAMES = {"adaptive_natural_gradient": "adaptive_natural_gradient|levenberg_marquardt"}


def update(tx, *args, params=W, state=None, **keywords):
    state = tx.init(params) if state is None else state
    return tx.update(params, state, params, *args, grad=params, value_fn=loss, **keywords)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_batch_by_position_is_named(name):
    tx = TRANSFORMATIONS[name]
    with pytest.raises(TypeError) as caught:
        tx.update(W, tx.init(W), W, BATCH)
    named = NAMES.get(name, name)
    pattern = rf"({named}): update\(\) takes .*1 more; pass the batch by name.*batch=batch"
    assert re.search(pattern, str(caught.value))
    # By name it is no error.
    jax.eval_shape(lambda: update(tx, batch=BATCH)[0])


INTEGERS = {"w": W, "steps": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_an_integer_leaf_is_named_at_init(name):
    tx = TRANSFORMATIONS[name]
    with pytest.raises(TypeError, match=r"init\(\): params\['steps'\] has dtype int32; natural"):
        tx.init(INTEGERS)
    optax.masked(tx, {"w": True, "steps": False}).init(INTEGERS)
    tx.init(jax.eval_shape(lambda: W))


def limited(**keywords):
    return ng.natural_gradient(0.1, EXACT, **keywords)


def direction(metric=EXACT, batch=BATCH, **keywords):
    return ng.natural_gradient_direction(metric, W, batch, W, **keywords)


def of_solver(solver):
    return ng.scale_by_natural_gradient(EXACT, solver=solver)


def weighted(sign):
    return ng.exact_fisher(
        model, CATEGORICAL, weights=lambda batch: sign * jnp.arange(4.0) + 1 * (sign > 0)
    )


RESIDUAL = ng.gauss_newton(lambda w, batch: model(w, batch))
EMPTY = {"x": X[:0], "y": LABELS[:0]}
MISTAKES = {
    "a schedule of max_kl": mistake(
        TypeError,
        lambda: limited(max_kl=SCHEDULE),
        lambda: update(
            optax.inject_hyperparams(ng.natural_gradient)(0.1, EXACT, max_kl=SCHEDULE), batch=BATCH
        ),
        "natural_gradient: max_kl",
        "schedule",
        "optax.inject_hyperparams",
    ),
    "a schedule of weight decay": mistake(
        TypeError,
        lambda: limited(weight_decay=SCHEDULE),
        lambda: limited(weight_decay=0.1),
        "natural_gradient: weight_decay",
        "optax.inject_hyperparams",
    ),
    "a schedule of a radius": mistake(
        TypeError,
        lambda: ng.clip_by_kl(EXACT, SCHEDULE),
        lambda: update(
            optax.inject_hyperparams(ng.clip_by_kl)(EXACT, max_kl=SCHEDULE), batch=BATCH
        ),
        "clip_by_kl",
        "optax.inject_hyperparams",
    ),
    "a schedule of a trust region": mistake(
        TypeError,
        lambda: ng.trpo(EXACT, max_kl=SCHEDULE),
        lambda: ng.trpo(EXACT, damping=SCHEDULE),
        "trpo: max_kl",
        "optax.inject_hyperparams",
    ),
    "a schedule of first damping": mistake(
        TypeError,
        lambda: ng.adaptive_natural_gradient(EXACT, initial_damping=SCHEDULE),
        lambda: ng.adaptive_natural_gradient(EXACT, initial_damping=0.1),
        "adaptive_natural_gradient: initial_damping",
        "optax.inject_hyperparams",
    ),
    "a schedule for one direction": mistake(
        TypeError,
        lambda: direction(damping=SCHEDULE),
        lambda: direction(damping=SCHEDULE(3)),
        "natural_gradient_direction: damping",
        r"schedule\(step\)",
    ),
    "a batch that is a tuple": mistake(
        TypeError,
        lambda: update(limited(), batch=(X, LABELS)),
        lambda: update(limited(), batch=BATCH),
        r"exact_fisher: model\(params, batch\)",
        "tuple indices must be integers",
        r"a batch of \(\(4, 2\), \(4,\)\)",
    ),
    "a batch without what is asked for": mistake(
        ValueError,
        lambda: update(limited(), batch={"images": X}),
        lambda: update(limited(), batch=BATCH),
        r"exact_fisher: model\(params, batch\)",
        "KeyError: 'x'",
        r"a batch of {'images': \(4, 2\)}",
    ),
    "a batch that is too short": mistake(
        ValueError,
        lambda: direction(ng.gauss_newton(lambda w, b: b[1] @ w), (X,)),
        lambda: direction(ng.gauss_newton(lambda w, b: b[1] @ w), (X, X)),
        r"gauss_newton: residual\(params, batch\)",
        "IndexError",
        r"a batch of \(\(4, 2\),\)",
    ),
    "a batch that is none": mistake(
        TypeError,
        lambda: direction(batch=None),
        direction,
        r"exact_fisher: model\(params, batch\)",
        "'NoneType' object is not subscriptable",
        "a batch of None",
    ),
    "an empty batch": mistake(
        ValueError,
        lambda: update(limited(), batch=EMPTY),
        lambda: update(limited(), batch=BATCH),
        "exact_fisher: the batch is empty",
        r"\(0, 2\)",
        "batch_axes=None",
    ),
    "an empty batch of a pure function": mistake(
        ValueError,
        lambda: ng.fisher_matrix(RESIDUAL, W, EMPTY),
        lambda: ng.fisher_matrix(RESIDUAL, W, BATCH),
        "gauss_newton: the batch is empty",
    ),
    "a state of kfac given to ekfac": mistake(
        TypeError,
        lambda: update(
            of_solver(ng.ekfac(BATCH)), state=of_solver(ng.kfac(BATCH)).init(W), batch=BATCH
        ),
        lambda: update(of_solver(ng.ekfac(BATCH)), batch=BATCH),
        "scale_by_natural_gradient: the state was made by another solver",
        "ekfac keeps a EKFACState, got a KFACState",
        "`init`",
    ),
    "a state of ekfac given to cg": mistake(
        TypeError,
        lambda: update(of_solver(ng.cg()), state=of_solver(ng.ekfac(BATCH)).init(W), batch=BATCH),
        lambda: update(of_solver(ng.cg()), batch=BATCH),
        "cg keeps a CGState, got a EKFACState",
    ),
    "a state of cg given to cholesky": mistake(
        TypeError,
        lambda: update(of_solver(ng.cholesky()), state=of_solver(ng.cg()).init(W), batch=BATCH),
        lambda: update(of_solver(ng.cholesky()), batch=BATCH),
        "cholesky keeps none, got a CGState",
    ),
    "kfac without an example": mistake(
        TypeError,
        lambda: of_solver(ng.kfac(None)).init(W),
        lambda: of_solver(ng.kfac(BATCH)).init(W),
        "kfac: example_batch is None",
        "pass a batch as `update` will see",
    ),
    "ekfac of an empty tree": mistake(
        TypeError,
        lambda: of_solver(ng.ekfac({})).init(W),
        lambda: of_solver(ng.ekfac(BATCH)).init(W),
        "ekfac: example_batch is {}",
    ),
    "negative weights": mistake(
        ValueError,
        lambda: update(ng.natural_gradient(0.1, weighted(-1)), batch=BATCH),
        lambda: update(ng.natural_gradient(0.1, weighted(1)), batch=BATCH),
        "scale_by_natural_gradient: weights",
        "must not be negative, got -3",
    ),
    "negative weights of one direction": mistake(
        ValueError,
        lambda: direction(weighted(-1)),
        lambda: direction(weighted(1)),
        "natural_gradient_direction: weights",
        "negative",
    ),
    "negative weights of a matrix": mistake(
        ValueError,
        lambda: ng.fisher_matrix(weighted(-1), W, BATCH),
        lambda: ng.fisher_matrix(weighted(1), W, BATCH),
        "fisher_matrix: weights",
        "negative",
    ),
    "a direction inside levenberg_marquardt": mistake(
        ValueError,
        lambda: ng.levenberg_marquardt(of_solver(None), EXACT).init(W),
        lambda: ng.levenberg_marquardt(optax.chain(of_solver(None), optax.scale(-1.0)), EXACT).init(
            W
        ),
        "levenberg_marquardt: inner gives a direction of the gradient's sign",
        r"optax.scale\(-1.0\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    case = MISTAKES[name]
    with pytest.raises(case.error) as caught:
        case.call()
    for pattern in case.patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} not in {caught.value}"


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_message_asks_for_is_no_mistake(name):
    MISTAKES[name].right()


def signed(sign):
    """Steps of a least-squares problem inside `levenberg_marquardt`, with either sign."""
    inner = optax.chain(ng.scale_by_natural_gradient(RESIDUAL), optax.scale(sign * 0.5))
    return ng.levenberg_marquardt(inner, RESIDUAL)


def square(w, batch):
    return 0.5 * jnp.mean(jnp.sum(model(w, batch) ** 2, axis=1))


def stepped(sign):
    tx, grads = signed(sign), jax.grad(square)(W, BATCH)
    step = lambda state: tx.update(grads, state, W, batch=BATCH, value_fn=square)[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = step(step(tx.init(W)))
        return [str(w.message) for w in caught], state, jax.jit(step)(state)


def test_a_forgotten_sign_inside_levenberg_marquardt_is_named_once():
    (message,), state, compiled = stepped(1.0)
    assert "levenberg_marquardt: the step of `inner` points uphill" in message
    assert "optax.scale(-1.0)" in message
    # Within a compiled step the info tells.
    for after in (state, compiled):
        assert bool(after.info.rejected)
        assert "an increase: does the step point uphill?" in str(ng.info(after))


def test_a_sign_turned_by_the_user_is_no_mistake():
    inner = ng.scale_by_natural_gradient(EXACT)

    def update(*args, **keywords):
        direction, state = inner.update(*args, **keywords)
        return jax.tree.map(jnp.negative, direction), state

    turned = optax.GradientTransformationExtraArgs(inner.init, update)
    ng.levenberg_marquardt(turned, EXACT).init(W)


def test_the_right_sign_is_no_news():
    messages, state, _ = stepped(-1.0)
    assert messages == []
    assert not state.info.rejected
    assert "uphill" not in str(ng.info(state))


def test_errors_of_jax_itself_are_left_alone():
    """A model that asks for a value of what is traced gets JAX's own error, and its advice."""
    metric = ng.exact_fisher(lambda w, batch: model(w, batch) if w[0, 0] > 0 else None, CATEGORICAL)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        direction(metric)


def test_weights_that_are_traced_are_not_judged():
    step = lambda batch: direction(weighted(-1), batch)[0]
    assert jax.eval_shape(step, BATCH).shape == np.shape(W)

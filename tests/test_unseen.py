"""Parameters that no output depends on are named once, in `explain` and in a warning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

X = np.random.default_rng(0).normal(size=(8, 3))
PARAMS = {"policy": np.ones((3, 2)), "value": np.full((3, 1), 0.5)}
LIKELIHOOD = ng.Categorical()
SOLVERS = {
    "None": None,
    "cholesky": ng.cholesky(),
    "woodbury": ng.woodbury(),
    "spectral": ng.spectral(),
    "cg": ng.cg(),
    "kfac": ng.kfac(X, damping_split="exact", decay=0.0),
    "ekfac": ng.ekfac(X, decay=0.0),
    "diagonal": ng.diagonal(),
    "block_diagonal": ng.block_diagonal(),
}


@jax.jit
def both(params, x):
    """Policy and value, of one compiled function."""
    return x @ params["policy"], x @ params["value"]


def policy(params, x):
    return both(params, x)[0]


def metric():
    """A new one, of which nothing was said yet."""
    return ng.exact_fisher(policy, LIKELIHOOD)


def loss(params, x):
    logits, value = both(params, x)
    labels = jnp.arange(len(x)) % 2
    return -jnp.mean(LIKELIHOOD.log_prob(logits, labels)) + jnp.mean((value - 1) ** 2)


def said(call):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def update(tx, params=PARAMS, **keywords):
    params = jax.tree.map(jnp.asarray, params)
    return lambda: tx.update(params, tx.init(params), params, batch=X, **keywords)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_share_of_the_gradient_that_f_does_not_see_is_told(name, x64):
    """Of the direction, for exact solvers; of g^T d for those that approximate."""
    grads = jax.grad(loss)(PARAMS, X)
    call = lambda: ng.natural_gradient_direction(
        metric(), PARAMS, X, grads, solver=SOLVERS[name], damping=0.1
    )
    with pytest.warns(UserWarning, match=r"\['value'\]"):
        d, info = call()
    np.testing.assert_allclose(d["value"], 10 * np.asarray(grads["value"]), rtol=1e-5)
    outside, total = (
        sum(float(jnp.sum(a * b)) for a, b in pairs)
        for pairs in (
            [(d["value"], d["value"])],
            [(d["value"], d["value"]), (d["policy"], d["policy"])],
        )
    )
    if SOLVERS[name] is not None and SOLVERS[name].approximates:
        outside, total = (
            float(jnp.sum(d["value"] * grads["value"])),
            sum(float(jnp.sum(d[k] * grads[k])) for k in d),
        )
    np.testing.assert_allclose(info.outside_row_space, np.sqrt(outside / total), rtol=1e-3)


ONCE = {
    "eager": lambda tx: update(tx),
    "compiled": lambda tx: lambda: jax.jit(lambda: update(tx)())(),
}


@pytest.mark.parametrize("how", ONCE)
def test_they_are_named_once(how, x64):
    tx = ng.natural_gradient(0.1, metric())
    (message,) = said(ONCE[how](tx))
    assert "exact_fisher: no output depends on the parameters ['value']" in message
    assert "optax.partition" in message
    assert said(ONCE[how](tx)) == said(update(tx)) == []


def test_explain_names_them(x64):
    report = ng.explain(metric(), PARAMS, X)
    assert report.unseen == ("['value']",)
    assert [(leaf.path, leaf.form) for leaf in report.leaves] == [
        ("['policy']", "factored"),
        ("['value']", "none"),
    ]
    assert "no output depends on ['value']: F is zero there" in str(report)
    assert (
        ng.explain(ng.exact_fisher(both, ng.Joint((LIKELIHOOD, ng.Normal()))), PARAMS, X).unseen
        == ()
    )


def loop(params, x):
    step = lambda h, w: (h @ w, None)
    return jax.lax.scan(step, x, params["layers"])[0]


#: Models that see all of their parameters, or leave some out on purpose.
SILENT = {
    "all are used": (both, ng.Joint((LIKELIHOOD, ng.Normal())), PARAMS),
    "frozen": (
        lambda p, x: x @ p["policy"] + jax.lax.stop_gradient(x @ p["value"]),
        LIKELIHOOD,
        PARAMS,
    ),
    "in a loop": (loop, ng.Normal(), {"layers": np.ones((2, 3, 3))}),
    "by a branch": (
        lambda p, x: jax.lax.cond(p["value"][0, 0] > 0, lambda: x @ p["policy"], lambda: x[:, :2]),
        LIKELIHOOD,
        PARAMS,
    ),
    "of no entries": (
        lambda p, x: x @ p["policy"],
        LIKELIHOOD,
        {"policy": PARAMS["policy"], "none": np.zeros((0, 3))},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_where_all_are_seen_or_frozen_on_purpose(name, x64):
    model, likelihood, params = SILENT[name]
    tx = ng.scale_by_natural_gradient(ng.exact_fisher(model, likelihood), damping=0.1)
    assert said(update(tx, params)) == []


def test_partition_is_the_remedy(x64):
    """As the docs of `trpo` show: the policy moves as far as it may, the value head learns."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    grads = jax.grad(loss)(params, X)

    def step(tx):
        updates, _ = tx.update(
            grads, tx.init(params), params, batch=X, value_fn=loss, full_params=params
        )
        moved = optax.apply_updates(params, updates)
        return updates, float(ng.kl_divergence(policy, LIKELIHOOD, params, moved, X))

    alone = ng.trpo(metric(), max_kl=1e-2)
    labels = {"policy": "policy", "value": "value"}
    parted = optax.partition({"policy": alone, "value": optax.sgd(0.1)}, labels)
    results = []
    assert said(lambda: results.append(step(parted))) == []
    updates, kl = results[0]
    assert 0.5e-2 < kl <= 1e-2
    np.testing.assert_allclose(updates["value"], -0.1 * grads["value"])
    # The control: in one tree the head, undamped by any curvature, takes the step.
    assert len(said(lambda: results.append(step(ng.trpo(metric(), max_kl=1e-2))))) == 1
    assert results[1][1] < 1e-3

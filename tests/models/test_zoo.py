"""J1 and J4 for every model of the zoo, and what `explain` says of it."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import convolutions as convolutions
from tests.models import exotic as exotic
from tests.models import exotic_control as exotic_control
from tests.models import frameworks as frameworks
from tests.models import oracle
from tests.models import plain as plain
from tests.models.zoo import SPECIMENS

# The runs on the oldest and the newest JAX do without haiku.
if importlib.util.find_spec("haiku"):
    from tests.models import haiku_nets as haiku_nets

pytestmark = pytest.mark.usefixtures("standard_promotion")
specimens = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)


def made(specimen, dtype):
    function, params, batch = specimen.make(jax.random.key(1))
    return function, oracle.at_dtype(params, dtype), oracle.at_dtype(batch, dtype)


def agrees(specimen, dtype, rtol):
    function, params, batch = made(specimen, dtype)
    v = oracle.draw_like(params, 0)

    def everything(params, batch, v, u):
        rows = oracle.gauss_newton_rows(function, params, batch)
        return rows, oracle.engine_results(function, params, batch, v, u)

    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(function, params, batch)))
    u = jnp.asarray(np.random.default_rng(1).normal(size=count), dtype)
    (rows, results), warned = oracle.quietly(oracle.compiled, everything, params, batch, v, u)
    rows = np.asarray(rows, np.float64)
    oracle.assert_same(results, oracle.expected_results(rows, params, v, u), rtol)
    assert bool(warned) == specimen.mixes


def test_the_zoo_holds_sixty_models_with_a_reason_each():
    names = [specimen.name for specimen in SPECIMENS]
    assert len(names) == len(set(names)) >= 60
    assert all(specimen.reason for specimen in SPECIMENS)


@pytest.mark.parametrize("specimen", [s for s in SPECIMENS if not s.single], ids=lambda s: s.name)
def test_j1_factored_rows_are_the_dense_ones(specimen, x64):
    agrees(specimen, jnp.float64, 1e-10)


def some_on_every_version():
    """Every third, and those that know no other type; every fifth on all versions of JAX."""
    smoke = lambda i: [pytest.mark.smoke] if i % 5 == 0 else []
    return [
        pytest.param(s, id=s.name, marks=smoke(i))
        for i, s in enumerate(SPECIMENS)
        if s.single or i % 3 == 0 or i % 5 == 0
    ]


@pytest.mark.parametrize("specimen", some_on_every_version())
def test_j1_in_float32(specimen):
    agrees(specimen, jnp.float32, 1e-4)


@specimens
def test_explain_accounts_for_every_parameter(specimen):
    function, params, batch = made(specimen, jnp.float32)
    report = ng.explain(ng.gauss_newton(function), params, batch)
    assert report.mode == ("whole" if specimen.mixes or batch is None else "examples")
    assert bool(report.reason) == specimen.mixes
    assert report.parameters == sum(x.size for x in jax.tree.leaves(params))
    dense = [leaf for leaf in report.leaves if leaf.form == "dense"]
    assert all(leaf.reason for leaf in dense)
    unexpected = [leaf for leaf in dense if not any(f"'{d}'" in leaf.path for d in specimen.dense)]
    assert not unexpected, str(report)
    assert str(report).count("\n") == len(report.leaves) + 2


@pytest.mark.parametrize(
    "specimen",
    SPECIMENS if os.environ.get("NATGRAD_FUZZ") else SPECIMENS[::6],
    ids=lambda s: s.name,
)
def test_the_certificate_holds(specimen):
    function, params, batch = made(specimen, jnp.float32)
    found, _ = oracle.quietly(ng.verify, ng.gauss_newton(function), params, batch)
    assert found.ok, str(found)


def test_nine_weight_matrices_in_ten_are_factored():
    dense = total = 0
    for specimen in SPECIMENS:
        function, params, batch = made(specimen, jnp.float32)
        report = ng.explain(ng.gauss_newton(function), params, batch)
        weights = [leaf for leaf in report.leaves if len(leaf.shape) >= 2]
        total += len(weights)
        dense += sum(leaf.form == "dense" for leaf in weights)
    print(f"{total - dense} of {total} weight matrices and kernels are factored")
    assert total > 100
    assert dense <= 0.1 * total


@pytest.mark.parametrize(
    "specimen", [s for s in SPECIMENS if not s.mixes][::4], ids=lambda s: s.name
)
def test_j4_score_norms_are_the_norms_of_scores(specimen, x64):
    function, params, batch = made(specimen, jnp.float64)
    if batch is None:
        pytest.skip("no examples")

    def log_prob(p, b):
        outputs = jax.tree.leaves(function(p, b))
        n = jax.tree.leaves(b)[0].shape[0]
        return -sum(jnp.sum(z.reshape(n, -1) ** 2, axis=1) for z in outputs)

    scores = oracle.compiled(jax.jacrev(lambda p: log_prob(p, batch)), params)
    expected = sum(
        np.sum(np.asarray(x).reshape(x.shape[0], -1) ** 2, axis=1) for x in jax.tree.leaves(scores)
    )
    norms = oracle.compiled(lambda p, b: ng.score_norms(log_prob, p, b), params, batch)
    np.testing.assert_allclose(norms**2, expected, rtol=1e-9, atol=1e-12)

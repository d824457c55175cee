"""K1 to K4: the certificate holds for right rows, and fails where a row is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax.jacobian import parts

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return {"w": draw(4, 3), "b": draw(3), "v": draw(3, 2)}, draw(6, 4)


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def centered(p, x):
    z = network(p, x)
    return z - z.mean(0)


METRICS = {
    "gauss_newton": ng.gauss_newton(network),
    "weighted": ng.gauss_newton(network, weights=lambda x: jnp.arange(6.0)),
    "exact": ng.exact_fisher(network, ng.Categorical()),
    "sampled": ng.sampled_fisher(network, ng.Bernoulli(), num_samples=2),
    "empirical": ng.empirical_fisher(lambda p, x: network(p, x).sum(1)),
    "centred": ng.empirical_fisher(lambda p, x: network(p, x).sum(1), centered=True),
    "mixing": ng.gauss_newton(centered),
    "complex": ng.gauss_newton(lambda p, x: jnp.abs(network(p, x) * (1 + 2j * p["b"][:2]))),
}


@pytest.mark.filterwarnings("ignore:gauss_newton. cannot show:UserWarning")
@pytest.mark.parametrize("name", METRICS)
def test_right_rows_are_verified(name):
    found = ng.verify(METRICS[name], *arguments(), key=jax.random.key(3))
    assert found.ok, str(found)
    assert max(found.products, found.rows, found.symmetry) < 1e-13
    assert (found.examples is None) == (name == "mixing")
    assert str(found).startswith("verified")


def test_control_a_leaf_whose_rows_are_zero_is_found(monkeypatch):
    real = parts.site_parts
    drop = lambda entry: entry._replace(part=jax.tree.map(jnp.zeros_like, entry.part))
    monkeypatch.setattr(
        parts,
        "site_parts",
        lambda *args: [drop(e) if e.place.leaf == 1 else e for e in real(*args)],
    )
    found = ng.verify(ng.gauss_newton(lambda p, x: network(p, x)), *arguments())
    assert not found.ok
    assert found.products > 1e-2 and found.rows > 1e-2
    assert "too large" in str(found)


def test_control_a_false_claim_of_independence_is_found():
    found = ng.verify(ng.gauss_newton(centered, independent=True), *arguments())
    assert not found.ok
    assert min(found.products, found.examples, found.alone) > 1e-2


def test_a_true_claim_is_verified():
    found = ng.verify(ng.gauss_newton(network, independent=True), *arguments())
    assert found.ok and found.alone < 1e-13


def test_numbers_that_are_not_finite_are_not_verified():
    p, x = arguments()
    found = ng.verify(ng.gauss_newton(network), p | {"b": p["b"] * jnp.inf}, x * jnp.nan)
    assert not found.ok and not found.finite


def test_tolerance_is_that_of_the_coarsest_type_in_the_model():
    p, x = arguments()
    half = lambda p, x: network(
        jax.tree.map(lambda a: a.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)
    )
    found = ng.verify(ng.gauss_newton(half), p, x)
    assert found.ok, str(found)
    assert found.tolerance == pytest.approx(2**-3.5)


def test_a_metric_without_rows_is_an_error():
    with pytest.raises(ValueError, match="verify: the metric hessian has no rows"):
        ng.verify(ng.hessian(lambda p, x: jnp.sum(network(p, x))), *arguments())

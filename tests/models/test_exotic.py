"""Small shapes and small numbers, which the zoo's one tolerance and one size do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import exact
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion")


def in_bfloat16(p, x):
    """A layer in half precision, its parameters, sums and outputs in float32."""
    half = lambda z: z.astype(jnp.bfloat16)
    h = jnp.tanh(half(x) @ half(p["w"]) + half(p["b"]))
    return (h @ half(p["v"])).astype(jnp.float32)


def rounded_before_the_head(p, x):
    h = jax.nn.gelu(x @ p["w"] + p["b"]).astype(jnp.bfloat16)
    return jnp.dot(h, p["v"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@pytest.mark.smoke
@pytest.mark.parametrize("model", [in_bfloat16, rounded_before_the_head], ids=lambda f: f.__name__)
def test_layers_in_bfloat16_have_rows_to_their_rounding(model):
    p = oracle.at_dtype(
        jax.tree.map(jnp.asarray, exact.normals(0, w=(4, 6), b=6, v=(6, 2))), "float32"
    )
    x = jnp.asarray(exact.normals(1, x=(5, 4))["x"], jnp.float32)
    metric = ng.gauss_newton(model)
    found, warned = oracle.quietly(ng.fisher_matrix, metric, p, x)
    exact.assert_close(found, exact.fisher_of(model, p, x), "fisher", 2e-2)
    assert not warned
    report = ng.explain(metric, p, x)
    assert {leaf.path: leaf.form for leaf in report.leaves} == {
        "['b']": "rows",
        "['v']": "factored",
        "['w']": "factored",
    }, str(report)


def layer(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


SHAPES = {
    "plain": layer,
    "mean over the one": lambda p, x: layer(p, x) - 0.5 * layer(p, x).mean(0),
    "vmap": lambda p, x: jax.vmap(lambda x: layer(p, x))(x),
    "map": lambda p, x: jax.lax.map(lambda x: layer(p, x), x),
    "squeezed": lambda p, x: layer(p, x[0])[None],
    "fourier": lambda p, x: jnp.fft.irfft(
        jnp.fft.rfft(layer(p, x)) * jnp.exp(1j * p["b"][:2]), n=2
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SHAPES)
def test_a_batch_of_one_row_is_exact_and_hears_nothing(name, x64):
    p, x = exact.normals(0, w=(4, 3), b=3, v=(3, 2)), exact.normals(1, x=(1, 4))["x"]
    exact.assert_exact(SHAPES[name], p, x, mode=None)
    _, warned = oracle.quietly(ng.fisher_matrix, ng.gauss_newton(SHAPES[name]), p, x)
    assert not warned


@pytest.mark.parametrize("name", ["plain", "vmap", "map"])
def test_one_output_and_one_parameter_are_exact(name, x64):
    p, x = exact.normals(0, w=(1, 1), b=1, v=(1, 1)), exact.normals(1, x=(4, 1))["x"]
    exact.assert_exact(SHAPES[name], p, x)


def test_fixed_integers_beside_the_parameters_change_nothing(x64):
    """Tables of places, as part of the batch."""
    p = exact.normals(0, w=(4, 3), b=3, v=(3, 2))
    rng = np.random.default_rng(1)
    batch = {
        "x": rng.normal(size=(5, 4)),
        "order": np.stack([rng.permutation(4) for _ in range(5)]),
    }
    model = lambda p, b: layer(p, jnp.take_along_axis(b["x"], b["order"], axis=1))
    exact.assert_exact(model, p, batch)

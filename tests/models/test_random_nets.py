"""Random small nets composed of linear uses, against dense rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import natgrad_jax as ng
from tests.models import oracle

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
T, D = 3, 2  # positions and features of every hidden value (N, T, D)


def dense(w, x):
    return jnp.einsum("ntd,dk->ntk", x, w["m"])


def dense_left(w, x):
    return jnp.swapaxes(w["m"].T @ jnp.swapaxes(x, 1, 2), 1, 2)


def merged(w, x):
    return (x.reshape(-1, D) @ w["m"]).reshape(x.shape)


def across_positions(w, x):
    return jnp.einsum("ntd,ts->nsd", x, w["t"])


def scale_and_shift(w, x):
    return x * w["v"] + w["m"][0]


def position_bias(w, x):
    return x + w["t"][:, :D]


def convolution(w, x):
    return lax.conv_general_dilated(
        x, w["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


def recurrence(w, x):
    step = lambda h, x: ((h := jnp.tanh(h @ w["m"] + x)), h)
    return lax.scan(step, jnp.zeros((x.shape[0], D)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def residual(w, x):
    return x + jnp.tanh(x @ w["m"].T)


def nonlinearity(w, x):
    return jnp.tanh(x)


def gate(w, x):
    return x * jax.nn.sigmoid(x @ w["m"])


def checkpointed(w, x):
    return jax.checkpoint(dense)(w, x)


LAYERS = [
    dense,
    dense_left,
    merged,
    across_positions,
    scale_and_shift,
    position_bias,
    convolution,
    recurrence,
    residual,
    nonlinearity,
    gate,
    checkpointed,
]


@hypothesis.settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=True,
)
@hypothesis.given(
    layers=st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(0, 1)), min_size=1, max_size=5),
    pool=st.booleans(),
)
def test_random_compositions_have_the_rows_of_reverse_mode(layers, pool):
    """Layers share two sets of weights, so that most parameters have several uses."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    weights = lambda: {"m": draw(D, D), "t": draw(T, T), "v": draw(D), "k": draw(2, D, D)}
    params, x = [weights(), weights()], draw(4, T, D)

    def model(p, x):
        for layer, which in layers:
            x = layer(p[which], x)
        return x.mean(1) if pool else x.reshape(x.shape[0], -1)

    v = oracle.draw_like(params, 1)
    outputs = 4 * D * (1 if pool else T)
    u = draw(outputs)

    def everything(params, x, v, u):
        rows = oracle.gauss_newton_rows(model, params, x)
        return rows, oracle.engine_results(model, params, x, v, u)

    rows, results = oracle.compiled(everything, params, x, v, u)
    expected = oracle.expected_results(np.asarray(rows), params, v, u)
    oracle.assert_same(results, expected, 1e-10)


def test_a_net_of_all_layers_is_verified():
    rng = np.random.default_rng(0)
    draw = lambda *shape: 0.5 * jnp.asarray(rng.normal(size=shape))
    params, x = {"m": draw(D, D), "t": draw(T, T), "v": draw(D), "k": draw(2, D, D)}, draw(4, T, D)

    def model(p, x):
        for layer in LAYERS:
            x = layer(p, x)
        return x.reshape(x.shape[0], -1)

    found = ng.verify(ng.gauss_newton(model), params, x)
    assert found.ok, str(found)

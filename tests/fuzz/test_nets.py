"""Random nets with complex values, references, loops, branches and rules of their own."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.fuzz import checks
from tests.fuzz import layers

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
COUNT = int(os.environ.get("NATGRAD_FUZZ", "0"))
N = 4
nets = st.lists(
    st.tuples(st.sampled_from(layers.LAYERS), st.integers(0, 1)), min_size=1, max_size=4
)


def _settings(few):
    phases = list(hypothesis.Phase)
    if not COUNT:  # to shrink a net is to compile hundreds
        phases.remove(hypothesis.Phase.shrink)
    return hypothesis.settings(
        max_examples=max(few, COUNT),
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=not COUNT,
        database=None,
        phases=phases,
    )


def _drawn(rng, shape):
    return jnp.asarray(rng.uniform(0.2, 0.9, shape) * rng.choice([-1, 1], shape))


def _points(is_complex):
    """Two sets of weights, a batch, and another batch."""
    rng = np.random.default_rng(0)
    weights = lambda: {name: _drawn(rng, shape) for name, shape in layers.shapes().items()}
    batch = lambda: [_drawn(rng, (N, layers.T, layers.D)) for _ in range(1 + is_complex)]
    return [weights(), weights()], batch(), batch()


def _model(net, pool, change=lambda x: x):
    def model(p, batch):
        x = change(batch[0] if len(batch) == 1 else lax.complex(*batch))
        for layer, which in net:
            x = layer(p[which], x)
        x = x.mean(1) if pool else x.reshape(x.shape[0], -1)
        return jnp.concatenate([x.real, x.imag], axis=1) if jnp.iscomplexobj(x) else x

    return model


@_settings(12)
@hypothesis.given(net=nets, is_complex=st.booleans(), pool=st.booleans())
def test_random_nets_have_the_rows_of_reverse_mode(net, is_complex, pool):
    """Layers share two sets of weights, so that most parameters have several uses."""
    params, batch, other = _points(is_complex)
    checks.check(_model(net, pool), params, batch, 1e-9, other)


@_settings(12)
@hypothesis.given(net=nets, is_complex=st.booleans())
def test_a_mean_over_the_examples_is_found_before_a_random_net(net, is_complex):
    params, batch, _ = _points(is_complex)
    mixed = _model(net, True, lambda x: x + x.mean(0, keepdims=True))
    checks.mixing_is_found(mixed, params, batch)


def _alone():
    """(layer, whether its values are complex): one kind of each layer, or both."""
    kinds = [(layer, kind) for layer in layers.LAYERS for kind in (False, True)]
    chosen = kinds if COUNT else [pair for i, pair in enumerate(kinds) if i % 4 in (0, 3)]
    return [
        pytest.param(*pair, id=f"{pair[0].__name__}-{'complex' if pair[1] else 'real'}")
        for pair in chosen
    ]


@pytest.mark.parametrize(("layer", "is_complex"), _alone())
def test_a_layer_alone_has_the_rows_of_reverse_mode(layer, is_complex):
    params, batch, other = _points(is_complex)
    checks.check(_model([(layer, 0)], False), params, batch, 1e-9, other)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("layer", layers.LAYERS, ids=lambda layer: layer.__name__)
def test_every_layer_keeps_the_kind_of_its_values(layer, is_complex):
    params, (x, *imaginary), _ = _points(is_complex)
    x = lax.complex(x, *imaginary) if imaginary else x
    result = jax.eval_shape(layer, params[0], x)
    assert (result.shape, result.dtype) == (x.shape, x.dtype)

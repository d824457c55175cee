"""The layers of haiku, as their users write them."""

import haiku as hk
import jax

from tests.models.zoo import Draw
from tests.models.zoo import N
from tests.models.zoo import specimen


def _haiku(function, key, x):
    net = hk.without_apply_rng(hk.transform(function))
    return net.apply, net.init(key, x), x


@specimen("haiku: an MLP")
def haiku_mlp(key):
    return _haiku(lambda x: hk.nets.MLP([5, 2])(x), key, Draw(key)(N, 3))


@specimen("haiku: attention")
def haiku_attention(key):
    def net(x):
        attend = hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(1.0))
        return attend(x, x, x).mean(1)

    return _haiku(net, key, Draw(key)(N, 3, 4))


@specimen("haiku: a convolutional net")
def haiku_cnn(key):
    def net(x):
        x = jax.nn.relu(hk.Conv2D(3, 3, stride=2)(x))
        return hk.Linear(2)(hk.Flatten()(x))

    return _haiku(net, key, Draw(key)(N, 4, 4, 2))


@specimen("haiku: an LSTM unrolled by its own scan")
def haiku_lstm(key):
    def net(x):
        core = hk.LSTM(3)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return out[:, -1]

    return _haiku(net, key, Draw(key)(N, 3, 2))

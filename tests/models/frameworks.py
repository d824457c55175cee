"""The layers of flax linen, flax nnx and equinox, as their users write them."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.models.zoo import Draw
from tests.models.zoo import N
from tests.models.zoo import specimen


def _linen(module, key, x, **more):
    variables = module.init(key, x, **more)
    rest = {k: v for k, v in variables.items() if k != "params"}
    return lambda p, x: module.apply({"params": p, **rest}, x, **more), variables["params"], x


@specimen("linen: Dense layers")
def linen_mlp(key):
    return _linen(nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(2)]), key, Draw(key)(N, 3))


@specimen("linen: two-dimensional features")
def linen_dense_general(key):
    module = nn.Sequential([nn.DenseGeneral((2, 3)), nn.tanh, nn.DenseGeneral(4, axis=(-2, -1))])
    return _linen(module, key, Draw(key)(N, 3))


@specimen("linen: a convolutional net")
def linen_cnn(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    return _linen(Net(), key, Draw(key)(N, 4, 4, 1))


@specimen("linen: a transposed convolution")
def linen_conv_transpose(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.ConvTranspose(2, (2, 2), strides=(2, 2))(x).reshape(x.shape[0], -1)

    return _linen(Net(), key, Draw(key)(N, 2, 2, 2))


@specimen("linen: multi-head attention with layer norm")
def linen_attention(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(nn.LayerNorm()(x))
            return nn.Dense(2)(x).mean(1)

    return _linen(Net(), key, Draw(key)(N, 3, 4))


@specimen("linen: an LSTM over time, kernels concatenated")
def linen_lstm(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=x.dtype))(x)[:, -1]

    return _linen(Net(), key, Draw(key)(N, 4, 2))


@specimen("linen: embedding, attended to by its transpose")
def linen_embed(key):
    class Net(nn.Module):
        def setup(self):
            self.embed = nn.Embed(6, 3)

        def __call__(self, i):
            return self.embed.attend(jnp.tanh(self.embed(i).sum(1)))

    return _linen(Net(), key, Draw(key).integers(6, N, 3))


@specimen("linen: layers in nn.scan")
def linen_scan(key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(3)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)
            return scanned()(x, None)[0]

    return _linen(Net(), key, Draw(key)(N, 3))


@specimen("linen: running batch statistics, group and RMS norm", dense=("scale",))
def linen_norms(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
            return nn.GroupNorm(num_groups=2)(nn.Dense(4)(nn.RMSNorm()(x)))

    return _linen(Net(), key, Draw(key)(N, 3))


@specimen("linen: batch normalisation in training mode", mixes=True)
def linen_batch_norm(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))))

    module, x = Net(), Draw(key)(N, 3)
    variables = module.init(key, x)

    def f(p, x):
        return module.apply({**variables, "params": p}, x, mutable=["batch_stats"])[0]

    return f, variables["params"], x


def _nnx(model, x):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda p, x: nnx.merge(graph, p, rest)(x), params, x


@specimen("nnx: linear layers")
def nnx_mlp(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    return _nnx(Net(nnx.Rngs(0)), Draw(key)(N, 3))


@specimen("nnx: attention and convolution over time; its softmax is float32", single=True)
def nnx_attention(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (2,), rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)

        def __call__(self, x):
            return self.attend(nnx.gelu(self.conv(x))).mean(1)

    return _nnx(Net(nnx.Rngs(0)), Draw(key)(N, 4, 3))


@specimen("nnx: a gated recurrent unit")
def nnx_gru(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs))

        def __call__(self, x):
            return self.rnn(x, initial_carry=jnp.zeros((x.shape[0], 3), x.dtype))[:, -1]

    return _nnx(Net(nnx.Rngs(0)), Draw(key)(N, 3, 2))


def _eqx(model, x):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x


@specimen("equinox: an MLP under vmap")
def equinox_mlp(key):
    return _eqx(eqx.nn.MLP(3, 2, 5, 2, key=key), Draw(key)(N, 3))


@specimen("equinox: attention under vmap")
def equinox_attention(key):
    class Net(eqx.Module):
        attend: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm

        def __call__(self, x):
            x = jax.vmap(self.norm)(x)
            return self.attend(x, x, x).mean(0)

    attend = eqx.nn.MultiheadAttention(2, 4, key=key, use_value_bias=True)
    return _eqx(Net(attend, eqx.nn.LayerNorm(4)), Draw(key)(N, 3, 4))


@specimen("equinox: convolution under vmap, channels first")
def equinox_conv(key):
    class Net(eqx.Module):
        one: eqx.nn.Conv2d
        two: eqx.nn.Linear

        def __call__(self, x):
            return self.two(jnp.ravel(jax.nn.elu(self.one(x))))

    one = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, key=key)
    return _eqx(Net(one, eqx.nn.Linear(16, 2, key=key)), Draw(key)(N, 2, 4, 4))


@specimen("equinox: a transposed convolution under vmap")
def equinox_conv_transpose(key):
    class Net(eqx.Module):
        up: eqx.nn.ConvTranspose1d

        def __call__(self, x):
            return jnp.ravel(self.up(x))

    return _eqx(Net(eqx.nn.ConvTranspose1d(2, 3, 3, stride=2, key=key)), Draw(key)(N, 2, 3))


@specimen("equinox: embedding and a GRU in scan, under vmap")
def equinox_gru(key):
    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        cell: eqx.nn.GRUCell

        def __call__(self, i):
            step = lambda h, x: (self.cell(x, h), None)
            return jax.lax.scan(step, jnp.zeros(3), jax.vmap(self.embed)(i))[0]

    keys = jax.random.split(key)
    net = Net(eqx.nn.Embedding(5, 2, key=keys[0]), eqx.nn.GRUCell(2, 3, key=keys[1]))
    return _eqx(net, Draw(key).integers(5, N, 4))

"""Convolutions in every layout and geometry."""

import jax.numpy as jnp
from jax import lax

from tests.models.zoo import SPECIMENS
from tests.models.zoo import Draw
from tests.models.zoo import N
from tests.models.zoo import Specimen
from tests.models.zoo import specimen

# name, reason, kernel shape, image shape, keywords of conv_general_dilated
_CASES = [
    ("conv1d", "one dimension", (3, 2, 4), (N, 6, 2), {}, "NHC HIO NHC"),
    ("conv2d_same", "the usual layout", (3, 3, 2, 3), (N, 5, 5, 2), {}, "NHWC HWIO NHWC"),
    (
        "conv2d_strided",
        "strides",
        (3, 2, 2, 3),
        (N, 6, 5, 2),
        {"window_strides": (2, 2)},
        "NHWC HWIO NHWC",
    ),
    (
        "conv2d_dilated",
        "dilated kernel",
        (2, 3, 2, 2),
        (N, 6, 7, 2),
        {"rhs_dilation": (2, 3)},
        "NHWC HWIO NHWC",
    ),
    (
        "conv2d_transposed",
        "dilated image",
        (3, 3, 2, 2),
        (N, 3, 3, 2),
        {"lhs_dilation": (2, 2)},
        "NHWC HWIO NHWC",
    ),
    (
        "conv2d_grouped",
        "groups of channels",
        (3, 3, 2, 6),
        (N, 4, 4, 4),
        {"feature_group_count": 2},
        "NHWC HWIO NHWC",
    ),
    (
        "conv2d_depthwise",
        "a kernel for each channel",
        (3, 3, 1, 4),
        (N, 4, 4, 4),
        {"feature_group_count": 4},
        "NHWC HWIO NHWC",
    ),
    ("conv2d_channels_first", "channels first", (3, 2, 3, 3), (N, 2, 5, 5), {}, "NCHW OIHW NCHW"),
    (
        "conv2d_cropped",
        "negative padding",
        (2, 2, 2, 3),
        (N, 5, 5, 2),
        {"padding": ((-1, 0), (1, 2))},
        "NHWC HWIO NHWC",
    ),
    ("conv3d", "three dimensions", (2, 2, 2, 1, 2), (N, 3, 3, 3, 1), {}, "NHWDC HWDIO NHWDC"),
]


def _maker(kernel, image, keywords, layout):
    options = {"window_strides": (1,) * (len(image) - 2), "padding": "SAME", **keywords}
    if "lhs_dilation" in keywords:
        options["padding"] = ((2, 1), (1, 2))

    def make(key):
        r = Draw(key)
        names = tuple(layout.split())

        def f(p, x):
            z = lax.conv_general_dilated(x, p["k"], dimension_numbers=names, **options)
            return jnp.tanh(z).reshape(x.shape[0], -1)

        return f, {"k": r(*kernel)}, r(*image)

    return make


for _name, _reason, *_rest in _CASES:
    SPECIMENS.append(Specimen(_name, _reason, _maker(*_rest)))


@specimen("convolution, pooling and a head")
def convolutional_net(key):
    r = Draw(key)
    p = {"k": r(3, 3, 1, 3), "b": r(3), "w": r(12, 2)}

    def f(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        z = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        z = jnp.maximum(z + p["b"], 0)
        z = lax.reduce_window(z, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return z.reshape(x.shape[0], -1) @ p["w"]

    return f, p, r(N, 4, 4, 1)

"""Rows of the table: primitives that act entry by entry."""

import jax
import jax.numpy as jnp
from jax import lax
from jax import random

from tests.fuzz.case import case
from tests.fuzz.case import either
from tests.fuzz.case import gated
from tests.fuzz.case import whole
from tests.fuzz.operands import above_one
from tests.fuzz.operands import positive
from tests.fuzz.operands import real
from tests.fuzz.operands import signed_unit
from tests.fuzz.operands import unit

_is_positive = lambda x: jnp.real(x) > 0


def _bits(x):
    kind = jnp.finfo(x.dtype)
    return kind.nexp, kind.nmant


def _noise(draw):
    """Noise that no parameter enters, as dropout draws it."""
    return case(lambda x: x * draw(x), real(3))


FUNCTIONS = {
    "abs": [either(jnp.abs, real(3))],
    "acos": [either(jnp.arccos, signed_unit(3))],
    "acosh": [either(jnp.arccosh, above_one(3))],
    "asin": [either(jnp.arcsin, signed_unit(3))],
    "asinh": [either(jnp.arcsinh, real(3))],
    "atan": [either(jnp.arctan, signed_unit(3))],
    "atanh": [either(jnp.arctanh, signed_unit(3))],
    "bessel_i0e": [case(lax.bessel_i0e, real(3))],
    "bessel_i1e": [case(lax.bessel_i1e, real(3))],
    "cbrt": [case(jnp.cbrt, positive(3))],
    "conj": [either(lambda x: jnp.conj(lax.complex(x.real, x.real * x.imag)) * x, real(3))],
    "cos": [either(jnp.cos, real(3))],
    "cosh": [either(jnp.cosh, real(3))],
    "digamma": [case(lax.digamma, positive(3))],
    "erf": [case(lax.erf, real(3))],
    "erf_inv": [case(lax.erf_inv, signed_unit(3))],
    "erfc": [case(lax.erfc, real(3))],
    "exp": [either(jnp.exp, real(3))],
    "exp2": [either(jnp.exp2, real(3))],
    "expm1": [either(jnp.expm1, real(3))],
    "imag": [either(lambda x: jnp.imag(x * lax.complex(x.real, x.real)), real(3))],
    "integer_pow": [either(lambda x: x**3, real(3))],
    "lgamma": [case(lax.lgamma, positive(3))],
    "log": [either(jnp.log, positive(3))],
    "log1p": [either(jnp.log1p, positive(3))],
    "log2": [case(lambda x: lax.log2(x), positive(3))],
    "logistic": [either(jax.nn.sigmoid, real(3))],
    "neg": [either(jnp.negative, real(3))],
    "one_minus_square": [case(lambda x: lax.one_minus_square(x), real(3))],
    "polygamma": [case(lambda x: lax.polygamma(jnp.ones_like(x), x), positive(3))],
    "polynomial": [case(lambda x: lax.polynomial(x, (1.0, -0.5, 2.0)), real(3))],
    "real": [either(lambda x: jnp.real(x * lax.complex(x.real, x.real)), real(3))],
    # To all bits: fewer would round tangents, and the derivative would not be linear.
    "reduce_precision": [case(lambda x: x * lax.reduce_precision(x, *_bits(x)), real(3))],
    "rsqrt": [either(lax.rsqrt, positive(3))],
    "sin": [either(jnp.sin, real(3)), either(jnp.sin, real())],
    "sinh": [either(jnp.sinh, real(3))],
    "sqrt": [either(jnp.sqrt, positive(3))],
    "square": [either(jnp.square, real(3))],
    "tan": [either(jnp.tan, signed_unit(3))],
    "tanh": [either(jnp.tanh, real(3))],
}

OF_SEVERAL = {
    "add": [either(jnp.add, real(3), real(3)), either(lambda x, b: x + b, real(2, 3), real(3))],
    "atan2": [case(jnp.arctan2, real(3), real(3))],
    "clamp": [case(lambda x, y: lax.clamp(-abs(y), x, abs(y)), real(3), real(3))],
    "complex": [either(lambda x, y: lax.complex(x.real, y.real) * x, real(3), real(3))],
    "div": [either(jnp.divide, real(3), positive(3))],
    "igamma": [case(lax.igamma, positive(3), positive(3), loose=1e2)],  # a series for d/da
    "igammac": [case(lax.igammac, positive(3), positive(3), loose=1e2)],
    "max": [case(jnp.maximum, real(3), real(3))],
    "min": [case(jnp.minimum, real(3), real(3))],
    "mul": [either(jnp.multiply, real(3), real(3)), either(lambda x, s: x * s, real(3), real())],
    "nextafter": [case(lambda x, y: lax.nextafter(x, y) * x, real(3), real(3))],
    "pow": [either(jnp.power, positive(3), real(3))],
    "regularized_incomplete_beta": [
        case(lambda x: jax.scipy.special.betainc(2.0, 1.5, x), unit(3), loose=1e2)
    ],
    "rem": [case(jnp.remainder, real(3), positive(3))],
    "select_n": [either(lambda x, y: jnp.where(_is_positive(x), x * x, y), real(3), real(3))],
    "sub": [either(jnp.subtract, real(3), real(3))],
}

# Their derivative is zero everywhere: what a model does with them is count, choose and compare.
STEPS = {
    "and": [case(lambda x: gated(x, (x > 0) & (x < 1)), real(3))],
    "argmax": [case(lambda x: x * (1 + jnp.argmax(x)), real(3))],
    "argmin": [case(lambda x: x * (1 + jnp.argmin(x)), real(3))],
    "bitcast_convert_type": [
        case(lambda x: gated(x, lax.bitcast_convert_type(x, f"i{x.dtype.itemsize}") > 0), real(3))
    ],
    "ceil": [case(lambda x: x * jnp.ceil(x), real(3))],
    "eq": [case(lambda x, y: gated(x, whole(x) == whole(y)) + y, real(3), real(3))],
    "floor": [case(lambda x: x * jnp.floor(x), real(3))],
    "ge": [case(lambda x, y: gated(x, x >= y) + y, real(3), real(3))],
    "gt": [case(lambda x, y: gated(x, x > y) + y, real(3), real(3))],
    "is_finite": [case(lambda x: gated(x, jnp.isfinite(x)), real(3))],
    "le": [case(lambda x, y: gated(x, x <= y) + y, real(3), real(3))],
    "lt": [case(lambda x, y: gated(x, x < y) + y, real(3), real(3))],
    "mulhi": [case(lambda x: gated(x, lax.mulhi(whole(x) << 20, whole(x) << 20)), real(3))],
    "ne": [either(lambda x, y: gated(x, x != y) + y, real(3), real(3))],
    "not": [case(lambda x: gated(x, ~(x > 0.5)), real(3))],
    "or": [case(lambda x: gated(x, (x < 0) | (x > 1)), real(3))],
    "round": [case(lambda x: x * jnp.round(x), real(3))],
    "shift_left": [case(lambda x: gated(x, whole(x) << 1), real(3))],
    "shift_right_arithmetic": [case(lambda x: gated(x, whole(x) >> 1), real(3))],
    "shift_right_logical": [
        case(lambda x: gated(x, lax.shift_right_logical(whole(x), jnp.int32(28))), real(3))
    ],
    "sign": [either(lambda x: x * jnp.sign(x), real(3))],
    "stop_gradient": [either(lambda x: x * lax.stop_gradient(x), real(3))],
    "xor": [case(lambda x: gated(x, (x > 0) ^ (x > 1)), real(3))],
}

RANDOM = {
    "random_bits": [_noise(lambda x: random.bernoulli(random.key(0), 0.5, x.shape))],
    "random_fold_in": [
        _noise(lambda x: random.normal(random.fold_in(random.key(0), 3), x.shape, x.dtype))
    ],
    "random_gamma": [case(lambda a: random.gamma(random.key(0), a), positive(3), loose=1e3)],
    "random_seed": [_noise(lambda x: random.uniform(random.key(1), x.shape, x.dtype))],
    "random_split": [
        _noise(lambda x: random.normal(random.split(random.key(0))[1], x.shape, x.dtype))
    ],
    "random_unwrap": [_noise(lambda x: 1 + random.key_data(random.key(2))[1])],
    "random_wrap": [
        _noise(
            lambda x: random.normal(
                random.wrap_key_data(jnp.array([0, 1], jnp.uint32)), x.shape, x.dtype
            )
        )
    ],
}

ROWS = FUNCTIONS | OF_SEVERAL | STEPS | RANDOM

"""Rows of the table: loops, branches, calls, rules of the user's own, and references."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout

from tests.fuzz.case import batched
from tests.fuzz.case import case
from tests.fuzz.case import either
from tests.fuzz.operands import positive
from tests.fuzz.operands import real


@jax.custom_jvp
def _other_tangent(x):
    return jnp.tanh(x)


@_other_tangent.defjvp
def _(primals, tangents):
    return _other_tangent(*primals), tangents[0] * (1 + primals[0] ** 2)


@jax.custom_vjp
def _other_cotangent(x, y):
    return jnp.sin(x) * y


_other_cotangent.defvjp(
    lambda x, y: (_other_cotangent(x, y), (x, y)), lambda kept, g: (g * kept[1], g * kept[0])
)


@jax.custom_vjp
def _rematerialised(x):
    return jnp.sin(x)


_rematerialised.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),), optimize_remat=True
)


@jax.custom_batching.custom_vmap
def _own_batching(x):
    return jnp.sin(x) * x


@_own_batching.def_vmap
def _(size, batched, x):
    return jnp.sin(x) * x, True


_composite = lax.composite(lambda x: jnp.sin(x) * x, name="own.sine")


def _linear(x):
    multiply = lambda r, x: r * x
    return jax.custom_derivatives.linear_call(multiply, multiply, lax.stop_gradient(x) + 2.0, x)


def _recurrence(x, w):
    return lax.scan(lambda h, x: ((h := jnp.tanh(h * w + x)), h), jnp.zeros_like(x[0]), x)


def _newton(x):
    """A root sought by a loop of unknown length, and differentiated by its last step."""
    step = lambda y: y - (y * y - x) / (2 * y)
    far = lambda y: jnp.max(abs(y * y - lax.stop_gradient(x))) > 1e-6
    fixed = lambda y: y - (y * y - lax.stop_gradient(x)) / (2 * y)
    return step(lax.while_loop(far, fixed, lax.stop_gradient(x)))


def _one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _called_back(callback, x, **options):
    """JAX refuses to differentiate what the host computes."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return x * callback(np.sign, shape, lax.stop_gradient(x), **options)


def _kept_in_a_layout(x):
    return layout.with_layout_constraint(x, layout.Layout((0,))) * 2


LOOPS = {
    "cond": [
        either(
            lambda x, w: lax.cond(w[0].real > 1, jnp.multiply, jnp.add, x, w), real(3), positive(3)
        ),
        batched(lambda x, w: lax.cond(w[0] > 1, jnp.multiply, jnp.add, x, w), real(3), positive(3)),
        case(lambda x: lax.switch(jnp.argmax(x), [jnp.sin, jnp.cos, jnp.square], x), real(3)),
    ],
    "scan": [
        either(lambda x, w: _recurrence(x, w)[1], real(3, 2), real(2)),
        case(lambda x: lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) * x[i], x), real(3)),
        case(lambda x: lax.map(lambda x: jnp.sin(x) * x, x), real(3)),
        batched(
            lambda x, w: _recurrence(x.swapaxes(0, 1), w)[1].swapaxes(0, 1), real(3, 2), real(2)
        ),
        batched(lambda x, w: lax.map(lambda x: jnp.tanh(x * w), x), real(2), real(2)),
    ],
    "while": [
        case(_newton, positive(3), loose=1e2),
        case(
            lambda x: x * lax.while_loop(lambda n: n < x[0], lambda n: n + 1, 0).astype(x.dtype),
            positive(3),
        ),
    ],
}

CALLS = {
    "composite": [batched(lambda x: x * _composite(lax.stop_gradient(x)), real(3))],
    "custom_jvp_call": [case(_other_tangent, real(3)), case(jax.nn.relu, real(3))],
    "custom_vjp_call": [case(_other_cotangent, real(3), real(3))],
    "custom_vmap_call": [
        case(_own_batching, real(3), refused="Linearization failed"),
        batched(lambda x: x * _own_batching(lax.stop_gradient(x)), real(3)),
    ],
    "debug_callback": [case(lambda x: (jax.debug.callback(lambda x: None, x), x * x)[1], real(3))],
    "debug_print": [case(lambda x: (jax.debug.print("{}", x), x * x)[1], real(3))],
    "device_put": [either(lambda x: jax.device_put(jnp.sin(x)), real(3))],
    "inspect_sharding": [
        case(
            lambda x: (jax.debug.inspect_array_sharding(x, callback=lambda s: None), x * x)[1],
            real(3),
        )
    ],
    "io_callback": [case(lambda x: _called_back(jax.experimental.io_callback, x), real(3))],
    "jit": [either(jax.jit(lambda x: jnp.sin(x) * x), real(3))],
    "layout_constraint": [either(_kept_in_a_layout, real(3))],
    "linear_call": [
        batched(_linear, real(3), refused="Batching rule for 'linear_call'"),
        batched(lambda x: x * _linear(lax.stop_gradient(x)), real(3)),
    ],
    "name": [either(lambda x: checkpoint_name(jnp.sin(x), "sine"), real(3))],
    "optimization_barrier": [either(lambda x: lax.optimization_barrier(jnp.sin(x)), real(3))],
    "pure_callback": [
        case(lambda x: _called_back(jax.pure_callback, x, vmap_method="broadcast_all"), real(3))
    ],
    "remat2": [either(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))), real(3))],
    "remat_opt": [
        # JAX has no reverse mode of it: it stands in a gradient that is kept fixed.
        case(
            lambda x: x * jax.grad(lambda x: _rematerialised(x).sum())(lax.stop_gradient(x)),
            real(3),
        )
    ],
    "sharding_constraint": [
        either(lambda x: lax.with_sharding_constraint(jnp.sin(x), _one_device()), real(3))
    ],
}


def _accumulated(x, y):
    ref = jax.ref.new_ref(x * y)
    ref[...] += x
    return ref[...]


def _frozen(x):
    ref = jax.ref.new_ref(jnp.zeros_like(x))
    ref[..., 1:] = x[..., 1:] * x[..., :1]
    return jax.ref.freeze(ref)


def _swapped(x, y):
    ref = jax.ref.new_ref(x * y)
    old = jax.ref.swap(ref, (..., 0), y[..., 0] + 0 * x[..., 0])
    return old[..., None] * ref[...]


def _added(x, y):
    ref = jax.ref.new_ref(x * y)
    jax.ref.addupdate(ref, (..., slice(0, 2)), x[..., 1:])
    return ref[...]


def _emptied(x):
    ref = jax.ref.empty_ref(jax.typeof(x))
    ref[...] = x * x
    return jax.ref.freeze(ref)


def _freed(x):
    ref = jax.ref.new_ref(x)
    value = ref[...] * x
    jax.ref.free_ref(ref)
    return value


def _running_sum(x):
    """A reference that a scan's body writes to."""
    ref = jax.ref.new_ref(jnp.zeros_like(x[..., 0]))

    def body(carry, x):
        ref[...] = ref[...] + x * x
        return carry, ref[...]

    return jnp.moveaxis(lax.scan(body, 0.0, jnp.moveaxis(x, -1, 0))[1], 0, -1)


def _read(x):
    return jax.ref.new_ref(x * x)[..., 1:] * x[..., :1]


def _stateful(function, *operands):
    """All examples at once; and mapped over them, where JAX maps references."""
    mapped = [either(function, *operands)] if hasattr(jax.ref, "empty_ref") else []
    refused = "Batching rule for 'freeze'"  # by the oldest JAX
    return [batched(function, *operands, refused=refused), *mapped]


REFERENCES = {
    "addupdate": _stateful(_added, real(3), real(3)),
    "empty_ref": [batched(_emptied, real(3))],
    "free_ref": [batched(_freed, real(3))],
    "freeze": _stateful(_frozen, real(3)),
    "get": [*_stateful(_read, real(3)), *_stateful(_running_sum, real(2, 3))],
    "new_ref": _stateful(_accumulated, real(3), real(3)),
    "swap": _stateful(_swapped, real(3), real(3)),
}

ROWS = LOOPS | CALLS | REFERENCES

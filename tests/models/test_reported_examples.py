"""Models whose examples are independent, and were once said to mix or to hold dense rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import natgrad_jax as ng
from tests.models import exact
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")


def log_cosh(x):
    """As in NetKet: the sign by the bits of the number."""
    signs = -2 * jnp.signbit(x.real) + 1
    x = x * signs
    return x + jnp.log1p(jnp.exp(-2.0 * x)) - jnp.log(2.0)


def by_bits(x):
    """The sign as older versions of JAX take it."""
    word = {4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    negative = lax.bitcast_convert_type(x, word) >> word(8 * x.dtype.itemsize - 1)
    return x * (1 - 2 * negative.astype(x.dtype))


def parts_apart(function, z):
    """A function of a real number, for both parts of a complex one."""
    root = jnp.sqrt(jnp.array(2, z.real.dtype))
    return lax.complex(function(root * z.real), function(root * z.imag)) / root


def layer(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


INDEPENDENT = {
    "log_cosh": lambda p, x: log_cosh(x @ p["w"] + p["b"]) @ p["v"],
    "absolute values by bits": lambda p, x: by_bits(x @ p["w"] + p["b"]) @ p["v"],
    "selu of both parts": lambda p, x: jnp.real(
        parts_apart(jax.nn.selu, lax.complex(x @ p["w"], jnp.tile(p["b"], (x.shape[0], 1))))
        @ p["v"]
    ),
    "log_cosh of a complex number": lambda p, x: jnp.real(
        log_cosh(lax.complex(x @ p["w"], 0.1 * (x**2) @ p["w"]) + p["b"]) @ p["v"]
    ),
    "the next number": lambda p, x: (
        jnp.tanh(x @ p["w"] + p["b"] + jnp.nextafter(x, x + 1)[:, :3]) @ p["v"]
    ),
    "map over examples": lambda p, x: lax.map(lambda x: layer(p, x), x),
    "map in batches": lambda p, x: lax.map(lambda x: layer(p, x), x, batch_size=8),
    "map in batches of pairs": lambda p, x: lax.map(lambda x: layer(p, x), x, batch_size=2),
    "scan that stacks": lambda p, x: lax.scan(lambda c, x: (c, layer(p, x)), 0, x)[1],
    "scan from the end": lambda p, x: lax.scan(lambda c, x: (c, layer(p, x)), 0, x, reverse=True)[
        1
    ],
}


# JAX 0.7 itself casts cotangents of complex constants in its reverse mode.
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("size", [pytest.param(16, marks=pytest.mark.smoke), 13])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_examples_are_independent_and_shown_so(name, size):
    p, x = exact.normals(0, w=(4, 3), b=3, v=(3, 2)), exact.normals(1, x=(size, 4))["x"]
    exact.assert_exact(INDEPENDENT[name], p, x, mode="examples")


def test_bits_split_into_exponent_and_mantissa_are_exact():
    """Newer versions of JAX make this one opaque operation: it need not be known."""
    p, x = exact.normals(0, w=(4, 3), b=3, v=(3, 2)), exact.normals(1, x=(5, 4))["x"]
    model = lambda p, x: jnp.frexp(x @ p["w"] + p["b"])[0] @ p["v"]
    exact.assert_exact(model, p, x, mode=None)


@pytest.mark.parametrize("name", ["map over examples", "map in batches", "scan that stacks"])
def test_weights_used_in_a_map_over_examples_are_factored(name):
    p, x = exact.normals(0, w=(4, 3), b=3, v=(3, 2)), exact.normals(1, x=(16, 4))["x"]
    report, _ = oracle.quietly(ng.explain, ng.gauss_newton(INDEPENDENT[name]), p, x)
    assert {leaf.path: leaf.form for leaf in report.leaves if len(leaf.shape) == 2} == {
        "['w']": "factored",
        "['v']": "factored",
    }, str(report)


def test_a_scan_over_examples_that_carries_one_to_the_next_mixes():
    """The control."""

    def model(p, x):
        step = lambda h, x: (jnp.tanh(x @ p["w"] + h), h @ p["v"])
        return lax.scan(step, p["b"], x)[1]

    p, x = exact.normals(0, w=(4, 3), b=3, v=(3, 2)), exact.normals(1, x=(6, 4))["x"]
    exact.assert_exact(model, p, x, mode="whole")


def dropout(p, batch):
    """A key for each example."""

    def one(key, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0) @ p["v"]

    return jax.vmap(one)(*batch)


def noise(p, batch):
    one = lambda key, x: layer(p, x + jax.random.normal(jax.random.fold_in(key, 1), x.shape))
    return jax.vmap(one)(*batch)


def split_further(p, batch):
    def one(key, x):
        first, second = jax.random.split(key)
        x = x + jax.random.uniform(first, x.shape, x.dtype)
        return layer(p, x) * jax.random.bernoulli(second, 0.5, (2,))

    return jax.vmap(one)(*batch)


@pytest.mark.smoke
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "legacy"])
@pytest.mark.parametrize("model", [dropout, noise, split_further], ids=lambda f: f.__name__)
def test_a_key_for_each_example_is_a_leaf_of_the_batch(model, typed):
    p, x = exact.normals(0, w=(4, 3), b=3, v=(3, 2)), exact.normals(1, x=(7, 4))["x"]
    keys = jax.random.split(jax.random.key(3), 7)
    batch = (keys if typed else jax.random.key_data(keys), x)
    if not typed:
        wrapped = lambda p, b: model(p, (jax.random.wrap_key_data(b[0]), b[1]))
    exact.assert_exact(model if typed else wrapped, p, batch, mode="examples")


def network(p, x):
    for name in ("1", "2"):
        x = jnp.tanh(x @ p["w" + name] + p["b" + name])
    return (x @ p["w3"] + p["b3"])[..., 0]


def laplacian_by_hessian(p, x):
    u = lambda x: network(p, x)
    return jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(x)


def laplacian_by_nested_jvp(p, x):
    u = lambda x: network(p, x)

    def second(e):
        e = jnp.broadcast_to(e, x.shape)
        return jax.jvp(lambda x: jax.jvp(u, (x,), (e,))[1], (x,), (e,))[1]

    return sum(second(e) for e in np.eye(2))


def laplacian_of_one_by_jvp(p, x):
    u = lambda x: network(p, x)
    slope = lambda x, e: jax.jvp(u, (x,), (e,))[1]
    second = lambda x, e: jax.jvp(lambda x: slope(x, e), (x,), (e,))[1]
    return jax.vmap(lambda x: sum(second(x, e) for e in np.eye(2)))(x)


def laplacian_of_one_by_linearize(p, x):
    gradient = jax.grad(lambda x: network(p, x))
    along = lambda x: jax.vmap(jax.linearize(gradient, x)[1])(jnp.eye(2))
    return jax.vmap(lambda x: jnp.trace(along(x)))(x)


LAPLACIANS = [
    laplacian_by_hessian,
    laplacian_by_nested_jvp,
    laplacian_of_one_by_jvp,
    laplacian_of_one_by_linearize,
]
laplacians = pytest.mark.parametrize("laplacian", LAPLACIANS, ids=lambda f: f.__name__)


def physics_informed():
    p = exact.normals(0, w1=(2, 5), b1=5, w2=(5, 4), b2=4, w3=(4, 1), b3=1)
    return p, exact.normals(1, x=(6, 2))["x"]


@pytest.mark.smoke
@laplacians
def test_a_laplacian_is_independent_with_every_weight_matrix_factored(laplacian):
    p, x = physics_informed()
    report, warned = oracle.quietly(ng.explain, ng.gauss_newton(laplacian), p, x, ng.kfac(x))
    assert report.mode == "examples", report.reason
    assert not warned
    weights = [leaf for leaf in report.leaves if len(leaf.shape) == 2]
    assert [leaf.form for leaf in weights] == ["factored"] * 3, str(report)
    assert all("kronecker" in leaf.block for leaf in weights), str(report)


@laplacians
def test_the_spellings_of_a_laplacian_agree(laplacian):
    p, x = physics_informed()
    np.testing.assert_allclose(laplacian(p, x), laplacian_by_hessian(p, x), rtol=1e-10)
    exact.assert_exact(laplacian, p, x, fisher=exact.fisher_of(laplacian_by_hessian, p, x))


@pytest.mark.parametrize(
    "forces",
    [
        lambda p, x: -jax.vmap(jax.grad(lambda x: network(p, x)))(x),
        lambda p, x: -jax.grad(lambda x: jnp.sum(network(p, x)))(x),
        lambda p, x: jax.vmap(jax.jacfwd(lambda x: network(p, x)))(x),
    ],
    ids=["of each", "of the sum", "forward"],
)
def test_forces_are_independent(forces):
    exact.assert_exact(forces, *physics_informed())

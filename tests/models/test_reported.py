"""Models that were once read wrongly: complex arithmetic, references, parameters of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse

import natgrad_jax as ng
from tests.models import exact
from tests.models import oracle

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
# jax 0.7 has references, but no batching of their reads, which `jax.jacrev` needs.
references = pytest.mark.skipif(not hasattr(jax, "freeze"), reason="this JAX cannot batch them")


def filtered(p, x):
    """A Fourier layer."""
    z = jnp.fft.rfft(x) * (p["re"] + 1j * p["im"])
    return jnp.tanh(jnp.fft.irfft(z, n=8)) @ p["head"]


def filtered_in_full(p, x):
    z = jnp.fft.fft(x) * lax.complex(p["re8"], p["im8"])
    return jnp.tanh(jnp.real(jnp.fft.ifft(z))) @ p["head"]


def filtered_in_two_dimensions(p, x):
    z = jnp.fft.rfft2(x.reshape(-1, 4, 2)) * lax.complex(p["plane"], p["plane"] ** 2)
    return jnp.tanh(jnp.fft.irfft2(z, s=(4, 2)).reshape(-1, 8)) @ p["head"]


def transformed_weights(p, x):
    return jnp.tanh(jnp.real(jnp.fft.fft(x) @ jnp.fft.fft(p["head"], axis=0)))


def joined_features(p, x):
    z = lax.complex(x @ p["head"], x @ p["more"])
    return jnp.abs(z) * jnp.tanh(z.real) + z.imag


def complex_einsum(p, x):
    w = lax.complex(p["head"], p["more"])
    z = jnp.einsum("nk,kh->nh", lax.complex(x, x[:, ::-1]), w)
    return jnp.concatenate([jnp.tanh(z.real), z.imag**2], axis=1)


def conjugated(p, x):
    z = (x + 0.5j * x**2) @ lax.complex(p["head"], p["more"])
    return jnp.real(jnp.conj(z) * jnp.exp(1j * z.real))


def phases(p, x):
    z = jnp.exp(1j * (x @ p["head"])) * p["scale"]
    return jnp.imag(z * jnp.sum(z, axis=1, keepdims=True))


def real_and_imaginary_parts(p, x):
    z = jnp.sin((1 + 2j) * (x @ p["head"]))
    return jnp.real(z) * jnp.imag(z) + jnp.angle(2 + jnp.sqrt(z))


def complex_before_any_example(p, x):
    w = jnp.abs(jnp.exp(1j * p["head"]) + 0.5 * p["more"])
    return jnp.tanh(x @ w)


COMPLEX = [
    filtered,
    filtered_in_full,
    filtered_in_two_dimensions,
    transformed_weights,
    joined_features,
    complex_einsum,
    conjugated,
    phases,
    real_and_imaginary_parts,
    complex_before_any_example,
]


def complex_arguments(function):
    """The parameters that a function names, and a batch."""
    shapes = {"re": 5, "im": 5, "re8": 8, "im8": 8, "plane": (4, 2), "head": (8, 3)}
    everything = exact.normals(0, **shapes, more=(8, 3), scale=3)
    used = [name for name in everything if name in function.__code__.co_consts]
    x = np.random.default_rng(1).normal(size=(9, 8))
    return {name: 0.5 * everything[name] for name in used}, x


@pytest.mark.smoke
@pytest.mark.parametrize("function", COMPLEX, ids=lambda f: f.__name__)
def test_real_parameters_keep_their_rows_through_complex_arithmetic(function):
    exact.assert_exact(function, *complex_arguments(function))


@pytest.mark.parametrize("function", COMPLEX, ids=lambda f: f.__name__)
def test_no_parameter_of_complex_arithmetic_counts_as_unused(function):
    report, _ = oracle.quietly(ng.explain, ng.gauss_newton(function), *complex_arguments(function))
    assert "none" not in {leaf.form for leaf in report.leaves}, str(report)


def through_a_reference(p, x):
    r = jax.new_ref(jnp.zeros((8, 3)))
    r[...] = p["w"]
    return jnp.tanh(x @ r[...]) @ p["v"]


def added_to_a_reference(p, x):
    r = jax.new_ref(p["w"])
    r[1:3] = 2 * r[:2] * r[1:3]
    return jnp.tanh(x @ r[...]) @ p["v"]


def reference_in_a_scan(p, x):
    def step(h, _):
        r = jax.new_ref(jnp.zeros((8, 3)))
        r[...] = p["w"]
        return jnp.tanh(h + x @ r[...]), None

    return lax.scan(step, jnp.zeros((x.shape[0], 3)), length=2)[0] @ p["v"]


def reference_closed_over_by_a_loop(p, x):
    r = jax.new_ref(jnp.zeros((x.shape[0], 3)))

    def step(i, carry):
        r[...] = jnp.tanh(r[...] + x @ p["w"])
        return carry

    lax.fori_loop(0, 2, step, 0)
    return r[...] @ p["v"]


def examples_one_by_one_into_a_reference(p, x):
    r = jax.new_ref(jnp.zeros((x.shape[0], 3)))
    for i in range(x.shape[0]):
        r[i] = jnp.tanh(x[i] @ p["w"])
    return r[...] @ p["v"]


def mean_through_a_reference(p, x):
    h = jnp.tanh(x @ p["w"])
    r = jax.new_ref(jnp.zeros(h.shape[1:]))
    r[...] = h.mean(0)
    return (h - r[...]) @ p["v"]


def sum_over_examples_in_a_loop(p, x):
    h = jnp.tanh(x @ p["w"])
    r = jax.new_ref(jnp.zeros(h.shape[1:]))

    def step(i, carry):
        r[...] += h[i]
        return carry

    lax.fori_loop(0, x.shape[0], step, 0)
    return (h - r[...]) @ p["v"]


def with_references():
    x = np.random.default_rng(1).normal(size=(6, 8))
    return exact.normals(0, w=(8, 3), v=(3, 2)), x


@references
@pytest.mark.smoke
@pytest.mark.parametrize(
    "function",
    [
        through_a_reference,
        added_to_a_reference,
        reference_in_a_scan,
        reference_closed_over_by_a_loop,
        examples_one_by_one_into_a_reference,
    ],
    ids=lambda f: f.__name__,
)
def test_what_passes_through_a_reference_keeps_its_rows(function):
    exact.assert_exact(function, *with_references(), mode=None)


@references
@pytest.mark.parametrize(
    "function",
    [mean_through_a_reference, sum_over_examples_in_a_loop],
    ids=lambda f: f.__name__,
)
def test_examples_that_meet_in_a_reference_mix(function):
    exact.assert_exact(function, *with_references(), mode="whole")


def test_parameters_of_single_examples_are_outputs_themselves():
    """One pair (mean, log scale) for each datum: on one example the model still gives all."""
    p = {"z": 0.5 * np.random.default_rng(0).normal(size=(64, 2))}
    model = lambda p, y: (p["z"][:, 0], p["z"][:, 1])
    y = np.random.default_rng(1).normal(size=64)
    information = np.stack([np.exp(-2 * p["z"][:, 1]), np.full(64, 2.0)], axis=1)
    fisher = np.diag(information.reshape(-1) / 64)
    metric = ng.exact_fisher(model, ng.DiagonalNormal())
    exact.assert_exact(model, p, y, mode=None, metric=metric, fisher=fisher)


@pytest.mark.parametrize(
    "model",
    [
        lambda p, y: p["z"],
        lambda p, y: jnp.tanh(p["z"]) + 0 * y[:, None],
        lambda p, y: jnp.cumsum(p["z"], axis=0) * y[:, None],
    ],
    ids=["themselves", "each its own", "all before"],
)
def test_a_row_of_parameters_for_each_example(model):
    p, y = exact.normals(0, z=(6, 2)), np.random.default_rng(1).normal(size=6)
    exact.assert_exact(model, p, y, mode=None)


@pytest.mark.smoke
def test_a_sparse_matrix_that_all_examples_share():
    rng = np.random.default_rng(2)
    dense = rng.normal(size=(9, 8)) * (rng.uniform(size=(9, 8)) < 0.4)
    batch = (sparse.BCOO.fromdense(dense), rng.normal(size=9))
    model = lambda p, b: jnp.tanh(b[0] @ p["w"]) @ p["v"] * b[1][:, None]
    p = exact.normals(0, w=(8, 3), v=(3, 2))
    exact.assert_exact(model, p, batch, mode=None, batch_axes=(None, 0))


def test_a_sparse_matrix_shared_by_a_likelihood():
    rng = np.random.default_rng(2)
    dense = rng.normal(size=(9, 8)) * (rng.uniform(size=(9, 8)) < 0.4)
    batch = (sparse.BCOO.fromdense(dense), rng.integers(0, 2, size=9))
    model = lambda p, b: b[0] @ p["w"]
    p = exact.normals(0, w=(8,))
    logits = dense @ p["w"]
    variance = 1 / (2 + np.exp(logits) + np.exp(-logits))
    fisher = dense.T @ (variance[:, None] * dense) / 9
    metric = ng.exact_fisher(model, ng.Bernoulli(), batch_axes=(None, 0))
    exact.assert_exact(model, p, batch, mode=None, metric=metric, fisher=fisher)

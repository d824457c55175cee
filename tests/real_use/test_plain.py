"""Parameters and batches as plain pytrees: no framework at all.

The model is a line through the diabetes data, its two numbers kept in various containers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LineData:
    slope: jax.Array
    offset: jax.Array


class LineTuple(NamedTuple):
    slope: jax.Array
    offset: jax.Array


# name: (container of slope and offset, how to read it)
CONTAINERS = {
    "array": (lambda a, b: jnp.stack([a, b]), lambda p: (p[0], p[1])),
    "dict": (lambda a, b: {"slope": a, "offset": b}, lambda p: (p["slope"], p["offset"])),
    "list": (lambda a, b: [a, b], lambda p: p),
    "tuple": (lambda a, b: (a, b), lambda p: p),
    "named tuple": (LineTuple, lambda p: p),
    "dataclass": (LineData, lambda p: (p.slope, p.offset)),
    "nested": (
        lambda a, b: {"layers": [(a,), {"offset": b[None]}], "none": None, "empty": ()},
        lambda p: (p["layers"][0][0], p["layers"][1]["offset"][0]),
    ),
}


@pytest.fixture(scope="module")
def patients():
    """Body-mass index of 442 diabetes patients and progression of the disease, standardised."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_diabetes()
    standard = lambda x: np.float32((x - x.mean()) / x.std())
    return standard(data.data[:, 2]), standard(data.target)


def fit(make, read, batch, *, slope=0.0, offset=0.5):
    """One natural gradient step of rate 1 from (slope, offset); gives the new parameters."""

    def residual(params, batch):
        x, y = batch
        a, b = read(params)
        return a * x + b - y

    params = make(jnp.float32(slope), jnp.float32(offset))
    loss = lambda p: 0.5 * jnp.mean(residual(p, batch) ** 2)
    tx = ng.natural_gradient(1.0, ng.gauss_newton(residual), damping=0.0)
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, batch=batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("container", CONTAINERS)
def test_one_step_is_least_squares_in_every_container(patients, container):
    make, read = CONTAINERS[container]
    found = read(fit(make, read, patients))
    expected = np.polyfit(*np.float64(patients), 1)
    np.testing.assert_allclose(np.stack(found), expected, atol=30 * np.finfo(np.float32).eps)


def test_one_gradient_step_is_not_least_squares_for_a_feature_in_other_units(patients):
    """The control: with the feature measured in units a tenth as large only the metric corrects."""
    x, y = patients
    residual = lambda p: 10 * x * p[0] + p[1] - y
    gradient = jax.grad(lambda p: 0.5 * jnp.mean(residual(p) ** 2))(jnp.zeros((2,)))
    expected = np.polyfit(10 * np.float64(x), np.float64(y), 1)
    assert abs(-gradient[0] - expected[0]) > 1
    make, read = CONTAINERS["list"]
    found = read(fit(make, read, (10 * x, y)))
    np.testing.assert_allclose(np.stack(found), expected, atol=30 * np.finfo(np.float32).eps)


# name: (container of x and y, how to read it)
BATCHES = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "one array": (lambda x, y: np.stack([x, y], axis=1), lambda b: (b[:, 0], b[:, 1])),
    "named tuple": (LineTuple, lambda b: b),
    "nested": (lambda x, y: ({"x": [x]}, None, y), lambda b: (b[0]["x"][0], b[2])),
}


@pytest.mark.parametrize("container", BATCHES)
def test_a_batch_is_any_pytree_of_arrays(patients, container):
    make, read = BATCHES[container]
    residual = lambda p, batch: (lambda x, y: p[0] * x + p[1] - y)(*read(batch))
    batch, params = make(*patients), jnp.zeros((2,))
    gradient = jax.grad(lambda p: 0.5 * jnp.mean(residual(p, batch) ** 2))(params)
    tx = ng.natural_gradient(1.0, ng.gauss_newton(residual), damping=0.0)
    updates, _ = tx.update(gradient, tx.init(params), params, batch=batch)
    expected = np.polyfit(*np.float64(patients), 1)
    np.testing.assert_allclose(updates, expected, atol=30 * np.finfo(np.float32).eps)


def test_a_scalar_is_a_parameter_tree_and_none_a_batch():
    """The mean of three numbers that the model knows by itself, as in a parabola."""
    residual = lambda p, _: p - jnp.array([1.0, 2.0, 6.0])
    tx = ng.natural_gradient(1.0, ng.gauss_newton(residual), damping=0.0)
    params = jnp.array(0.5)
    updates, _ = tx.update(params - 3.0, tx.init(params), params, batch=None)
    np.testing.assert_allclose(params + updates, 3.0, rtol=4 * np.finfo(np.float32).eps)


def test_python_numbers_are_no_parameters():
    tx = ng.natural_gradient(1.0, ng.euclidean())
    with pytest.raises(TypeError, match=r"params\['w'\] must be an array, got float"):
        tx.update({"w": 1.0}, tx.init({"w": jnp.ones(())}), {"w": 1.0}, batch=None)

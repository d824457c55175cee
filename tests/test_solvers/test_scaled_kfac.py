"""Damping scales of K-FAC and EKFAC: those of the model in other parameters, theta = c phi."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from tests.models import oracle
from tests.models.oracle import flat

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

RNG = np.random.default_rng(8)
DAMPING = 0.05


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(*shape):
    return 0.7 * RNG.normal(size=shape)


class Twin(NamedTuple):
    """A model, and the same in parameters phi, written so that nothing about it is scaled.

    Attributes:
      function: of (theta, batch).
      params: theta.
      batches: of two steps.
      scale: s, one number for each leaf.
      other: the function of (phi, batch).
      to_phi: a tree like theta -> one like phi, entries put in other places.
      to_theta: its inverse.
    """

    function: Callable[[Any, Any], Any]
    params: Any
    batches: Any
    scale: Any
    other: Callable[[Any, Any], Any]
    to_phi: Callable[[Any], Any] = lambda tree: tree
    to_theta: Callable[[Any], Any] = lambda tree: tree


def with_one(x, one):
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), one)], axis=-1)


def unit(s):
    return s**-0.5


def layers():
    """Weight and bias of a layer become one matrix; what stands for the bias is no one."""
    s = {"w": 0.2, "b": 30.0, "v": 5.0, "d": 0.7}
    c = jax.tree.map(unit, s)
    stack = lambda w, b: jnp.concatenate([w, b[None]])

    def other(phi, x):
        h = jnp.tanh(with_one(c["w"] * x, c["b"]) @ phi["one"])
        return with_one(c["v"] * h, c["d"]) @ phi["two"]

    return Twin(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["d"],
        {"w": normal(3, 4), "b": normal(4), "v": normal(4, 2), "d": normal(2)},
        normal(2, 6, 3),
        s,
        other,
        lambda p: {"one": stack(p["w"], p["b"]), "two": stack(p["v"], p["d"])},
        lambda p: {
            "w": p["one"][:-1],
            "b": p["one"][-1],
            "v": p["two"][:-1],
            "d": p["two"][-1],
        },
    )


def positions():
    s = {"w": 0.2, "b": 30.0}
    c = jax.tree.map(unit, s)
    return Twin(
        lambda p, x: jnp.mean(jnp.tanh(x @ p["w"] + p["b"]), axis=1),
        {"w": normal(3, 4), "b": normal(4)},
        normal(2, 6, 5, 3),
        s,
        lambda phi, x: jnp.mean(jnp.tanh(with_one(c["w"] * x, c["b"]) @ phi), axis=1),
        lambda p: jnp.concatenate([p["w"], p["b"][None]]),
        lambda phi: {"w": phi[:-1], "b": phi[-1]},
    )


def tied():
    c = unit(0.2)
    return Twin(
        lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w) @ w.T,
        normal(3, 3),
        normal(2, 6, 3),
        0.2,
        lambda w, x: c * (jnp.tanh(c * (jnp.tanh(c * (x @ w)) @ w)) @ w.T),
    )


def joined_inputs():
    s = {"u": 0.2, "v": 30.0}
    c = np.repeat([unit(0.2), unit(30.0)], [1, 2])
    return Twin(
        lambda p, x: jnp.tanh(x @ jnp.concatenate([p["u"], p["v"]])),
        {"u": normal(1, 4), "v": normal(2, 4)},
        normal(2, 6, 3),
        s,
        lambda phi, x: jnp.tanh((c * x) @ phi),
        lambda p: jnp.concatenate([p["u"], p["v"]]),
        lambda phi: {"u": phi[:1], "v": phi[1:]},
    )


def joined_outputs():
    """Gates; their biases in the same proportions."""
    s = {"wa": 0.2, "wb": 30.0, "ba": 2.0, "bb": 300.0}
    c = np.repeat([unit(0.2), unit(30.0)], [2, 3])
    joint = lambda p, x: (
        x @ jnp.concatenate([p["wa"], p["wb"]], 1) + jnp.concatenate([p["ba"], p["bb"]])
    )
    return Twin(
        lambda p, x: jnp.tanh(joint(p, x)),
        {"wa": normal(3, 2), "wb": normal(3, 3), "ba": normal(2), "bb": normal(3)},
        normal(2, 6, 3),
        s,
        lambda phi, x: jnp.tanh(c * (with_one(x, 10**-0.5) @ phi)),
        lambda p: jnp.block([[p["wa"], p["wb"]], [p["ba"], p["bb"]]]),
        lambda phi: {"wa": phi[:-1, :2], "wb": phi[:-1, 2:], "ba": phi[-1, :2], "bb": phi[-1, 2:]},
    )


def joined_tables():
    c = np.repeat([unit(0.2), unit(30.0)], [2, 3])
    return Twin(
        lambda p, i: jnp.tanh(jnp.concatenate([p["u"], p["v"]])[i]).sum(1),
        {"u": normal(2, 3), "v": normal(3, 3)},
        RNG.integers(0, 5, (2, 6, 3)),
        {"u": 0.2, "v": 30.0},
        lambda phi, i: jnp.tanh(jnp.asarray(c)[i][..., None] * phi[i]).sum(1),
        lambda p: jnp.concatenate([p["u"], p["v"]]),
        lambda phi: {"u": phi[:2], "v": phi[2:]},
    )


def stacked():
    """Layers joined for a scan: a block of copies, each with a number of its own."""
    c = np.asarray([unit(0.2), unit(30.0)])
    step = lambda h, w: (jnp.tanh(h @ w), None)
    scaled_step = lambda h, w: (jnp.tanh(w[1] * (h @ w[0])), None)
    return Twin(
        lambda p, x: jax.lax.scan(step, x, jnp.stack([p["u"], p["v"]]))[0],
        {"u": normal(3, 3), "v": normal(3, 3)},
        normal(2, 6, 3),
        {"u": 0.2, "v": 30.0},
        lambda phi, x: jax.lax.scan(scaled_step, x, (phi, c))[0],
        lambda p: jnp.stack([p["u"], p["v"]]),
        lambda phi: {"u": phi[0], "v": phi[1]},
    )


def elementwise():
    """Exact blocks of what has no linear use."""
    c = unit(30.0)
    return Twin(
        lambda p, x: jnp.tanh(x * p),
        normal(3),
        normal(2, 6, 3),
        30.0,
        lambda phi, x: jnp.tanh(c * x * phi),
    )


TWINS = {
    make.__name__: make()
    for make in (
        layers,
        positions,
        tied,
        joined_inputs,
        joined_outputs,
        joined_tables,
        stacked,
        elementwise,
    )
}
SOLVERS = {
    "factored": lambda batch: ng.kfac(batch, inverses_every=1),
    "exact": lambda batch: ng.kfac(batch, damping_split="exact", inverses_every=1),
    "ekfac": lambda batch: ng.ekfac(batch, basis_every=1, factors_every=2),
    "reduce": lambda batch: ng.kfac(batch, weight_sharing="reduce", inverses_every=1),
}


def two_steps(function, params, batches, grads, solver, scale):
    """The second direction: averages count."""
    metric = ng.gauss_newton(function)
    tx = ng.scale_by_natural_gradient(metric, solver=solver, damping=DAMPING, damping_scale=scale)
    state = tx.init(params)
    for batch in batches:
        d, state = tx.update(grads, state, params, batch=batch)
    return d


def times(c, tree):
    return jax.tree.map(lambda c, part: jax.tree.map(lambda x: c * x, part), c, tree)


def error(value, expected):
    return np.linalg.norm(flat(value) - flat(expected)) / np.linalg.norm(flat(expected))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", TWINS)
def test_directions_are_those_of_the_model_in_scaled_parameters(name, solver):
    twin = TWINS[name]
    c = jax.tree.map(unit, twin.scale)
    theta = jax.tree.map(jnp.asarray, twin.params)
    phi = twin.to_phi(times(jax.tree.map(lambda c: 1 / c, c), theta))
    grads = oracle.draw_like(theta, 1)
    make = SOLVERS[solver]
    there = two_steps(
        twin.other, phi, twin.batches, twin.to_phi(times(c, grads)), make(twin.batches[0]), None
    )
    expected = times(c, twin.to_theta(there))
    steps = lambda scale: two_steps(
        twin.function, theta, twin.batches, grads, make(twin.batches[0]), scale
    )
    assert error(steps(twin.scale), expected) < 1e-9
    assert error(steps(None), expected) > 0.1


def gates(p, x):
    return TWINS["joined_outputs"].function(p, x)


@pytest.mark.parametrize("proportions", ["same", "other"])
def test_scales_of_joined_parameters_that_do_not_fit_become_the_nearest_that_do(proportions):
    """Weights count as they are; the bias gets the geometric mean of its proportions."""
    twin = TWINS["joined_outputs"]
    theta, x = jax.tree.map(jnp.asarray, twin.params), twin.batches[0]
    scale = {"wa": 0.2, "wb": 30.0, "ba": 2.0, "bb": 300.0 if proportions == "same" else 3.0}
    ratios = np.repeat([scale["ba"] / scale["wa"], scale["bb"] / scale["wb"]], [2, 3])
    mean = np.exp(np.mean(np.log(ratios)))
    nearest = {**scale, "ba": scale["wa"] * mean, "bb": scale["wb"] * mean}
    grads = oracle.draw_like(theta, 1)
    metric = ng.gauss_newton(gates)
    d, _ = ng.natural_gradient_direction(
        metric,
        theta,
        x,
        grads,
        solver=ng.kfac(x, damping_split="exact"),
        damping=DAMPING,
        damping_scale=scale,
    )
    matrix = np.asarray(ng.kronecker_approximation(metric, theta, x).matrix())

    def solved(scale):
        s = flat(jax.tree.map(lambda s, x: np.full(x.shape, s), scale, theta))
        return np.linalg.solve(matrix + DAMPING * np.diag(s), flat(grads))

    assert error(d, solved(nearest)) < 1e-9
    assert bool(error(d, solved(scale)) < 1e-9) is (proportions == "same")


def test_factors_that_rest_take_the_scale_with_them():
    """Between two renewals, in whose loop the units of a block must not stay."""
    twin = TWINS["joined_outputs"]
    theta = jax.tree.map(jnp.asarray, twin.params)
    scale = {"wa": 0.2, "wb": 30.0, "ba": 2.0, "bb": 3.0}
    grads = oracle.draw_like(theta, 1)
    same = [twin.batches[0]] * 2
    rest = lambda every: ng.kfac(same[0], factors_every=every, inverses_every=2)
    rested = two_steps(twin.function, theta, same, grads, rest(2), scale)
    assert error(rested, two_steps(twin.function, theta, same, grads, rest(1), scale)) < 1e-9


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_as_a_preconditioner_it_is_scaled_with_the_system(make):
    """Where it is exact, conjugate gradients are done at once."""
    x = normal(30, 6) * np.arange(1.0, 7.0)
    params = {"w": normal(6, 2), "b": normal(2)}
    metric = ng.gauss_newton(lambda p, x: x @ p["w"] + p["b"])
    settings = dict(damping_split="exact") if make is ng.kfac else {}

    def iterations(preconditioner):
        solver = ng.cg(tol=1e-8, preconditioner=preconditioner)
        _, info = ng.natural_gradient_direction(
            metric,
            params,
            x,
            params,
            solver=solver,
            damping=1e-3,
            damping_scale={"w": 0.2, "b": 30.0},
        )
        assert info.relative_residual < 1e-7
        return int(info.iterations)

    assert iterations(make(x, **settings)) <= 2
    assert iterations(None) > 4

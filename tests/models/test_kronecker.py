"""K-FAC and EKFAC for every model of the zoo."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax.curvature import curvature
from natgrad_jax.solvers import _kronecker
from tests.models import convolutions as convolutions
from tests.models import exotic as exotic
from tests.models import exotic_control as exotic_control
from tests.models import frameworks as frameworks
from tests.models import oracle
from tests.models import plain as plain
from tests.models.test_zoo import made
from tests.models.zoo import SPECIMENS

if importlib.util.find_spec("haiku"):
    from tests.models import haiku_nets as haiku_nets

pytestmark = pytest.mark.usefixtures("standard_promotion")


def one_example(specimen, batch):
    leaves, structure = jax.tree.flatten(batch)
    axes = examples.leaf_axes("test", batch, specimen.batch_axes)
    cut = lambda x, axis: x if axis is None else jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    return jax.tree.unflatten(structure, list(map(cut, leaves, axes)))


def dense(block, own):
    """The matrix of a block from its moments, entries (b, p, q)."""
    if block.kind == "rows":
        (moment,) = own
        return np.diag(moment[0]) if moment.ndim == 2 else moment[0]
    left, right = own
    sides = [(np.diag(a) if a.ndim == 1 else a, g) for a, g in zip(left, right, strict=True)]
    size, copies = np.kron(*sides[0]).shape[0], len(sides)
    matrix = np.zeros((copies, size, copies, size))
    for i, (a, g) in enumerate(sides):
        matrix[i, :, i] = np.kron(a, g)
    return matrix.reshape(copies * size, copies * size)


EXACT = [s for s in SPECIMENS if not s.single]


@pytest.mark.parametrize("specimen", EXACT, ids=lambda s: s.name)
def test_blocks_of_one_example_used_at_one_position_are_exact(specimen, x64):
    """At one example every block is a Kronecker product, unless it is used at several positions."""
    function, params, batch = made(specimen, jnp.float64)
    batch = one_example(specimen, batch)
    metric = ng.gauss_newton(function, batch_axes=specimen.batch_axes)
    found = []

    def everything(params, batch):
        kronecker = curvature(metric, params, batch, None).kronecker()
        found[:] = [kronecker]
        basis = jnp.eye(_trees.size(params), dtype=jnp.float64)
        split = jax.vmap(lambda e: kronecker.split(_trees.unravel(e, params)))(basis)
        fisher = ng.fisher_matrix(metric, params, batch)
        return _kronecker.moments(kronecker, "expand"), split, fisher

    moments, split, fisher = oracle.quietly(oracle.compiled, everything, params, batch)[0]
    (kronecker,), fisher = found, np.asarray(fisher)
    covered = sum(np.asarray(x).reshape(len(fisher), -1).sum(axis=1) for x in split)
    assert set(covered) <= {0, 1}
    np.testing.assert_array_equal(fisher[covered == 0], 0)
    for block, uses, own, places in zip(
        kronecker.blocks, kronecker.uses, moments, split, strict=True
    ):
        if sum(use.part.positions for use in uses) > 1:
            continue
        places = np.asarray(places).reshape(len(fisher), -1)
        wanted = places.T @ fisher @ places
        copies = np.kron(np.eye(block.shape[0]), np.ones((len(wanted) // block.shape[0],) * 2))
        approximation = dense(block, [np.asarray(x) for x in own])
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(approximation, wanted * copies, atol=1e-10 * scale + 1e-300)


def solvers_of_models():
    """K-FAC for every model; EKFAC, which sees the same blocks, for every third, or for all."""
    every = 1 if os.environ.get("NATGRAD_FUZZ") else 3
    chosen = [("kfac", s) for s in SPECIMENS] + [("ekfac", s) for s in SPECIMENS[::every]]
    return [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in chosen]


@pytest.mark.parametrize(("solver", "specimen"), solvers_of_models())
def test_three_steps_are_finite_and_keep_the_state(solver, specimen):
    function, params, batch = made(specimen, jnp.float32)
    metric = ng.gauss_newton(function, batch_axes=specimen.batch_axes)
    tx = ng.natural_gradient(1e-2, metric, solver=getattr(ng, solver)(batch), damping=1e-2)

    def loss(params):
        return sum(
            jnp.mean(z.astype(jnp.float32) ** 2) for z in jax.tree.leaves(function(params, batch))
        )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=batch)
        return (jax.tree.map(jnp.add, params, updates), state), loss(params)

    # A scan demands that structure, shapes and dtypes of the state stay.
    run = lambda p: jax.lax.scan(step, (p, tx.init(p)), length=3)
    (trained, state), losses = oracle.quietly(oracle.compiled, run, params)[0]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((trained, state, losses)))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), trained, params)
    assert any(jax.tree.leaves(moved))


def blocks(name):
    specimen = next(s for s in SPECIMENS if s.name == name)
    function, params, batch = made(specimen, jnp.float32)
    metric = ng.gauss_newton(function, batch_axes=specimen.batch_axes)
    report, _ = oracle.quietly(ng.explain, metric, params, batch, ng.kfac(batch))
    assert "block" in str(report).splitlines()[1]
    return {leaf.path: leaf.block for leaf in report.leaves}


def test_explain_tells_the_blocks():
    mlp = blocks("mlp").values()
    assert sorted(text.split(" with")[0] for text in mlp) == [
        "kronecker 5 (x) 6",
        "kronecker 5 (x) 6",
        "kronecker 7 (x) 3",
        "kronecker 7 (x) 3",
    ]
    assert all("with [" in text for text in mlp)
    assert any(text.startswith("3 x kronecker") for text in blocks("scanned_layers").values())
    assert any("diagonal 7" in text for text in blocks("embedding").values())
    assert set(blocks("weight_norm").values()) >= {"exact block 3", "exact block 12"}
    apart = blocks("batch_norm").values()
    assert any("one backward pass for all rows" in text for text in apart)


def test_without_such_a_solver_there_are_no_blocks():
    """The control."""
    specimen = next(s for s in SPECIMENS if s.name == "mlp")
    function, params, batch = made(specimen, jnp.float32)
    report = ng.explain(ng.gauss_newton(function), params, batch, ng.woodbury())
    assert {leaf.block for leaf in report.leaves} == {""}
    assert "block" not in str(report).splitlines()[1]

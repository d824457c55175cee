"""`optax.tree.map_params` maps states of K-FAC and EKFAC, also where a mask hides parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

X = np.random.default_rng(0).normal(size=(5, 3))
PARAMS = {"a": {"w": np.ones((3, 4)), "b": np.ones(4)}, "c": np.ones((4, 2))}
METRIC = ng.gauss_newton(lambda p, x: jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None]) @ p["c"])
SOLVERS = {
    "kfac": lambda: ng.kfac(X, example_params=PARAMS),
    "kfac-exact": lambda: ng.kfac(X, example_params=PARAMS, damping_split="exact"),
    "ekfac": lambda: ng.ekfac(X, example_params=PARAMS),
    "preconditioner": lambda: ng.cg(preconditioner=ng.kfac(X, example_params=PARAMS)),
}
MASKS = [
    {"a": True, "c": False},
    {"a": False, "c": True},
    {"a": {"w": True, "b": False}, "c": True},
]


def direction(solver):
    return ng.scale_by_natural_gradient(METRIC, solver=solver, momentum=0.9)


def inject(solver):
    return optax.inject_hyperparams(ng.scale_by_natural_gradient)(METRIC, solver=solver)


WRAPPERS = {
    "masked": lambda solver, mask: optax.masked(direction(solver), mask),
    "chain": lambda solver, mask: optax.chain(
        optax.clip(1.0), optax.masked(direction(solver), mask), optax.scale(-1.0)
    ),
    "injected": lambda solver, mask: optax.masked(inject(solver), mask),
    "inside levenberg_marquardt": lambda solver, mask: ng.levenberg_marquardt(
        optax.masked(direction(solver), mask), METRIC
    ),
    "bound": lambda solver, mask: ng.bind_batch(optax.masked(direction(solver), mask), X),
}


def mapped(tx, state):
    """Seven in place of what is like parameters, one in place of all else."""
    return optax.tree.map_params(
        tx,
        lambda x: jnp.full_like(x, 7),
        state,
        transform_non_params=lambda x: jnp.full_like(x, 1),
    )


def marked(tx):
    """Where there are sevens."""
    state = tx.init(jax.tree.map(jnp.asarray, PARAMS))
    found = jax.tree.map(np.asarray, mapped(tx, state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert all(np.all((x == 7) | (x == 1)) for x in jax.tree.leaves(found))
    paths = jax.tree_util.tree_leaves_with_path(found)
    return [jax.tree_util.keystr(path) for path, x in paths if x.size and np.all(x == 7)]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS)
def test_states_of_the_visible_leaves_are_mapped(solver, mask, x64):
    found = marked(WRAPPERS["masked"](SOLVERS[solver](), mask))
    visible = len(jax.tree.leaves(jax.tree.map(lambda m, p: p if m else None, mask, PARAMS)))
    per_tree = 1 + (solver == "preconditioner")  # momentum, and the start of conjugate gradients
    assert len(found) == per_tree * visible
    assert all("velocity" in path or "previous" in path for path in found)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_so_they_are_inside_wrappers(wrapper, x64):
    found = marked(WRAPPERS[wrapper](SOLVERS["kfac"](), MASKS[0]))
    assert sum("velocity" in path for path in found) == (0 if wrapper == "injected" else 2)


def test_without_a_mask_all_are_mapped(x64):
    assert len(marked(direction(SOLVERS["kfac"]()))) == 3


def test_a_solver_in_two_parts_of_a_partition_answers_with_a_prefix(x64):
    """No argument of `init` says which of them is asked."""
    solver = SOLVERS["kfac"]()
    tx = optax.partition({"a": direction(solver), "c": direction(solver)}, {"a": "a", "c": "c"})
    state = tx.init(PARAMS)
    same = optax.tree.map_params(tx, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    whole = optax.tree.map_params(
        tx, lambda x: jnp.full_like(x, 7), state, transform_non_params=lambda x: type(x).__name__
    )
    inner = whole.inner_states["a"].inner_state
    assert inner.solver == "KFACState"
    assert all(np.all(x == 7) for x in jax.tree.leaves(inner.velocity))


def test_one_in_each_part_is_mapped_in_full(x64):
    one, two = SOLVERS["kfac"](), SOLVERS["ekfac"]()
    tx = optax.partition({"a": direction(one), "c": direction(two)}, {"a": "a", "c": "c"})
    assert len(marked(tx)) == 3

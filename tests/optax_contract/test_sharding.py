"""P12: over eight devices, Auto and Explicit axes, types stay and numbers agree with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

import natgrad_jax as ng

from . import cases
from . import oracle

AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
LAYOUT = {"b": PartitionSpec(), "w": PartitionSpec("devices")}
BATCH_LAYOUTS = {"replicated": PartitionSpec(), "sharded": PartitionSpec("devices")}

_rng = np.random.default_rng(1)
PARAMS, GRADS = (
    {"b": _rng.normal(size=(2,)).astype("f"), "w": _rng.normal(size=(8, 2)).astype("f")}
    for _ in range(2)
)
BATCH = {"x": _rng.normal(size=(8, 8)).astype("f"), "y": _rng.integers(0, 2, 8).astype("i")}

# What runs on the devices, for each kind of axes: programs over eight devices compile slowly.
RUN = [
    ("auto", "scale_by_natural_gradient-woodbury"),
    ("auto", "natural_gradient-everything"),
    ("auto", "scale_by_steepest_descent-l1"),
    ("auto", "scale_by_steepest_descent-l2"),
    ("explicit", "scale_by_natural_gradient-cg_diagonal"),
    ("explicit", "scale_to_kl"),
    ("explicit", "scale_by_steepest_descent-l1"),
    ("explicit", "scale_by_steepest_descent-l2"),
]


def mesh(axes):
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("devices",), axis_types=(AXES[axes],))


def placed(axes, batch_layout):
    """Parameters, gradients and batch on the mesh."""
    on = lambda spec: NamedSharding(mesh(axes), spec)
    tree = lambda values: {name: jax.device_put(values[name], on(LAYOUT[name])) for name in values}
    batch = jax.device_put(BATCH, on(BATCH_LAYOUTS[batch_layout]))
    return tree(PARAMS), tree(GRADS), batch


def same_sharding(new, old):
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def on_one_device(name):
    fisher = oracle.matrix("exact_fisher", PARAMS, BATCH)
    theta, g = oracle.ravel(PARAMS), oracle.ravel(GRADS)
    if name == "scale_by_steepest_descent-l1":
        return np.where(np.arange(g.size) == np.argmax(np.abs(g)), np.sign(g), 0)
    if name == "scale_by_steepest_descent-l2":
        return g / np.linalg.norm(g)
    if name == "scale_to_kl":
        return g * np.sqrt(2 * cases.CASES[name].arguments["kl"] / (g @ fisher @ g))
    d = oracle.solve(fisher, cases.DAMPING, g)
    if name == "natural_gradient-everything":
        settings = cases.CASES[name].arguments
        d = -settings["learning_rate"] * (d + settings["weight_decay"] * theta)
        d *= min(1, np.sqrt(2 * settings["max_kl"] / (d @ fisher @ d)))
    return d


def close(name, got, expected):
    # F + damping I has a condition number of a few hundred; cg stops at 1e-6, ten eps.
    oracle.close(got, expected, np.finfo(np.float32).eps, 1000 if "cg" in name else 100)


@pytest.mark.parametrize("name", cases.CASES)
def test_explicit_axes_stay_in_the_types(name):
    """With Explicit axes shardings are part of types: tracing shows them for every row."""
    params, grads, batch = placed("explicit", "sharded")
    tx = cases.CASES[name].make(**cases.shaped(name, PARAMS, BATCH))
    state = tx.init(params)
    value_fn = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    update = functools.partial(tx.update, value_fn=value_fn)
    updates, new = jax.eval_shape(update, grads, state, params, batch=batch)
    shardings = lambda tree: [jax.typeof(x).sharding for x in jax.tree.leaves(tree)]
    traced = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
    specs = lambda found: [s.spec for s in found]
    assert specs(traced(updates)) == specs(shardings(grads))
    assert specs(traced(new)) == specs(shardings(state))


@pytest.mark.parametrize(("axes", "name"), RUN)
def test_updates_and_state_stay_where_they_were(axes, name):
    params, grads, batch = placed(axes, "sharded")
    tx = cases.transformation(name)
    state = tx.init(params)
    updates, new = tx.update(grads, state, params, batch=batch)
    same_sharding(updates, grads)
    same_sharding(new, state)
    close(name, jax.device_get(updates), on_one_device(name))


@pytest.mark.smoke
def test_a_jitted_update_agrees_and_is_compiled_once():
    name = "natural_gradient-everything"
    params, grads, batch = placed("explicit", "replicated")
    tx = cases.transformation(name)
    state = tx.init(params)
    step = jax.jit(tx.update)
    updates, new = step(grads, state, params, batch=batch)
    before = cases.TRACES["model"]
    step(grads, new, params, batch=batch)
    assert cases.TRACES["model"] == before
    same_sharding((updates, new), (grads, state))
    close(name, jax.device_get(updates), on_one_device(name))


def test_explicit_axes_need_care():
    """The control: the linear algebra inside, run as it is, raises under Explicit axes."""
    _, grads, _ = placed("explicit", "sharded")
    with pytest.raises(Exception, match="shard"):
        jax.eval_shape(
            lambda g: jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(g)]), grads
        )


def test_a_state_kept_on_one_device_is_noticed():
    """The control: the comparison of shardings has power."""
    params, _, _ = placed("auto", "sharded")
    elsewhere = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), params)
    with pytest.raises(AssertionError):
        same_sharding(elsewhere, params)


def test_momentum_is_sharded_like_its_parameter():
    params, _, _ = placed("auto", "sharded")
    state = ng.scale_by_natural_gradient(ng.euclidean(), momentum=0.9).init(params)
    same_sharding(state.velocity, params)

"""The properties as functions of a transformation, so that broken ones can be shown to fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def types(tree):
    """Structure, and shape, dtype and weak type of every leaf."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda t: t, tree))
    return structure, [(x.shape, x.dtype.name, bool(x.weak_type)) for x in leaves]


def updated(tx, params, grads, batch, **extra):
    """What init and update give, traced and not run."""

    def both(params, grads, batch):
        state = tx.init(params)
        return state, *tx.update(grads, state, params, batch=batch, **extra)

    return jax.eval_shape(both, params, grads, batch)


def accepts_unknown_keywords(tx, params, grads, batch):
    state = tx.init(params)
    known = tx.update(grads, state, params, batch=batch)
    unknown = tx.update(grads, state, params, batch=batch, unknown=jnp.ones(3), another="text")
    jax.tree.map(np.testing.assert_array_equal, known, unknown)


def keeps_types(tx, params, grads, batch):
    """Updates have the types of the gradient, the new state those of the old one."""
    before, updates, after = updated(tx, params, grads, batch)
    assert types(updates) == types(grads)
    assert types(after) == types(before)


def can_be_skipped(tx, params, grads, batch):
    def step(skip, grads, state, params, batch):
        update = lambda: tx.update(grads, state, params, batch=batch)
        return jax.lax.cond(skip, lambda: (grads, state), update)

    jax.eval_shape(step, jnp.asarray(True), grads, tx.init(params), params, batch)


def same_types_compiled(tx, params, grads, batch):
    state = tx.init(params)
    assert types(jax.eval_shape(tx.init, params)) == types(state)
    traced = jax.eval_shape(tx.update, grads, state, params, batch=batch)
    assert types(tx.update(grads, state, params, batch=batch)) == types(traced)


def starts_from_shapes(tx, params, grads, batch):
    del grads, batch
    assert types(tx.init(jax.eval_shape(lambda p: p, params))) == types(tx.init(params))


def maps_params(tx, params_like, params, grads, batch):
    """`optax.tree.map_params` finds the trees like the parameters, and nothing else."""
    _, state = tx.update(grads, tx.init(params), params, batch=batch)
    mapped = optax.tree.map_params(
        tx,
        lambda x: jnp.full_like(x, 7),
        state,
        transform_non_params=lambda x: jnp.full_like(x, 1),
    )
    found = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(mapped)
        if np.all(np.asarray(x) == 7)
    ]
    expected = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
        if any(f".{field}" in jax.tree_util.keystr(path) for field in params_like)
    ]
    assert found == expected


def no_field_of_the_objective(tx, params, grads, batch):
    """`optax.value_and_grad_from_state` reads `value` and `grad` of any state it finds."""
    del grads, batch
    state = tx.init(params)
    for field in ("value", "grad"):
        assert optax.tree.get_all_with_path(state, field) == []


#: Checks that need a transformation and the arrays of a problem.
CHECKS = {
    check.__name__: check
    for check in (
        accepts_unknown_keywords,
        can_be_skipped,
        same_types_compiled,
        starts_from_shapes,
        no_field_of_the_objective,
    )
}

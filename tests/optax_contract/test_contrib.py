"""P15: wrappers of `optax.contrib`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

from . import cases
from . import oracle

EPS = np.finfo(np.float64).eps
# Whatever makes a step; `schedule_free` averages, and so wants no momentum inside.
STEPS = ["natural_gradient-everything", "levenberg_marquardt", "adaptive_natural_gradient", "trpo"]


@pytest.mark.parametrize("name", STEPS)
def test_the_first_step_of_schedule_free_is_that_of_what_is_inside(name, x64, standard_promotion):
    """Its average then holds one point."""
    params, grads, batch = cases.arrays()
    tx = cases.transformation(name)
    expected, _ = tx.update(grads, tx.init(params), params, batch=batch)
    wrapped = optax.contrib.schedule_free(tx, 0.1)
    got, state = wrapped.update(grads, wrapped.init(params), params, batch=batch)
    oracle.close(got, expected, EPS, 1000)
    if name != "natural_gradient-everything":
        np.testing.assert_allclose(ng.info(state).damping, cases.DAMPING, rtol=1e-6)
    with pytest.raises(TypeError, match="needs the keyword argument `batch`"):
        wrapped.update(grads, wrapped.init(params), params)


@pytest.mark.parametrize("name", ["scale_by_natural_gradient-automatic", "scale_to_kl"])
def test_sam_forwards_no_keywords_so_that_the_batch_is_bound(name, x64, standard_promotion):
    params, grads, batch = cases.arrays()
    tx = cases.transformation(name)
    expected, _ = tx.update(grads, tx.init(params), params, batch=batch)
    sam = lambda inner: optax.contrib.sam(inner, optax.sgd(0.0))
    bound = sam(ng.bind_batch(tx, batch))
    state = bound.init(params)
    first, state = bound.update(grads, state, params)
    assert all(np.all(x == 0) for x in jax.tree.leaves(first))  # the adversary's, of length zero
    second, _ = bound.update(grads, state, params)
    oracle.close(second, expected, EPS, 1000)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        sam(tx).update(grads, sam(tx).init(params), params, batch=batch)


@pytest.mark.parametrize("name", STEPS)
def test_bound_it_does_what_it_does_alone(name, x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation(name)
    expected, _ = tx.update(grads, tx.init(params), params, batch=batch)
    bound = ng.bind_batch(tx, jax.tree.map(jnp.asarray, batch))
    state = bound.init(params)
    got, new = jax.jit(bound.update)(grads, state, params)
    oracle.close(got, expected, EPS, 1000)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)

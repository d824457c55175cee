"""optax's line searches after a natural gradient direction.

They call `value_fn` at trial parameters, with those extra arguments of `update` that its signature
names; a keyword that it does not name is an error. So it has to name `batch`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

bernoulli = ng.Bernoulli()


def model(params, batch):
    x, _ = batch
    return jnp.tanh(x @ params["hidden"]) @ params["head"]


def value_fn(params, batch):
    return -jnp.mean(bernoulli.log_prob(model(params, batch), batch[1]))


metric = ng.exact_fisher(model, bernoulli)


@pytest.fixture(scope="module")
def tumours():
    """Five standardised features of 200 tumours, and whether they are benign."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_breast_cancer()
    x = data.data[:200, :5]
    x = np.column_stack([np.ones(200), (x - x.mean(axis=0)) / x.std(axis=0)])
    return np.float32(x), np.float32(data.target[:200])


def start():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(first, (6, 4)),
        "head": jax.random.normal(second, (4,)),
    }


LINE_SEARCHES = {
    "backtracking": optax.scale_by_backtracking_linesearch(20, store_grad=True),
    "zoom": optax.scale_by_zoom_linesearch(20),
}


def descend(tx, batch, steps, value_and_grad):
    """The values before each of some steps."""

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, batch, state=state)
        updates, state = tx.update(
            grad, state, params, batch=batch, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    params, values = start(), []
    state = tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return np.asarray(values)


# A direction thirty times too long, so that there is something to search.
TOO_LONG = optax.chain(ng.scale_by_natural_gradient(metric, damping=1e-4), optax.scale(-30.0))


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_the_value_falls_at_every_step_however_long_the_direction(tumours, name):
    # The line search keeps value and gradient at its last trial point: no need to compute them
    # again.
    value_and_grad = optax.value_and_grad_from_state(value_fn)
    values = descend(optax.chain(TOO_LONG, LINE_SEARCHES[name]), tumours, 6, value_and_grad)
    assert np.all(np.diff(values) < 0)
    assert values[-1] < 0.5 * values[0]


def test_without_a_line_search_such_a_direction_overshoots(tumours):
    value_and_grad = lambda params, batch, state: jax.value_and_grad(value_fn)(params, batch)
    values = descend(TOO_LONG, tumours, 6, value_and_grad)
    assert np.any(np.diff(values) > 0)


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_value_function_that_does_not_name_the_batch_is_an_error(tumours, name):
    tx = optax.chain(ng.scale_by_natural_gradient(metric), optax.scale(-1.0), LINE_SEARCHES[name])
    params = start()
    with pytest.raises(TypeError, match="batch"):
        tx.update(
            params,
            tx.init(params),
            params,
            batch=tumours,
            value=jnp.float32(1.0),
            grad=params,
            value_fn=lambda params: value_fn(params, tumours),
        )

"""What holds of every model: rows, products and independence."""

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_jax as ng
from tests.models import oracle


def names(jaxpr) -> set[str]:
    """The primitives of a jaxpr, at any depth."""
    found = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found.add(equation.primitive.name)
        for value in equation.params.values():
            inner = value if isinstance(value, tuple | list) else [value]
            found.update(*(names(x) for x in inner if hasattr(x, "eqns")))
    return found


def refusal(function, params, batch, expected) -> str | None:
    """What JAX says where it cannot take the rows itself, if that is what the table expects."""
    try:
        jax.eval_shape(lambda p: oracle.gauss_newton_rows(function, p, batch), params)
    except (NotImplementedError, ValueError) as error:
        if not expected or expected not in str(error):
            raise
        return str(error).splitlines()[0]
    return None


def check(function, params, batch, rtol, other=None) -> str:
    """Compares with reverse mode over the whole batch; returns the mode of the rows."""
    metric = ng.gauss_newton(function)
    mode = ng.explain(metric, params, batch).mode
    assert mode in ("examples", "whole"), mode
    outputs = jax.eval_shape(function, params, batch)
    v = oracle.draw_like(params, 1)
    u = jnp.asarray(np.random.default_rng(2).normal(size=outputs.size), outputs.dtype)

    def everything(params, batch, other, v, u):
        rows = oracle.gauss_newton_rows(function, params, batch)
        results = oracle.engine_results(function, params, batch, v, u)
        product = ng.fisher_vector_product(metric, params, batch, v)
        return rows, results, product, function(params, batch), function(params, other)

    other = batch if other is None else _first_replaced(batch, other)
    outcome, warned = oracle.quietly(oracle.compiled, everything, params, batch, other, v, u)
    _compare(outcome, params, v, u, rtol)
    assert bool(warned) == (mode == "whole"), (mode, warned)
    if mode == "examples":
        _others_keep_their_outputs(*outcome[3:])
    return mode


def _first_replaced(batch, other):
    return jax.tree.map(lambda x, y: x.at[0].set(y[0]), batch, other)


def _compare(outcome, params, v, u, rtol):
    rows, results, product = outcome[:3]
    rows = np.asarray(rows, np.float64)
    assert np.all(np.isfinite(rows)), "reverse mode itself is not finite: the case needs a domain"
    exact = rows.T @ (rows @ oracle.flat(v))  # first: it needs no rows of the engine
    error = np.max(np.abs(oracle.flat(product) - exact))
    assert error <= rtol * max(np.max(np.abs(exact)), 1e-30), ("fisher vector product", error)
    oracle.assert_same(results, oracle.expected_results(rows, params, v, u), rtol)


def _others_keep_their_outputs(before, after):
    """Another first example may not change the outputs of the rest."""
    scale = np.max(np.abs(before))
    np.testing.assert_allclose(after[1:], before[1:], atol=1e-6 * scale, rtol=0)


def mixing_is_found(function, params, batch):
    """The control: examples that do mix are never taken apart."""
    assert ng.explain(ng.gauss_newton(function), params, batch).mode == "whole"

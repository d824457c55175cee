"""Dense rows, from reverse mode over the whole batch, and their products in numpy."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_jax as ng
from natgrad_jax.jacobian import jacobian

# Hundreds of small programs are compiled once and run once.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function, *args):
    """The results of a function, compiled without optimisation."""
    return jax.jit(function).lower(*args).compile(compiler_options=FAST)(*args)


def at_dtype(tree, dtype):
    """Floating point leaves in one dtype."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, tree)


def flat(tree):
    """All leaves of a tree as one vector."""
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def draw_like(tree, seed):
    """A standard normal tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def gauss_newton_rows(function, params, batch):
    """Rows of the Gauss-Newton matrix: every output entry by reverse mode, over its leaf's rows."""
    jacobians = jax.jacrev(lambda p: jax.tree.leaves(function(p, batch)))(params)
    outputs = jax.eval_shape(lambda p: jax.tree.leaves(function(p, batch)), params)
    count = len(jax.tree.leaves(params))
    leaves, rows = jax.tree.leaves(jacobians), []
    for i, output in enumerate(outputs):
        own = leaves[i * count : (i + 1) * count]
        line = [x.reshape(output.size, -1) for x in own]
        rows.append(jnp.concatenate(line, axis=1) / output.shape[0] ** 0.5)
    return jnp.concatenate(rows)


def engine_results(function, params, batch, v, u, *, batch_axes=0):
    """Everything the engine gives for a Gauss-Newton metric, in one program."""
    metric = ng.gauss_newton(function, batch_axes=batch_axes)
    outputs = function(params, batch)
    at_outputs = metric.output_metric(outputs, batch, None)
    rows = jacobian("test", function, params, batch, at_outputs, metric.groups(batch))
    return {
        "gram": rows.gram(),
        "diagonal": rows.diagonal(),
        "blocks": rows.blocks(),
        "product": rows.product(v),
        "transposed product": rows.transposed_product(u),
        "squared norms": rows.squared_norms(),
        "rows": rows.matrix(),
    }


def expected_results(dense, params, v, u):
    """The same from dense rows."""
    sizes = np.cumsum([0, *(x.size for x in jax.tree.leaves(params))])
    parts = [dense[:, a:b] for a, b in itertools.pairwise(sizes)]
    return {
        "gram": dense @ dense.T,
        "diagonal": (dense**2).sum(0),
        "blocks": np.concatenate([(r.T @ r).reshape(-1) for r in parts]),
        "product": dense @ flat(v),
        "transposed product": dense.T @ np.asarray(u),
        "squared norms": (dense**2).sum(1),
        "rows": dense,
    }


def assert_same(results, expected, rtol):
    """Every result to `rtol` of the largest entry."""
    for name, value in expected.items():
        actual = results[name]
        actual = flat(actual) if name in ("diagonal", "blocks", "transposed product") else actual
        error = np.max(np.abs(np.asarray(actual, np.float64) - value))
        assert error <= rtol * max(np.max(np.abs(value)), 1e-30), (name, error)


def quietly(function, *args):
    """Calls a function; returns its result and the warnings about mixing examples."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(w.message) for w in caught if "independent" in str(w.message)]

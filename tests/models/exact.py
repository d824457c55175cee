"""Fisher matrices and directions of a model, against those of dense rows from `jax.jacrev`."""

import jax
import numpy as np

import natgrad_jax as ng
from tests.models import oracle

DAMPING = 0.1
#: Every solver that solves with F itself.
EXACT = {
    "cholesky": ng.cholesky(),
    "woodbury": ng.woodbury(),
    "automatic": None,
    "cg": ng.cg(tol=1e-12, max_iterations=500),
}


def normals(seed, **shapes):
    """A standard normal array for each name, in float64."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def fisher_of(function, params, batch, roots=None):
    """The Gauss-Newton matrix; with the mean over rows of J^T B B^T J for roots B (N, C, K)."""
    if roots is None:
        own = lambda p, b: oracle.gauss_newton_rows(function, p, b)
        rows = np.asarray(oracle.compiled(own, params, batch))
        return rows.T @ rows
    jacobians = jax.tree.leaves(jax.jacrev(lambda p: function(p, batch))(params))
    parts = [np.asarray(x).reshape(*roots.shape[:2], -1) for x in jacobians]
    rows = np.einsum("nck,ncp->nkp", roots, np.concatenate(parts, axis=-1))
    return np.einsum("nkp,nkq->pq", rows, rows) / len(rows)


def solved(fisher, grads, damping=DAMPING):
    """(F + damping I)^-1 g as a vector."""
    return np.linalg.solve(fisher + damping * np.eye(len(fisher)), oracle.flat(grads))


def blocks_only(fisher, params):
    """F with zeros outside the blocks of parameter leaves."""
    places = np.repeat(
        range(len(jax.tree.leaves(params))), [x.size for x in jax.tree.leaves(params)]
    )
    return fisher * (places[:, None] == places)


def direction(metric, params, batch, grads, solver, **more):
    """The direction alone, at the damping of all of these tests."""
    d, _ = ng.natural_gradient_direction(
        metric, params, batch, grads, solver=solver, damping=DAMPING, **more
    )
    return d


def found_by(metric, params, batch, grads, solvers):
    """F, F g and the directions of several solvers, in one program."""

    def everything(params, batch, grads):
        one = lambda solver: direction(metric, params, batch, grads, solver)
        return {
            "fisher": ng.fisher_matrix(metric, params, batch),
            "product": ng.fisher_vector_product(metric, params, batch, grads),
            **{name: one(solver) for name, solver in solvers.items()},
        }

    return oracle.quietly(oracle.compiled, everything, params, batch, grads)


def assert_close(actual, expected, name, rtol=1e-8):
    """To `rtol` of the largest entry."""
    actual = oracle.flat(actual).reshape(np.shape(expected))
    error = np.max(np.abs(actual - expected))
    assert error <= rtol * np.max(np.abs(expected)), (name, error, np.max(np.abs(expected)))


def assert_exact(
    function, params, batch, *, mode="examples", batch_axes=0, metric=None, fisher=None, rtol=1e-8
):
    """F, its product and every exact direction are those of dense rows.

    Args:
      function, params, batch, batch_axes: as for a metric.
      mode: what `explain` says of the examples; None for whatever it says.
      metric: the metric; None for Gauss-Newton.
      fisher: its matrix; None for the Gauss-Newton matrix.
      rtol: to which all of it must hold.
    """
    metric = ng.gauss_newton(function, batch_axes=batch_axes) if metric is None else metric
    fisher = fisher_of(function, params, batch) if fisher is None else fisher
    grads = oracle.draw_like(params, 1)
    found, warned = found_by(metric, params, batch, grads, EXACT)
    assert_close(found["fisher"], fisher, "fisher", rtol)
    assert_close(found["product"], fisher @ oracle.flat(grads), "product", rtol)
    for name in EXACT:
        assert_close(found[name], solved(fisher, grads), name, rtol)
    if mode is not None:
        report, _ = oracle.quietly(ng.explain, metric, params, batch)
        assert report.mode == mode, str(report)
        assert bool(warned) == (mode == "whole"), warned

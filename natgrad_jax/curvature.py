"""A metric at a point: what solvers see of it.

The one place where a metric, parameters and a batch meet. Everything downstream asks the resulting
:class:`Curvature` for products or rows and knows neither model nor likelihood.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _random
from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax._linearization import linear_maps
from natgrad_jax._linearization import push_forward
from natgrad_jax.jacobian import Jacobian
from natgrad_jax.jacobian import Kronecker
from natgrad_jax.jacobian import jacobian as _rows
from natgrad_jax.jacobian import kronecker as _blocks
from natgrad_jax.metrics import Metric
from natgrad_jax.metrics import OutputMetric

Tree = Any
Linear = Callable[[Tree], Tree]


class Curvature(NamedTuple):
    """F at one point. Its functions do their work when called, so nothing unused is computed.

    Attributes:
      params: the parameters, for their shapes.
      dtype: the dtype that linear algebra runs in.
      name: the metric's public name.
      definite: whether F is positive semi-definite by construction.
      linearize: () -> (v -> F v), on params-like trees of `dtype`. The model is linearised by this
        call: make it once, outside loops.
      num_rows: () -> M, the rows of R; None when F has no rows.
      jacobian: () -> the rows R of F = R^T R; None when F has no rows.
      kronecker: () -> the parameters in blocks, with what enters and leaves their uses; None when
        F has no rows.
    """

    params: Tree
    dtype: jnp.dtype
    name: str
    definite: bool
    linearize: Callable[[], Linear]
    num_rows: Callable[[], int] | None = None
    jacobian: Callable[[], Jacobian] | None = None
    kronecker: Callable[[], Kronecker] | None = None


def curvature(metric: Metric, params: Tree, batch: Tree, key: jax.Array | None) -> Curvature:
    """Puts a metric at `params` and `batch`; `key` fixes its samples.

    Raises:
      ValueError: the metric samples and there is no key.
    """
    if metric.needs_key and key is None:
        raise ValueError(f"{metric.name}: this metric draws samples: pass key=jax.random.key(...)")
    if key is not None:
        key = _random.typed_key(metric.name, key)
    if metric.groups is not None:
        metric.groups(batch)  # sizes that disagree are named before the model trips over them
    dtype = _trees.work_dtype(params)
    here = Curvature(params, dtype, metric.name, metric.definite, lambda: lambda v: v)
    if metric.outputs is None:
        return here
    if metric.output_metric is None:
        return here._replace(linearize=lambda: _hessian_product(metric, params, batch, dtype))

    def output_metric(outputs: Tree) -> OutputMetric:
        examples.check_outputs(metric.name, outputs, metric.groups(batch))
        return metric.output_metric(outputs, batch, key)

    def linearize() -> Linear:
        outputs, push, pull = linear_maps(metric.name, lambda p: metric.outputs(p, batch), params)
        product = output_metric(outputs).product

        def fisher_product(v: Tree) -> Tree:
            v, above = _trees.narrowed(v, params, dtype)
            cotangent, below = _trees.narrowed(product(push(v)), outputs, dtype)
            found = _trees.cast(pull(cotangent), dtype)
            return jax.tree.map(lambda x: x * above * below, found)

        return fisher_product

    def num_rows() -> int:
        zeros = lambda c: jnp.zeros(c.shape, c.dtype)
        coefficients = lambda p: output_metric(metric.outputs(p, batch)).coefficients
        return _trees.size(jax.eval_shape(lambda p: jax.tree.map(zeros, coefficients(p)), params))

    def read(reader: Callable[..., Any], **options: Any) -> Any:
        at_outputs = output_metric(metric.outputs(params, batch))
        groups = metric.groups(batch)
        operands = metric.name, metric.outputs, params, batch, at_outputs, groups
        return reader(*operands, metric.independent, **options)

    return here._replace(
        linearize=linearize,
        num_rows=num_rows,
        jacobian=lambda: read(_rows),
        kronecker=lambda: read(_blocks, weighted=metric.weighted),
    )


def dense_matrix(here: Curvature) -> jax.Array:
    """F as a matrix (P, P), leaves raveled in tree order."""
    if not jax.tree.leaves(here.params):
        return jnp.zeros((0, 0), here.dtype)
    if here.jacobian is not None:
        return dense_from_rows(here.jacobian())
    product = here.linearize()
    basis = jnp.eye(_trees.size(here.params), dtype=here.dtype)
    column = lambda e: _trees.ravel(product(_trees.unravel(e, here.params)))
    return jax.vmap(column, out_axes=1)(basis)


def dense_from_rows(rows: Jacobian) -> jax.Array:
    """F = R^T R as a matrix (P, P)."""
    matrix = rows.matrix()
    return jnp.matmul(matrix.T, matrix, precision=jax.lax.Precision.HIGHEST)


def diagonal(here: Curvature) -> Tree:
    """The diagonal of F, params-like; without rows by one product for each parameter."""
    if not jax.tree.leaves(here.params):
        return here.params
    if here.jacobian is not None:
        return here.jacobian().diagonal()
    product, n = here.linearize(), _trees.size(here.params)

    def entry(i: jax.Array) -> jax.Array:
        unit = (jnp.arange(n) == i).astype(here.dtype)
        return _trees.ravel(product(_trees.unravel(unit, here.params)))[i]

    return _trees.unravel(jax.lax.map(entry, jnp.arange(n)), here.params)


def blocks(here: Curvature) -> Tree:
    """For every leaf of P_l parameters its diagonal block of F, (P_l, P_l)."""
    if here.jacobian is not None:
        return here.jacobian().blocks()
    product = here.linearize()
    leaves, treedef = jax.tree.flatten(here.params)
    zeros = [jnp.zeros(leaf.shape, here.dtype) for leaf in leaves]

    def block(i: int) -> jax.Array:
        def column(e: jax.Array) -> jax.Array:
            tangent = [*zeros[:i], e.reshape(leaves[i].shape), *zeros[i + 1 :]]
            return jax.tree.leaves(product(jax.tree.unflatten(treedef, tangent)))[i].reshape(-1)

        return jax.vmap(column, out_axes=1)(jnp.eye(leaves[i].size, dtype=here.dtype))

    return jax.tree.unflatten(treedef, [block(i) for i in range(len(leaves))])


def squared_length(
    metric: Metric, params: Tree, batch: Tree, tangent: Tree, key: jax.Array | None = None
) -> jax.Array:
    """d^T F d by one Jacobian product; see `inner_products`."""
    return inner_products(metric, params, batch, [tangent], key)[0, 0]


def inner_products(
    metric: Metric, params: Tree, batch: Tree, tangents: list[Tree], key: jax.Array | None = None
) -> jax.Array:
    """The matrix of d_i^T F d_j by one Jacobian product each, with the metric that measures.

    That is the exact Fisher matrix of the metric's model and likelihood where it has them, a
    sampled one with a key of its own where the likelihood has none, the metric itself otherwise: no
    key is needed.
    """
    dtype = _trees.work_dtype(params)
    if not jax.tree.leaves(params):
        return jnp.zeros((len(tangents), len(tangents)), dtype)
    wide = [_trees.cast(tangent, dtype) for tangent in tangents]
    if metric.distance_metric is None:
        product = curvature(metric, params, batch, key).linearize()
        return _dots(wide, [product(v) for v in wide], dtype)
    groups = metric.groups(batch)
    function = lambda p: metric.outputs(p, batch)
    outputs, pushes = push_forward(metric.name, function, params, wide)
    examples.check_outputs(metric.name, outputs, groups)
    product = metric.distance_metric(outputs, batch, key).product
    left = [_trees.cast(pushed, dtype) for pushed in pushes]
    return _dots(left, [_trees.cast(product(pushed), dtype) for pushed in pushes], dtype)


def _dots(left: list[Tree], right: list[Tree], dtype: jnp.dtype) -> jax.Array:
    return jnp.stack([jnp.stack([_trees.vdot(x, y, dtype) for y in right]) for x in left])


def _hessian_product(metric: Metric, params: Tree, batch: Tree, dtype: jnp.dtype) -> Linear:
    value = jax.eval_shape(metric.outputs, params, batch)
    if len(jax.tree.leaves(value)) != 1 or jax.tree.leaves(value)[0].shape != ():
        raise ValueError(f"{metric.name}: loss(params, batch) must return a scalar, got {value}")
    _, product = jax.linearize(jax.grad(lambda p: metric.outputs(p, batch)), params)

    def hessian_product(v: Tree) -> Tree:
        v, above = _trees.narrowed(v, params, dtype)
        return jax.tree.map(lambda x: x * above, _trees.cast(product(v), dtype))

    return hessian_product

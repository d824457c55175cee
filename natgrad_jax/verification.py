"""A certificate of the rows that solvers work with, measured at the model and batch at hand."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _independence
from natgrad_jax import _random
from natgrad_jax import _trees
from natgrad_jax._linearization import push_forward
from natgrad_jax.curvature import curvature
from natgrad_jax.explanation import explain
from natgrad_jax.jacobian import columns
from natgrad_jax.metrics import Metric

Tree = Any


class Verification(NamedTuple):
    """What :func:`verify` returns; prints as a table.

    Relative differences; None for what does not apply to the metric or the batch.

    Attributes:
      ok: whether every difference is within the tolerance, and all numbers are finite.
      products: R^T (R v) from rows against F v by Jacobian products of the whole batch.
      rows: R v against the change of the outputs along v, row by row.
      examples: the change of outputs of other examples when one example is replaced.
      alone: outputs of single examples alone against those within the batch.
      symmetry: u^T (R v) against (R^T u)^T v.
      finite: whether all of these numbers are finite.
      tolerance: the square root of the rounding unit of the coarsest floating point type in the
        model.
    """

    ok: bool
    products: float
    rows: float
    examples: float | None
    alone: float | None
    symmetry: float
    finite: bool
    tolerance: float

    def __str__(self) -> str:
        described = [
            ("products", "R^T (R v) against F v"),
            ("rows", "R v against changes of the outputs along v"),
            ("examples", "other outputs when one example is replaced"),
            ("alone", "examples alone against within the batch"),
            ("symmetry", "u^T (R v) against (R^T u)^T v"),
        ]
        lines = ["verified" if self.ok else "NOT VERIFIED: R is not the Jacobian of this model"]
        for name, text in described:
            value = getattr(self, name)
            shown = "not applicable" if value is None else f"{value:.1e}"
            wrong = value is not None and not value <= self.tolerance
            lines.append(f"  {name:<9} {shown:<14}  {text}" + (" <- too large" if wrong else ""))
        lines.append(f"  tolerance {self.tolerance:.1e}" + ("" if self.finite else ", not finite"))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def verify(
    metric: Metric, params: Tree, batch: Tree, *, key: jax.Array | None = None
) -> Verification:
    r"""Certifies the rows R of a metric against Jacobian products, for a few gradients' work.

    For random vectors v and u it compares

    .. math::
        R^T (R v) = F v, \qquad (R v)_r = \sqrt{w_r} B_r^T J_r v, \qquad u^T (R v) = (R^T u)^T v

    with rows R as solvers use them, and the right-hand sides from the model's own derivatives over
    the whole batch: F v and J v by jvp and vjp, output factors :math:`B_r`, row weights
    :math:`w_r`. Where rows are computed example by example, it also replaces an example and looks
    whether outputs of others change, and with ``independent=True`` evaluates examples alone: the
    first and the last of each group.

    Args:
      metric: a metric that has rows.
      params: parameters, a pytree of real arrays with P numbers.
      batch: pytree of arrays, as the metric's model takes it.
      key: random key (typed, legacy or an int seed) of the vectors and of a metric that samples;
        None for a fixed one.

    Returns:
      A :class:`Verification`: `ok`, and the largest relative difference of each comparison.

    Raises:
      ValueError: the metric has no rows.

    Examples:
      A model that centres over the batch, and a claim that it does not:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> model = lambda p, x: x @ p
      >>> x, p = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]]), jnp.ones((2,))
      >>> ng.verify(ng.gauss_newton(model), p, x).ok
      True
      >>> centered = lambda p, x: model(p, x) - jnp.mean(model(p, x))
      >>> ng.verify(ng.gauss_newton(centered, independent=True), p, x).ok
      False

    Notes:
      Six to ten passes over the batch, whatever P and N, beside the rows themselves: one backward
      pass for each output column, or for each row where examples mix. Products by reverse mode
      where the model has no forward mode. :func:`explain` tells how rows are held, this whether
      they are right.
    """
    name = "verify"
    _boundary.check_metric(name, metric)
    _boundary.check_params(name, params)
    _boundary.check_batch(name, batch)
    if metric.output_metric is None:
        raise ValueError(f"{name}: the metric {metric.name} has no rows")
    key = _random.typed_key(name, jax.random.key(0) if key is None else key)
    mode = explain(metric, params, batch).mode
    with jax.default_matmul_precision("highest"):  # of the model's own passes, too
        measured = _measured(metric, params, batch, key)
        by_example = mode != "whole" and any(group.size for group in metric.groups(batch))
        examples = _independence.influence(metric, params, batch) if by_example else None
        claimed = bool(metric.independent) and by_example
        alone = _independence.alone(metric, params, batch) if claimed else None
    products, rows, symmetry = (float(x) for x in measured)
    others = [None if x is None else float(x) for x in (examples, alone)]
    tolerance = _independence.tolerance(metric, params, batch)
    values = [x for x in (products, rows, symmetry, *others) if x is not None]
    finite = all(x < float("inf") for x in values)
    ok = finite and all(x <= tolerance for x in values)
    return Verification(ok, products, rows, others[0], others[1], symmetry, finite, tolerance)


@functools.partial(jax.jit, static_argnums=0)
def _measured(
    metric: Metric, params: Tree, batch: Tree, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The relative differences of products, rows and symmetry."""
    sampled, *drawn = jax.random.split(key, 3)
    here = curvature(metric, params, batch, sampled)
    jacobian, product = here.jacobian(), here.linearize()
    v = _trees.cast(_normal_like(drawn[0], params), here.dtype)
    pushed = jacobian.product(v)
    u = jax.random.normal(drawn[1], pushed.shape, here.dtype)
    back = jacobian.transposed_product(u)
    dot = lambda x, y: _trees.vdot(x, y, here.dtype)
    size = jnp.sqrt(dot(u, u) * dot(pushed, pushed))
    symmetry = _ratio(jnp.abs(dot(u, pushed) - dot(back, v)), size)
    products = _relative(jacobian.transposed_product(pushed), product(v), here.dtype)
    expected = _changes(metric, params, batch, sampled, v)
    rows = _relative(pushed, expected.astype(here.dtype), here.dtype)
    return products, rows, symmetry


def _changes(metric: Metric, params: Tree, batch: Tree, key: jax.Array, v: Tree) -> jax.Array:
    """Row by row B^T J v, from one Jacobian product of the whole batch."""
    function = lambda p: metric.outputs(p, batch)
    outputs, (pushed,) = push_forward("verify", function, params, [v])
    at_outputs = metric.output_metric(outputs, batch, key)
    spread = jax.eval_shape(at_outputs.factor_product, at_outputs.coefficients)
    transposed = jax.linear_transpose(at_outputs.factor_product, at_outputs.coefficients)
    (parts,) = transposed(_trees.cast_like(pushed, spread))
    rows = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(parts)])
    removed = at_outputs.removed
    return rows if removed is None else columns.centered(removed, rows)


def _normal_like(key: jax.Array, tree: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)


def _relative(one: Tree, two: Tree, dtype: jnp.dtype) -> jax.Array:
    """||one - two|| / ||two||."""
    difference = jax.tree.map(lambda x, y: x - y, one, two)
    norm = lambda x: jnp.sqrt(_trees.vdot(x, x, dtype))
    return _ratio(norm(difference), jnp.maximum(norm(one), norm(two)))


def _ratio(value: jax.Array, size: jax.Array) -> jax.Array:
    return jnp.where(size > 0, value / jnp.where(size > 0, size, 1), value)

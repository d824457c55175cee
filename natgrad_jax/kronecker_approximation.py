"""The Fisher matrix as K-FAC and EKFAC see it, for whoever needs more of it than a solve."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.curvature import curvature
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import _blocks
from natgrad_jax.solvers import _kronecker

Tree = Any


class KroneckerApproximation(NamedTuple):
    """A block-diagonal approximation of F, as functions.

    Attributes:
      product: v -> F v, params-like trees.
      solve: (v, damping) -> (F + damping I)^-1 v; damping 0 means the pseudo-inverse.
      trace: () -> tr F.
      log_determinant: damping -> log det (F + damping I).
      matrix: () -> F (P, P), leaves raveled in tree order. O(P^2) memory: for small models.
      blocks: the paths of the parameters that share each block. Parameters that no output depends
        on are in none: F is 0 there.
    """

    product: Callable[[Tree], Tree]
    solve: Callable[[Tree, jax.typing.ArrayLike], Tree]
    trace: Callable[[], jax.Array]
    log_determinant: Callable[[jax.typing.ArrayLike], jax.Array]
    matrix: Callable[[], jax.Array]
    blocks: tuple[tuple[str, ...], ...]


def kronecker_approximation(
    metric: Metric,
    params: Tree,
    batch: Tree,
    *,
    key: jax.Array | None = None,
    weight_sharing: str = "expand",
    eigenvalue_corrected: bool = False,
) -> KroneckerApproximation:
    r"""The Fisher matrix with a Kronecker product for each linear use, at one batch.

    .. math::
        F_l \approx B_l \otimes A_l = (Q_B \otimes Q_A)\, \mathrm{diag}(s_l)\, (Q_B \otimes Q_A)^T

    as :func:`kfac` takes it from a batch, with eigenvalues :math:`s_l` that are products of those
    of the factors, or, corrected, the second moments of :func:`ekfac`. For Laplace approximations
    take N F and a prior precision N times the damping; for elastic weight consolidation the
    quadratic form of `product`.

    Args:
      metric: a metric that has rows and is not centered.
      params: parameters, a pytree of real arrays with P numbers.
      batch: pytree of arrays, as the metric's model takes it.
      key: random key (typed, legacy or an int seed), for a metric that samples.
      weight_sharing: "expand" or "reduce", as for :func:`kfac`.
      eigenvalue_corrected: whether the eigenvalues are those of :func:`ekfac`.

    Returns:
      A :class:`KroneckerApproximation`, whose functions may be called inside `jax.jit` with this.

    Raises:
      ValueError: the metric has no rows or is centered, or ``weight_sharing`` is no such choice.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p["w"])
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> params = {"w": jnp.ones((3, 2))}
      >>> approximation = ng.kronecker_approximation(metric, params, x)
      >>> exact = ng.fisher_matrix(metric, params, x)       # one linear layer: they are the same
      >>> bool(jnp.allclose(approximation.matrix(), exact, atol=1e-5))
      True
      >>> _, expected = jnp.linalg.slogdet(exact + 0.1 * jnp.eye(6))
      >>> bool(jnp.allclose(approximation.log_determinant(0.1), expected, rtol=1e-4))
      True

    References:
      Martens and Grosse, 2015; George et al., 2018; Daxberger et al., 2021, Laplace redux.
    """
    name = "kronecker_approximation"
    _boundary.check_metric(name, metric)
    _boundary.check_params(name, params)
    _boundary.check_batch(name, batch)
    _blocks.check_choice(name, "weight_sharing", weight_sharing, ("expand", "reduce"))
    if metric.output_metric is None:
        raise ValueError(f"{name}: the metric {metric.name} has no rows")
    here = curvature(metric, params, batch, key)
    kronecker = here.kronecker()
    spectra = [
        _kronecker.spectrum(block, uses, own, corrected=eigenvalue_corrected)
        for block, uses, own in zip(
            kronecker.blocks,
            kronecker.uses,
            _kronecker.moments(kronecker, weight_sharing),
            strict=True,
        )
    ]

    def apply(v: Tree, function: Callable[[jax.Array], jax.Array], rest: Tree) -> Tree:
        parts = [
            _kronecker.turned_back(bases, function(values) * _kronecker.turned(bases, x))
            for x, (bases, values) in zip(kronecker.split(v), spectra, strict=True)
        ]
        return kronecker.merge(parts, rest)

    def product(v: Tree) -> Tree:
        return apply(v, lambda s: s, jax.tree.map(jnp.zeros_like, _trees.cast(v, here.dtype)))

    def solve(v: Tree, damping: jax.typing.ArrayLike) -> Tree:
        damping = jnp.asarray(damping).astype(here.dtype)
        rest = _blocks.outside(here, _trees.cast(v, here.dtype), damping)
        return apply(v, lambda s: _kronecker.damped_inverse(s, damping), rest)

    def trace() -> jax.Array:
        return sum((jnp.sum(values) for _, values in spectra), jnp.zeros((), here.dtype))

    def log_determinant(damping: jax.typing.ArrayLike) -> jax.Array:
        damping = jnp.asarray(damping).astype(here.dtype)
        outside = _trees.size(params) - sum(values.size for _, values in spectra)
        logs = (jnp.sum(jnp.log(values + damping)) for _, values in spectra)
        return sum(logs, outside * jnp.log(damping) if outside else jnp.zeros((), here.dtype))

    def matrix() -> jax.Array:
        column = lambda e: _trees.ravel(product(_trees.unravel(e, params)))
        return jax.vmap(column)(jnp.eye(_trees.size(params), dtype=here.dtype))

    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    blocks = tuple(tuple(paths[i] for i in own) for own in kronecker.leaves)
    return KroneckerApproximation(product, solve, trace, log_determinant, matrix, blocks)

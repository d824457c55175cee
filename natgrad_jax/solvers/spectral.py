"""Functions of the Fisher matrix, by the eigendecomposition of the smaller of F and R R^T."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric
from natgrad_jax import _trees
from natgrad_jax.curvature import Curvature
from natgrad_jax.curvature import dense_matrix
from natgrad_jax.solvers import _row_space
from natgrad_jax.solvers import _solver
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solve
from natgrad_jax.solvers._solver import Solver

Tree = Any

Gain = Callable[[jax.Array, jax.Array], jax.Array]


def spectral(gain: Gain | None = None) -> Solver:
    r"""Applies a function of the Fisher matrix to the gradient.

    .. math::
        d = \sum_i \gamma(h_i, \lambda)\, v_i v_i^T g

    over all eigenpairs :math:`(h_i, v_i)` of F, null ones included; the damping is :math:`\lambda`.

    Args:
      gain: function :math:`\gamma`: (eigenvalues (n,), damping ()) -> gains (n,), elementwise; by
        default 1 / (eigenvalue + damping). Eigenvalues at most eps x n x (the largest) reach it as
        exactly 0; a gain that is not finite at 0 (such as a negative power) counts as 0 there.

    Returns:
      A :class:`Solver`, for every metric.

    Raises:
      TypeError: ``gain`` is not callable.

    Examples:
      The root of the pseudo-inverse, applied twice, is the pseudo-inverse:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> x, p = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), jnp.zeros((3,))
      >>> root = ng.spectral(lambda h, damping: h**-0.5)
      >>> apply = lambda solver, g: ng.natural_gradient_direction(
      ...     metric, p, x, g, solver=solver, damping=0.0)[0]
      >>> twice = apply(root, apply(root, jnp.ones((3,))))
      >>> bool(jnp.allclose(twice, apply(ng.spectral(), jnp.ones((3,))), rtol=1e-4))
      True

    Notes:
      O(min(M, P)^3) with a constant many times that of Cholesky. It works in sample space when
      M < P, on rows in factored form as :func:`woodbury`, and makes F from the rows in full, M x P
      numbers, otherwise. For a Hessian the eigenvalues keep their sign.
    """
    if gain is not None and not callable(gain):
        raise TypeError(f"spectral: gain must be a function (eigenvalues, damping), got {gain!r}")
    inverse = gain is None
    gain = _symmetric.damped_inverse if gain is None else gain

    def gains(values: jax.Array, damping: jax.Array) -> jax.Array:
        raw = jnp.broadcast_to(gain(values, damping), values.shape).astype(values.dtype)
        return jnp.where((values == 0) & ~jnp.isfinite(raw), 0, raw)

    def prepare(here: Curvature, damping: jax.Array, state: tuple[()]) -> tuple[Solve, tuple[()]]:
        if here.jacobian is not None and here.num_rows() < _trees.size(here.params):
            return _in_sample_space(here, damping, gains, inverse=inverse), state
        return _in_parameter_space(here, damping, gains), state

    return Solver("spectral", _solver.stateless, prepare)


def _in_parameter_space(here: Curvature, damping: jax.Array, gains: Gain) -> Solve:
    matrix = dense_matrix(here)
    values, vectors = _symmetric.eigen(matrix, definite=here.definite)
    gain = gains(values, damping)

    def solve(gradient: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
        g = _trees.ravel(gradient)
        modes = gain * _symmetric.matvec(vectors.T, g)
        d = _symmetric.matvec(vectors, modes)
        share, _ = _trees.normalised(modes, modes.dtype)
        inside = jnp.sum(jnp.where(values == 0, 0, share) ** 2)
        outcome = _solver.report(
            relative_residual=_solver.relative(g - _symmetric.matvec(matrix, d) - damping * d, g),
            outside_row_space=_solver.outside_share(inside, jnp.sum(share**2)),
            eigen_taken=True,
        )
        return _trees.unravel(d, here.params), state, outcome

    return solve


def _in_sample_space(here: Curvature, damping: jax.Array, gains: Gain, *, inverse: bool) -> Solve:
    rows = here.jacobian()
    gram = rows.gram()
    unit = _row_space.unit_of(gram)
    spectrum = _symmetric.eigen(gram / (unit * unit), definite=True)
    null_gain = gains(jnp.zeros((1,), here.dtype), damping)[0]
    gain = gains(spectrum.values * (unit * unit), damping)

    def solve(g: Tree, state: tuple[()]) -> tuple[Tree, tuple[()], Report]:
        d, outcome = _row_space.apply_gains(
            here, rows, unit, spectrum, gain, null_gain, damping, g, refine=inverse
        )
        return d, state, outcome

    return solve

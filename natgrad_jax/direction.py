"""The natural gradient direction: metric, gradient and solver meet here, inside one jit."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _acceleration
from natgrad_jax import _boundary
from natgrad_jax import _damping_scale
from natgrad_jax import _independence
from natgrad_jax import _records
from natgrad_jax import _sharding
from natgrad_jax import _trees
from natgrad_jax import _unseen
from natgrad_jax.curvature import curvature
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers._solver import NOT_MEASURED
from natgrad_jax.solvers._solver import Report
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.solvers.automatic import AUTOMATIC

Tree = Any


class NaturalGradientInfo(NamedTuple):
    """Diagnostics of one natural gradient step; the same fields and dtypes for every solver.

    Attributes:
      damping: the damping used.
      iterations: products with F that an iterative solver took, 0 for direct ones.
      relative_residual: ||(F + damping I) d - g|| / ||g||, or -1 where it was not measured, which
        prints as such. Where it is rounding it is told within a factor of ten, nine times in ten.
        With a damping scale s this and `outside_row_space` are those of the system in s^(1/2)
        theta.
      grad_dot_direction: the inner product of the gradient and the direction.
      outside_row_space: the share of ||d|| outside the row space of R, where F is zero and the
        gradient was only divided by the damping; `cholesky` and `woodbury` count modes of F far
        below the damping with it. For `cg` an upper bound, which is the share itself once it has
        converged and may be 1 long before; for solvers that approximate F the root of the share of
        g^T d where their own matrix is zero. -1 where it was not measured: for a Hessian (but by
        `spectral`), and for `cg` with a preconditioner.
      eigen_taken: whether an eigendecomposition was used (damping 0, or a failed Cholesky).
      negative_curvature: whether conjugate gradients stopped at negative curvature.
      acceleration: the length of the geodesic acceleration beside that of the direction, in units
        of the damping scale; -1 without.
      predicted_decrease: the decrease that the quadratic model predicts for a step of rate 1
        without that acceleration; -1 without.
    """

    damping: jax.Array
    iterations: jax.Array
    relative_residual: jax.Array
    grad_dot_direction: jax.Array
    outside_row_space: jax.Array
    eigen_taken: jax.Array
    negative_curvature: jax.Array
    acceleration: jax.Array
    predicted_decrease: jax.Array

    def __repr__(self) -> str:
        return _records.line(self)


def empty_info() -> NaturalGradientInfo:
    """The info of a state that has seen no step."""
    real = functools.partial(jnp.zeros, (), jnp.float32)
    unmeasured = functools.partial(jnp.full, (), NOT_MEASURED, jnp.float32)
    flag = functools.partial(jnp.zeros, (), jnp.bool_)
    return NaturalGradientInfo(
        real(),
        jnp.zeros((), jnp.int32),
        unmeasured(),
        real(),
        unmeasured(),
        flag(),
        flag(),
        unmeasured(),
        unmeasured(),
    )


def natural_gradient_direction(
    metric: Metric,
    params: Tree,
    batch: Tree,
    grads: Tree,
    *,
    solver: Solver | None = None,
    damping: jax.typing.ArrayLike = 1e-3,
    damping_scale: Tree | str | None = None,
    key: jax.Array | None = None,
) -> tuple[Tree, NaturalGradientInfo]:
    r"""The direction of one natural gradient step.

    .. math::
        d = (F(\theta) + \lambda I)^{-1} g
        \qquad\text{or}\qquad
        d = (F(\theta) + \lambda\, \mathrm{diag}(s))^{-1} g

    Args:
      metric: the metric F, from `exact_fisher`, `sampled_fisher`, ...
      params: parameters :math:`\theta`, a pytree of real arrays.
      batch: pytree of arrays, as the metric's model takes it.
      grads: the gradient g, a tree like ``params``.
      solver: one of the solvers; None chooses an exact one from static shapes: `cholesky` when
        P <= 2048 and P is not above the number of rows M, `woodbury` while M <= 4096, `cg` beyond.
        For damping 0, and where the residual exceeds 1e-3, factors as in `qr` take over while M P
        is at most 2^22 and the smaller of M and P at most 2048.
      damping: :math:`\lambda`, in units of F. 0 means the pseudo-inverse.
      damping_scale: s, as for :func:`scale_by_natural_gradient`: a tree prefix of ``params`` with
        one positive number for each parameter leaf, or "diagonal" for the diagonal of F; None for
        one.
      key: random key (typed, legacy or an int seed), for a metric that samples.

    Returns:
      (direction, info): a tree like ``grads`` with its dtypes and *sign*, to be subtracted from
      the parameters, and a :class:`NaturalGradientInfo`.

    Raises:
      TypeError, ValueError: what shapes, types and structure tell; the metric and the solver do
        not fit.

    Examples:
      One undamped step of linear regression lands on the least-squares solution:

      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 3.0, 5.0])
      >>> loss = lambda p: 0.5 * jnp.mean((x @ p - y) ** 2)
      >>> p = jnp.zeros((2,))
      >>> d, _ = ng.natural_gradient_direction(
      ...     ng.gauss_newton(lambda p, x: x @ p), p, x, jax.grad(loss)(p), damping=0.0)
      >>> bool(jnp.allclose(p - d, jnp.array([1.0, 2.0]), atol=1e-4))
      True

    References:
      Amari, 1998, Natural gradient works efficiently in learning; Marquardt, 1963 (the diagonal).
    """
    caller = "natural_gradient_direction"
    check_arguments(caller, metric, solver, damping, schedule=False)
    _boundary.check_params(caller, params)
    _boundary.check_batch(caller, batch)
    _boundary.check_like_params(caller, "grads", grads, params)
    _independence.check_claim(caller, metric, params, batch)
    _boundary.check_weights(caller, metric, batch)
    damping_scale = _damping_scale.check(caller, damping_scale, solver)
    _damping_scale.check_prefix(caller, damping_scale, params)
    solver = AUTOMATIC if solver is None else solver
    state = solver.init(metric, params)
    core = functools.partial(compiled_direction, metric, solver)
    operands = (grads, params, batch, damping, key, state, None, None, None, damping_scale)
    like = (grads, state, None, empty_info())
    direction, _, _, info = _sharding.run(core, operands, like)
    return _sharding.keep(direction, grads), info


def check_arguments(
    caller: str, metric: Metric, solver: Solver | None, damping: Any, *, schedule: bool
) -> None:
    """Raises unless metric, solver and damping are such, and fit one another."""
    _boundary.check_metric(caller, metric)
    if solver is not None and not isinstance(solver, Solver):
        raise ValueError(
            f"{caller}: unknown solver {solver!r}; take None or one of cholesky(), qr(),"
            " woodbury(), cg(), spectral(), kfac(batch), ekfac(batch), diagonal(), block_diagonal()"
        )
    if solver is not None and solver.needs_rows and metric.output_metric is None:
        raise ValueError(
            f"{caller}: the solver {solver.name} works on rows, and the metric {metric.name} has"
            " none; take cholesky(), cg(), spectral(), diagonal(), block_diagonal() or None"
        )
    _boundary.check_number(caller, "damping", damping, schedule=schedule)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("accelerated",))
def compiled_direction(
    metric: Metric,
    solver: Solver,
    grads: Tree,
    params: Tree,
    batch: Tree,
    damping: jax.Array,
    key: jax.Array | None,
    state: Any,
    momentum: jax.Array | None,
    velocity: Tree | None,
    full_params: Tree | None,
    damping_scale: Tree | None = None,
    *,
    accelerated: bool = False,
) -> tuple[Tree, Any, Tree | None, NaturalGradientInfo]:
    """One solve, with momentum (SPRING) and geodesic acceleration where there are any.

    phi_k = mu phi_{k-1} + (F + lambda I)^-1 (g - mu F phi_{k-1}),   Goldshlager et al., 2024

    Metric and solver are static, hyper-parameters are operands: no recompilation when they change.

    Returns:
      (direction, solver state, velocity, info).
    """
    dtype = _trees.work_dtype(params)
    made, metric = metric, _boundary.fill_masked(metric, params, full_params)
    damping = jnp.asarray(damping).astype(dtype)
    g = _trees.cast(grads, dtype)
    if not jax.tree.leaves(params):
        return grads, state, velocity, empty_info()._replace(damping=damping.astype(jnp.float32))

    here = curvature(metric, params, batch, key)
    _unseen.warn(metric, made, params, batch)
    solve, state = _damping_scale.scaled(solver, damping_scale).prepare(here, damping, state)
    rhs = g
    if velocity is not None:
        momentum = jnp.asarray(momentum).astype(dtype)
        carried = _trees.scale(velocity, momentum)
        rhs = _trees.add_scaled(g, -jnp.ones((), dtype), here.linearize()(carried))
    # Order one going in: squares neither overflow nor underflow, whatever the scale of the loss.
    # The scale of a gradient that is not finite is NaN: iterations end at once on such, and would
    # hide it.
    unit, size = _trees.normalised(rhs, dtype)
    d, state, report = solve(unit, state)
    d = _trees.scale(d, size)
    slope = report.grad_dot_direction
    slope = None if slope is None else slope * size * size
    if velocity is not None:
        d = velocity = _trees.add_scaled(d, jnp.ones((), dtype), carried)
        slope = None
    share = predicted_decrease = jnp.asarray(NOT_MEASURED)
    if accelerated:
        entries = _damping_scale.entries_of(damping_scale, params, dtype)
        again = lambda v: solve(v, state)[0]
        d, share, predicted_decrease = _acceleration.accelerated(
            metric, params, batch, g, d, entries, again
        )
        slope = None
    slope = _trees.vdot(g, d, dtype) if slope is None else slope
    return (
        _trees.cast_like(d, grads),
        state,
        velocity,
        _info(report, damping, slope, share, predicted_decrease),
    )


def _info(
    report: Report,
    damping: jax.Array,
    slope: jax.Array,
    share: jax.Array,
    predicted_decrease: jax.Array,
) -> NaturalGradientInfo:
    real = lambda x: x.astype(jnp.float32)
    measured = report._asdict() | {"grad_dot_direction": real(slope), "acceleration": real(share)}
    measured["predicted_decrease"] = real(predicted_decrease)
    return NaturalGradientInfo(damping=real(damping), **measured)

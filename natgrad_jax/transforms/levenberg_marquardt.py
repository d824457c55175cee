"""Damping that follows how well the quadratic model predicts the objective."""

from typing import Any

import jax
import optax

from natgrad_jax import _acceleration
from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax.metrics import Metric
from natgrad_jax.transforms import _damped
from natgrad_jax.transforms._controlled import LevenbergMarquardtInfo as LevenbergMarquardtInfo
from natgrad_jax.transforms._controlled import LevenbergMarquardtState as LevenbergMarquardtState
from natgrad_jax.transforms._controlled import Plan
from natgrad_jax.transforms._controlled import controlled

Tree = Any

#: Up to so many parameters residuals are a fit: steps that cost what a few more evaluations do.
FIT = 128


def levenberg_marquardt(
    inner: optax.GradientTransformation,
    metric: Metric,
    *,
    initial_damping: jax.typing.ArrayLike | None = None,
    factor: jax.typing.ArrayLike = 2.0,
    every: jax.typing.ArrayLike = 1,
    min_damping: jax.typing.ArrayLike | None = None,
    max_damping: jax.typing.ArrayLike | None = None,
    reject: jax.typing.ArrayLike = True,
    geodesic_acceleration: bool | None = None,
    damping_scale: str | None = "automatic",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Drives the damping of an inner transformation, and rejects steps that make things worse.

    .. math::
        \rho = \frac{L(\theta) - L(\theta + u)}{-(g^T u + \tfrac12 u^T F u)}, \qquad
        \lambda \leftarrow \begin{cases}
            \lambda / \omega & \rho > \tfrac34 \\
            \lambda \omega & \rho < \tfrac14
        \end{cases}

    for the step u of the inner transformation with damping :math:`\lambda`, the objective L at the
    same batch, its gradient g and the exact Fisher matrix F of the metric's model and likelihood
    where it has them (the metric itself otherwise). A step with L(theta + u) > L(theta), or not
    finite, is rejected: it becomes exactly zero, the inner state goes on, the damping grows, and
    `kfac` inverts all of its factors anew on the next step. Place it last in a chain.

    Args:
      inner: gives a step ready for ``apply_updates``, from a gradient: :func:`natural_gradient`, or
        a chain with :func:`scale_by_natural_gradient` and a rate.
      metric: the metric of the quadratic model, as a rule that of ``inner``.
      initial_damping: :math:`\lambda` of the first step, in units of F, or a pure number with a
        ``damping_scale``. None for 0.01 in units of F, and 0.1 as a pure number.
      factor: :math:`\omega > 1`. In a row of rejections it doubles each time, and a damping that is
        a pure number falls by :math:`\omega^{3/2}` (Nielsen).
      every: steps from one change of the damping to the next; a rejection changes it at once.
      min_damping: the lowest damping; None for 10 eps of the working dtype (1.2e-6 in float32,
        which turns to NaN at less).
      max_damping: the largest damping; None for 1e8.
      reject: whether to reject; with False only the damping reacts.
      geodesic_acceleration: for :func:`gauss_newton` metrics, adds half the second-order correction
        :math:`a = -(F + \lambda I)^{-1} J^T r''_{uu}` to the step of
        :func:`scale_by_natural_gradient` (rate 1), by one jvp of a jvp (by differences of outputs
        where the model has no forward mode) and one more solve with the same factorisation. Where
        ||a|| is above 0.75 of the step's length the model bends too much: the step goes without it,
        and the damping does not fall. None for True in a fit, see ``damping_scale``.
      damping_scale: "largest_diagonal" for :math:`F + \lambda D` in place of
        :math:`F + \lambda I`, with D the largest diagonal of F seen (More), of which half is
        forgotten at every step: the units of single parameters then do not matter. It needs an
        exact solver in ``inner``, whose own ``damping_scale`` holds where it has one. None for
        :math:`\lambda I`.
        "automatic" takes it in a fit: residuals of at most 128 parameters, such a solver, and no
        damping given at all, first, lowest or largest, which would be in units of F.
      has_aux: whether ``value_fn`` returns a pair of the objective and auxiliary output.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with ``update(grads, state, params, *, batch,
      value_fn, value=None, grad=None)``; ``value_fn`` is the objective, a function of (params,
      batch) or of params alone. Every keyword reaches ``inner``. What this transformation adds, the
      damping above all, reaches those of this package alone, so that ``optax``'s line searches work
      inside. The state is a :class:`LevenbergMarquardtState`.

    Raises:
      TypeError: ``inner`` or ``metric`` is no such thing; ``value_fn`` is missing in `update`.
      ValueError: a number is out of range; nothing inside ``inner`` reads ``damping``, or
        ``geodesic_acceleration`` or ``damping_scale`` where that is wanted (at `init`).

    Examples:
      Rosenbrock's valley as least squares, from the usual start, without a rate:

      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> residual = lambda p, batch: jnp.stack([10.0 * (p[1] - p[0] ** 2), 1.0 - p[0]])
      >>> loss = lambda p, batch: 0.5 * jnp.mean(residual(p, batch) ** 2)
      >>> metric = ng.gauss_newton(residual)
      >>> tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric)
      >>> @jax.jit
      ... def step(p, state):
      ...     updates, state = tx.update(
      ...         jax.grad(loss)(p, None), state, p, batch=None, value_fn=loss)
      ...     return optax.apply_updates(p, updates), state
      >>> p = jnp.array([-1.2, 1.0])
      >>> state = tx.init(p)
      >>> while not state.info.converged and state.count < 100:
      ...     before = loss(p, None)
      ...     p, state = step(p, state)
      ...     assert loss(p, None) <= before
      >>> bool(jnp.allclose(p, 1.0, atol=1e-5))
      True

      or inside jit, where the loop is ``jax.lax.while_loop``:

      >>> going = lambda carry: ~carry[1].info.converged & (carry[1].count < 100)
      >>> start = jnp.array([-1.2, 1.0])
      >>> fit = jax.jit(lambda p: jax.lax.while_loop(going, lambda c: step(*c), (p, tx.init(p))))
      >>> bool(jnp.allclose(fit(start)[0], 1.0, atol=1e-5))
      True

    Notes:
      One evaluation of the objective and one Jacobian product a step; with a damping scale the
      diagonal of F besides, with acceleration two more Jacobian products. The ratio is that of one
      batch: where batches are small and it is noisy, ``every=5, factor=1.5`` follow it slowly.
      A change that is rounding of the objective counts as predicted. Rounding is 10 eps of the
      objective; with a damping scale it includes what is lost where residuals are small
      differences, which the size of :math:`\theta` in units of D tells.

    References:
      Levenberg, 1944; Marquardt, 1963; More, 1978, The Levenberg-Marquardt algorithm; Nielsen,
      1999, Damping parameter in Marquardt's method; Martens and Grosse, 2015, section 6.5;
      Transtrum and Sethna, 2012 (geodesic acceleration).
    """
    name = "levenberg_marquardt"
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"{name}: inner must be an optax transformation, got {inner!r}")
    _boundary.check_metric(name, metric)
    largest = 1e8 if max_damping is None else max_damping
    settings = _damped.settings(name, initial_damping, factor, every, min_damping, largest, reject)
    if damping_scale not in ("automatic", "largest_diagonal", None):
        raise ValueError(
            f"{name}: damping_scale must be 'automatic', 'largest_diagonal' or None, got"
            f" {damping_scale!r}"
        )
    if geodesic_acceleration:
        _acceleration.check(name, metric)
    given = any(x is not None for x in (initial_damping, min_damping, max_damping))
    may_scale = damping_scale == "largest_diagonal" or (
        damping_scale == "automatic" and metric.name == "gauss_newton" and not given
    )

    def plan(params: Tree, state: Any) -> Plan:
        small = metric.name == "gauss_newton" and _trees.size(params) <= FIT
        scaled = may_scale and _takes_scale(state)
        if damping_scale == "largest_diagonal":
            _check_scale(name, scaled, params)
        else:
            scaled = scaled and small
        accelerated = scaled and small if geodesic_acceleration is None else geodesic_acceleration
        return Plan(may_scale, scaled, accelerated)

    return controlled(name, inner, metric, settings, plan=plan, has_aux=has_aux)


def _takes_scale(state: Any) -> bool:
    """Whether all that reads the damping takes it in the units of a scale."""
    found = _damped.readers(state, "damping")
    return bool(found) and all(getattr(x, "free_scale", None) is not None for x in found)


def _check_scale(name: str, scaled: bool, params: Tree) -> None:
    if not scaled and jax.tree.leaves(params):
        raise ValueError(
            f"{name}: damping_scale='largest_diagonal' needs scale_by_natural_gradient or"
            " natural_gradient in `inner`, with an exact solver (cholesky(), woodbury(), cg(),"
            " spectral() or None)"
        )

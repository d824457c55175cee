"""The natural gradient direction as an optax transformation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import _acceleration
from natgrad_jax import _boundary
from natgrad_jax import _damping_scale
from natgrad_jax import _independence
from natgrad_jax import _random
from natgrad_jax import _sharding
from natgrad_jax import _trees
from natgrad_jax import direction
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers._solver import Solver
from natgrad_jax.solvers._solver import check_state
from natgrad_jax.solvers.automatic import AUTOMATIC
from natgrad_jax.transforms import _call
from natgrad_jax.transforms import _told

Tree = Any


class FreeScale(NamedTuple):
    """Stands in a state, without leaves: an exact solver that scales entries."""


class ScaleByNaturalGradientState(NamedTuple):
    """State of :func:`scale_by_natural_gradient`.

    Attributes:
      count: updates made so far, which schedules see. int32.
      key: uint32 key data that the next samples are drawn from.
      velocity: phi, the momentum in direction space before the learning rate; None without.
      solver: the solver's own state.
      info: diagnostics of the last update.
      free_scale: whether ``update`` takes ``damping_scale=``, an empty record; None where not.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
    key: jax.Array
    velocity: Tree
    solver: Any
    info: direction.NaturalGradientInfo
    free_scale: FreeScale | None = None


def scale_by_natural_gradient(
    metric: Metric,
    *,
    solver: Solver | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_scale: Tree | str | None = None,
    momentum: optax.ScalarOrSchedule | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a gradient g by the natural gradient direction, keeping its sign.

    .. math::
        d_k = (F + \lambda I)^{-1} g_k
        \qquad\text{or, with momentum}\qquad
        \phi_k = \mu \phi_{k-1} + (F + \lambda I)^{-1} (g_k - \mu F \phi_{k-1})

    with the metric F at the current parameters and batch, damping :math:`\lambda` and momentum
    :math:`\mu` (SPRING, for every solver). A ``damping_scale`` s puts
    :math:`\lambda\, \mathrm{diag}(s)` in place of :math:`\lambda I`.

    Args:
      metric: the metric F, from `exact_fisher`, `sampled_fisher`, `empirical_fisher`,
        `gauss_newton`, `hessian` or `euclidean`.
      solver: `cholesky`, `qr`, `woodbury`, `cg`, `spectral` (exact), `kfac`, `ekfac`,
        `diagonal`, `block_diagonal` (approximate), or None, which chooses an exact
        one from static shapes.
      damping: :math:`\lambda \ge 0` in units of F, or a schedule of the update count. 0 means the
        pseudo-inverse. ``update`` also takes ``damping=``, which replaces it.
      damping_scale: s, for parameters in different units: a tree prefix of the parameters, such
        as ``{"encoder": 1.0, "log_scale": 100.0}``, with a positive number for every leaf, its
        damping in multiples of :math:`\lambda`. "diagonal" means s = diag(F) at every update
        (Marquardt), :math:`\lambda` then being a pure number; see the notes. None for one.
      momentum: :math:`\mu`, or a schedule; None for no momentum and no buffer.
      key: seed or key (typed or legacy) of the samples of a sampling metric.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update(grads, state, params, *, batch)``
      needs the parameters and the keyword ``batch`` and is compiled also when called eagerly. Under
      ``optax.masked`` or ``optax.partition`` pass ``full_params=params`` as well. With
      ``damping_scale=`` it takes s, a tree like the parameters, at every update where none is set
      here (as :func:`levenberg_marquardt` gives it). With
      ``refresh=True`` a solver that keeps inverses (`kfac`) makes all of them anew;
      ``geodesic_acceleration=True`` is explained at :func:`levenberg_marquardt`. Unknown keywords
      are ignored. The state is a :class:`ScaleByNaturalGradientState` with diagnostics in ``info``.

    Raises:
      TypeError, ValueError: metric, solver, scale or key are no such thing, or do not fit one
        another.

    Examples:
      Linear regression, solved by one undamped step:

      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 3.0, 5.0])
      >>> loss = lambda p: 0.5 * jnp.mean((x @ p - y) ** 2)
      >>> metric = ng.gauss_newton(lambda p, b: b[0] @ p - b[1])
      >>> tx = optax.chain(
      ...     ng.scale_by_natural_gradient(metric, damping=0.0), optax.scale(-1.0))
      >>> params = jnp.zeros((2,))
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, batch=(x, y))
      >>> bool(jnp.allclose(optax.apply_updates(params, updates), jnp.array([1.0, 2.0]), atol=1e-4))
      True

    Notes:
      A damping scale is a change of variables, to :math:`s^{1/2} \theta`, for every solver and at
      no cost to speak of; damping 0 then is the pseudo-inverse in these, and a gain of `spectral`
      a function of F in these. `kfac` and `ekfac` are those of the model so reparametrised: what
      they keep from step to step belongs to one scale, and follows a change of it as averages are
      renewed. (Where parameters are concatenated before use and their biases have scales in other
      proportions, such a block takes the nearest scale that is a product of one of its inputs and
      one of its outputs.)

      With "diagonal" a rescaling of single parameters changes nothing but the scale of their
      steps. It takes the diagonal of F at every update: from rows where the metric has them (`cg`
      would otherwise do without), by one product for each parameter where it has none. Solvers in
      sample space (`woodbury`, `spectral`), which otherwise hold rows in factored form, then form
      dense ones, M x P numbers, as `cholesky` does anyway; `kfac` and `ekfac`, which have no such
      thing, refuse. Of a Hessian the sizes of the diagonal count. Entries that vanish, or are
      rounding beside the largest (a ratio of (10 eps)^2), know no units: they are damped like the
      largest.

    References:
      Amari, 1998; Marquardt, 1963, An algorithm for least-squares estimation of nonlinear
      parameters; More, 1978, The Levenberg-Marquardt algorithm; Goldshlager, Abrahamsen and Lin,
      2024, A Kaczmarz-inspired approach to accelerate the optimization of neural network
      wavefunctions (SPRING).
    """
    name = "scale_by_natural_gradient"
    direction.check_arguments(name, metric, solver, damping, schedule=True)
    scale = _damping_scale.check(name, damping_scale, solver)
    solve = AUTOMATIC if solver is None else solver
    keys = _random.key_stream(name, key)
    _boundary.check_number(name, "damping", damping, schedule=True)
    if momentum is not None:
        _boundary.check_number(name, "momentum", momentum, schedule=True)

    default_damping = damping
    scales_entries = solve.scales_entries and not solve.approximates
    free_scale = FreeScale() if scales_entries else None

    def init_fn(params: Tree) -> ScaleByNaturalGradientState:
        _call.check_init(name, params)
        if jax.tree.leaves(params):  # optax also asks with a placeholder, which is like nothing
            _damping_scale.check_prefix(name, scale, params)
        state = ScaleByNaturalGradientState(
            count=jnp.zeros((), jnp.int32),
            key=keys.start(),
            velocity=None if momentum is None else _trees.zeros_like(params),
            solver=solve.init(metric, params),
            info=direction.empty_info(),
            free_scale=free_scale,
        )
        return _sharding.place_beside(state, params)

    def update_fn(
        updates: Tree,
        state: ScaleByNaturalGradientState,
        params: Tree | None = None,
        *misplaced: Any,
        batch: Tree = _call.MISSING,
        damping: jax.typing.ArrayLike | None = None,
        damping_scale: Tree | None = None,
        full_params: Tree | None = None,
        refresh: jax.typing.ArrayLike | None = None,
        geodesic_acceleration: bool = False,
        **extra_args: Any,
    ) -> tuple[Tree, ScaleByNaturalGradientState]:
        value_fn = extra_args.get("value_fn")
        told = _told.merged(
            _told.Told(damping, refresh, None, geodesic_acceleration, damping_scale),
            _told.told(value_fn),
        )
        _call.check(name, updates, params, batch, misplaced)
        full_params = _told.hidden(params, full_params, value_fn)
        check_state(name, solve, state.solver, params)
        _boundary.check_weights(name, metric, batch)
        if metric.independent:
            filled = _boundary.fill_masked(metric, params, full_params)
            _independence.check_claim(name, filled, params, batch)
        _damping_scale.check_prefix(name, scale, params)
        if told.damping is not None:
            _boundary.check_number(f"{name}: update()", "damping", told.damping)
        if told.damping_scale is not None and free_scale is None:
            raise ValueError(
                f"{name}: update() got damping_scale, which goes with exact solvers that scale"
                " entries"
            )
        accelerated = bool(told.geodesic_acceleration)
        if accelerated:
            _acceleration.check(name, metric)
        solver_state = solve.anew(state.solver, told.refresh)
        at_count = lambda x: x(state.count) if callable(x) else x
        key, sample_key = keys.split(state.key)
        core = functools.partial(
            direction.compiled_direction, metric, solve, accelerated=accelerated
        )
        operands = (
            updates,
            params,
            batch,
            at_count(default_damping if told.damping is None else told.damping),
            sample_key,
            solver_state,
            at_count(momentum),
            state.velocity,
            full_params,
            told.damping_scale if scale is None else scale,
        )
        like = (updates, state.solver, state.velocity, state.info)
        d, solver_state, velocity, info = _sharding.run(core, operands, like)
        count = optax.safe_increment(state.count)
        new = ScaleByNaturalGradientState(count, key, velocity, solver_state, info, free_scale)
        return _sharding.keep(d, updates), _call.keep_types(new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

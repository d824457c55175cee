"""Damping that follows the ratio of actual to predicted decrease."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

START = np.array([-1.2, 1.0])


def rosenbrock(p, batch):
    return jnp.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])


TIMES = np.linspace(0, 4, 24)
DECAYS = np.array([1.0, 1.5, 2.0, 0.3, np.sqrt(1.2), 4.0])  # three amplitudes, three rates


def exponentials(p, batch):
    curve = lambda q: jnp.exp(-TIMES[:, None] * q[None, 3:]) @ q[:3]
    return curve(p) - curve(DECAYS)


def of(residual, factor=1.0):
    return lambda p, batch: factor * 0.5 * jnp.mean(residual(p, batch) ** 2)


LOSS, METRIC = of(rosenbrock), ng.gauss_newton(rosenbrock)
INNER = ng.natural_gradient(1.0, METRIC, solver=ng.cholesky())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(tx, loss, steps, start):
    """Parameters before every step and states after it."""

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p, None), state, p, batch=None, value_fn=loss)
        return (optax.apply_updates(p, updates), state), (p, state._replace(inner=()))

    (last, _), (path, states) = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return last, path, states


def steps_to(tx, residual, start, target, limit=300):
    _, path, _ = run(tx, of(residual), limit, start)
    below = jax.vmap(lambda p: of(residual)(p, None))(path) <= target
    return int(np.argmax(below)) if below.any() else limit


def once(damping=0.1, **settings):
    tx = ng.levenberg_marquardt(INNER, METRIC, initial_damping=damping, **settings)
    g = jax.grad(LOSS)(START, None)
    return tx.update(g, tx.init(START), START, batch=None, value_fn=LOSS)


def test_ratio_and_prediction_are_those_of_the_formula():
    step, state = once(reject=False)
    jacobian = jax.jacobian(rosenbrock)(START, None)
    fisher, g = jacobian.T @ jacobian / 2, jax.grad(LOSS)(START, None)
    expected = -np.linalg.solve(fisher + 0.1 * np.eye(2), g)
    np.testing.assert_allclose(step, expected, rtol=1e-10)
    predicted = -(g @ step + 0.5 * step @ fisher @ step)
    actual = LOSS(START, None) - LOSS(START + step, None)
    np.testing.assert_allclose(state.info.predicted, predicted, rtol=1e-6)
    np.testing.assert_allclose(state.info.decrease, actual, rtol=1e-6)
    np.testing.assert_allclose(state.info.ratio, actual / predicted, rtol=1e-6)


#: What the objective does beside what the model says, and what becomes of the damping.
RATIOS = {"good": (1.0, 1 / 2), "fair": (0.5, 1.0), "poor": (0.1, 2.0), "worse": (-0.5, 2.0)}


@pytest.mark.parametrize("name", RATIOS)
def test_the_damping_follows_the_ratio(name):
    share, change = RATIOS[name]
    quadratic = ng.gauss_newton(lambda p, batch: p[None])
    inner = ng.natural_gradient(1.0, quadratic)
    tx = ng.levenberg_marquardt(inner, quadratic, initial_damping=0.5)
    p = jnp.ones(3)
    foretold = lambda q: 0.5 * jnp.sum(q**2)
    value_fn = lambda q: foretold(p) + share * (foretold(q) - foretold(p))
    step, state = tx.update(p, tx.init(p), p, batch=None, value_fn=value_fn)
    np.testing.assert_allclose(state.info.ratio, share, rtol=1e-6)
    np.testing.assert_allclose(state.damping, 0.5 * change, rtol=1e-12)
    assert bool(state.rejected) == (share < 0) == (not np.any(step))


def test_right_after_a_rejection_the_damping_does_not_fall():
    tx = ng.levenberg_marquardt(INNER, METRIC)
    _, _, states = run(tx, LOSS, 30, START)
    dampings = np.concatenate([[1e-2], states.damping])
    after = np.concatenate([[False], np.asarray(states.rejected)[:-1]])
    falls = dampings[1:] < dampings[:-1]
    assert after.any() and falls.any() and not np.any(falls & after)


def test_a_rejected_step_leaves_parameters_bit_identical():
    far = jnp.array([0.0, 1.0])
    cliff = lambda p, batch: jnp.where(jnp.all(p == far), 0.0, 1.0)
    for value_fn in (cliff, lambda p, batch: cliff(p, batch) * jnp.inf, lambda p, batch: jnp.nan):
        tx = ng.levenberg_marquardt(INNER, METRIC)
        g = jax.grad(LOSS)(far, None)
        step, state = tx.update(g, tx.init(far), far, batch=None, value_fn=value_fn)
        np.testing.assert_array_equal(optax.apply_updates(far, step), far)
        assert state.info.rejected and state.damping > 1e-2
        step, state = ng.levenberg_marquardt(INNER, METRIC, reject=False).update(
            g, tx.init(far), far, batch=None, value_fn=value_fn
        )
        assert np.any(step) and not state.info.rejected


@pytest.mark.parametrize("every", [1, 4])
def test_the_damping_changes_on_its_period_or_after_a_rejection(every):
    tx = ng.levenberg_marquardt(INNER, METRIC, initial_damping=10.0, every=every)
    _, _, states = run(tx, LOSS, 24, START)
    dampings = np.concatenate([[10.0], states.damping])
    changed = dampings[1:] != dampings[:-1]
    allowed = ((np.arange(24) + 1) % every == 0) | np.asarray(states.info.rejected)
    assert not np.any(changed & ~allowed) and changed.any()


def test_bounds_hold():
    tx = ng.levenberg_marquardt(INNER, METRIC, min_damping=1e-3, max_damping=1.0)
    _, _, states = run(tx, LOSS, 40, START)
    assert states.damping.min() == 1e-3
    tx = ng.levenberg_marquardt(
        ng.natural_gradient(-1.0, METRIC), METRIC, max_damping=1.0, reject=False
    )
    assert run(tx, LOSS, 20, START)[2].damping.max() == 1.0


def test_float32_stays_finite_at_the_lowest_damping():
    """By default there is a floor, 10 eps; without one the damping sinks below rounding."""
    residual = lambda p, batch: jnp.stack([p[0] + p[1], p[0] + p[1]])
    for floor, sound in [(None, True), (1e-30, False)]:
        metric = ng.gauss_newton(residual)
        tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric, min_damping=floor)
        last, _, states = run(tx, of(residual), 60, np.ones(2, np.float32))
        assert np.all(np.isfinite(last))
        assert (states.damping[-1] > 1e-7) == sound


def test_the_objective_never_rises_and_the_valley_is_crossed():
    tx = ng.levenberg_marquardt(INNER, METRIC)
    last, path, _ = run(tx, LOSS, 60, START)
    values = np.asarray(jax.vmap(lambda p: LOSS(p, None))(path))
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(last, 1, atol=1e-8)
    # The control: without rejection and damping that follows, full steps first climb.
    plain = ng.natural_gradient(1.0, METRIC, damping=1e-6)
    g = jax.grad(LOSS)(START, None)
    step, _ = plain.update(g, plain.init(START), START, batch=None)
    assert LOSS(START + step, None) > LOSS(START, None)


@pytest.mark.parametrize("inverses_every", [1, 50])
def test_a_full_batch_never_rejects_one_step_for_ever(inverses_every):
    """K-FAC inverts its factors anew after a rejection: the damping that grew counts at once."""
    tx = ng.levenberg_marquardt(
        ng.natural_gradient(
            1.0, METRIC, solver=ng.kfac(None, inverses_every=inverses_every, decay=0.0)
        ),
        METRIC,
        initial_damping=1e-6,
    )
    _, path, states = run(tx, LOSS, 40, START)
    rejected = np.asarray(states.info.rejected)
    assert rejected[0] and not rejected[:20].all()
    assert LOSS(path[-1], None) < 0.5 * LOSS(START, None)


def test_without_a_refresh_it_would():
    """The control: an inner transformation that hides `refresh` from K-FAC."""
    inner = ng.natural_gradient(1.0, METRIC, solver=ng.kfac(None, inverses_every=50, decay=0.0))

    def update(updates, state, params=None, *, refresh=None, **extra):
        return inner.update(updates, state, params, **extra)

    deaf = optax.GradientTransformationExtraArgs(inner.init, update)
    tx = ng.levenberg_marquardt(deaf, METRIC, initial_damping=1e-6)
    _, _, states = run(tx, LOSS, 40, START)
    assert np.asarray(states.info.rejected).all()


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.chain(optax.clip(1.0), optax.adam(1e-3))])
def test_an_inner_transformation_without_damping_is_refused_at_init(inner):
    with pytest.raises(ValueError, match="nothing inside `inner` reads `damping`"):
        ng.levenberg_marquardt(inner, METRIC).init(START)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1e3), tx),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.partition({"all": tx}, "all"),
        lambda tx: optax.inject_hyperparams(ng.natural_gradient)(1.0, METRIC),
    ],
)
def test_damping_is_found_inside_wrappers_and_reaches_them(wrap):
    tx = ng.levenberg_marquardt(wrap(INNER), METRIC, initial_damping=0.1, reject=False)
    g = jax.grad(LOSS)(START, None)
    step, _ = tx.update(g, tx.init(jnp.asarray(START)), START, batch=None, value_fn=LOSS)
    expected, other = (once(damping, reject=False)[0] for damping in (0.1, 0.2))
    np.testing.assert_allclose(step, expected, rtol=1e-10)
    assert np.abs(np.asarray(other) - step).max() > 1e-3 * np.abs(step).max()


#: Residuals, start, first damping and the loss to reach.
CURVED = {
    "rosenbrock": (rosenbrock, START, 1.0, 1e-12),
    "exponentials": (exponentials, np.array([1.0, 1.0, 1.0, 1.64, 1.86, 4.9]), 1e-2, 1e-10),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CURVED)
def test_geodesic_acceleration_saves_iterations(name):
    residual, start, damping, target = CURVED[name]
    metric = ng.gauss_newton(residual)
    inner = ng.natural_gradient(1.0, metric, solver=ng.cholesky())
    steps = [
        steps_to(
            ng.levenberg_marquardt(
                inner, metric, initial_damping=damping, geodesic_acceleration=accelerated
            ),
            residual,
            start,
            target,
        )
        for accelerated in (False, True)
    ]
    assert steps[1] < 0.9 * steps[0] < 270, steps


@pytest.mark.parametrize("solver", [ng.cholesky(), ng.woodbury(), ng.cg(tol=1e-12)])
def test_the_acceleration_is_that_of_the_formula(solver):
    start, damping = jnp.array([-0.5, 0.3]), 1.0
    tx = ng.scale_by_natural_gradient(METRIC, solver=solver, damping=damping)
    g = jax.grad(LOSS)(start, None)
    update = functools.partial(tx.update, g, tx.init(start), start, batch=None)
    plain, _ = update()
    better, state = update(geodesic_acceleration=True)
    jacobian = jax.jacobian(rosenbrock)(start, None)
    bend = jnp.array([-20 * plain[0] ** 2, 0.0])
    matrix = jacobian.T @ jacobian / 2 + damping * np.eye(2)
    a = np.linalg.solve(matrix, jacobian.T @ bend / 2)
    share = np.linalg.norm(a) / np.linalg.norm(plain)
    assert 0 < share < 0.75
    np.testing.assert_allclose(state.info.acceleration, share, rtol=1e-5)
    np.testing.assert_allclose(better, plain + a / 2, rtol=1e-8)


def test_an_acceleration_that_is_long_is_left_out():
    update = lambda **extra: once_at(START, 1e-4, **extra)
    plain, better = update(), update(geodesic_acceleration=True)
    assert better[1].info.acceleration > 0.75
    np.testing.assert_array_equal(plain[0], better[0])


def once_at(start, damping, **extra):
    tx = ng.scale_by_natural_gradient(METRIC, solver=ng.cholesky(), damping=damping)
    return tx.update(jax.grad(LOSS)(start, None), tx.init(start), start, batch=None, **extra)


def test_acceleration_needs_residuals():
    metric = ng.exact_fisher(lambda p, batch: p[None], ng.Normal())
    with pytest.raises(ValueError, match="levenberg_marquardt: geodesic acceleration needs resid"):
        ng.levenberg_marquardt(ng.natural_gradient(1.0, metric), metric, geodesic_acceleration=True)


def test_geodesic_acceleration_needs_a_solve_inside():
    inner = optax.chain(ng.scale_by_quadratic_model(METRIC), optax.scale(-1.0))
    with pytest.raises(ValueError, match="nothing inside `inner` reads `geodesic_acceleration`"):
        ng.levenberg_marquardt(inner, METRIC, geodesic_acceleration=True).init(START)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_damping": 1.0, "max_damping": 0.1}, "min_damping 1.0 is above max_damping 0.1"),
        ({"every": 1.5}, "every must be a positive int, got 1.5"),
        ({"every": 0}, "every must be a positive int, got 0"),
        ({"factor": 1.0}, "factor must be above 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, words):
    for make in (
        lambda: ng.levenberg_marquardt(ng.natural_gradient(1.0, METRIC), METRIC, **settings),
        lambda: ng.adaptive_natural_gradient(METRIC, **settings),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_the_first_damping_is_within_its_bounds():
    inner = ng.natural_gradient(1.0, METRIC)
    tx = ng.levenberg_marquardt(inner, METRIC, initial_damping=10.0, max_damping=1.0)
    assert tx.init(START).damping == 1.0


# Converged.

LINE = np.stack([np.ones(50), np.linspace(1990, 2020, 50)], axis=1)
NOISY = LINE @ np.array([3.0, 0.01]) + 0.1 * np.sin(np.arange(50.0) ** 2)


def line(p, batch):
    return LINE @ p - NOISY


@pytest.mark.parametrize("kind", ["levenberg_marquardt", "in units of F", "adaptive"])
def test_at_the_optimum_the_damping_does_not_grow_and_nothing_is_rejected(kind):
    metric, loss = ng.gauss_newton(line), of(line)
    inner = ng.natural_gradient(1.0, metric)
    tx = {
        "levenberg_marquardt": lambda: ng.levenberg_marquardt(inner, metric),
        "in units of F": lambda: ng.levenberg_marquardt(inner, metric, initial_damping=1e-2),
        "adaptive": lambda: ng.adaptive_natural_gradient(metric),
    }[kind]()
    last, _, states = run(tx, loss, 120, np.zeros(2))
    expected = np.linalg.lstsq(LINE, NOISY, rcond=None)[0]
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    converged = np.asarray(states.info.converged)
    assert converged[-1] and not converged[:3].any()
    first = int(np.argmax(converged))
    assert not np.asarray(states.info.rejected)[first:].any()
    assert np.all(np.diff(np.asarray(states.damping)[first:]) <= 0)


def test_far_from_the_optimum_nothing_is_converged():
    """The control: neither a step that is rejected nor a small one says so."""
    _, path, states = run(ng.levenberg_marquardt(INNER, METRIC), LOSS, 8, START)
    assert LOSS(path[-1], None) > 1e-6 and not np.asarray(states.info.converged).any()
    tx = ng.levenberg_marquardt(INNER, METRIC, initial_damping=1e8)
    _, _, states = run(tx, LOSS, 8, START)
    assert not np.asarray(states.info.converged).any()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-6, 1e5)])
def test_units_of_parameters_do_not_matter(scales):
    units = np.array(scales)
    residual = lambda p, batch: rosenbrock(p / units, batch)
    metric = ng.gauss_newton(residual)
    tx = ng.levenberg_marquardt(ng.natural_gradient(1.0, metric, solver=ng.cholesky()), metric)
    _, path, _ = run(tx, of(residual), 12, START * units)
    reference = run(ng.levenberg_marquardt(INNER, METRIC), LOSS, 12, START)[1]
    np.testing.assert_allclose(path / units, reference, rtol=1e-6)
    # The control: in units of F they do.
    tx = ng.levenberg_marquardt(
        ng.natural_gradient(1.0, metric, solver=ng.cholesky()), metric, damping_scale=None
    )
    plain = run(tx, of(residual), 12, START * units)[1]
    other = run(ng.levenberg_marquardt(INNER, METRIC, damping_scale=None), LOSS, 12, START)[1]
    assert np.allclose(plain / units, other, rtol=1e-6) == (scales == (1.0, 1.0))


@pytest.mark.parametrize("solver", [ng.diagonal(), ng.kfac(None)])
def test_a_scale_needs_an_exact_solver(solver):
    inner = ng.natural_gradient(1.0, METRIC, solver=solver)
    tx = ng.levenberg_marquardt(inner, METRIC, damping_scale="largest_diagonal")
    with pytest.raises(ValueError, match="damping_scale='largest_diagonal' needs"):
        tx.init(START)
    assert ng.levenberg_marquardt(inner, METRIC).init(START).damping == 1e-2

"""Learning rate and momentum by the quadratic model, and the adaptive optimizer made of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

RNG = np.random.default_rng(8)
INPUTS, TARGETS = RNG.normal(size=(9, 3)), RNG.integers(0, 2, size=9)
PARAMS = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}


def logits(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) + params["b"]


def log_prob(params, batch):
    return ng.Categorical().log_prob(logits(params, batch), batch[1])


def loss(params, batch):
    return -jnp.mean(log_prob(params, batch))


BATCH = INPUTS, TARGETS
EXACT = ng.exact_fisher(logits, ng.Categorical())
SAMPLED = ng.sampled_fisher(logits, ng.Categorical())
RESIDUAL = ng.gauss_newton(logits)
HESSIAN = ng.hessian(loss)
ravel = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
random_tree = lambda: jax.tree.map(lambda x: RNG.normal(size=x.shape), PARAMS)


def two_updates(metric, damping, key=3):
    """Two steps along random directions; the second with momentum. All raveled."""
    tx = ng.scale_by_quadratic_model(metric, damping=damping)
    update = jax.jit(lambda d, g, state, p: tx.update(d, state, p, batch=BATCH, grad=g))
    state, params, found = tx.init(PARAMS), PARAMS, []
    for _ in range(2):
        d, g = random_tree(), jax.grad(loss)(params, BATCH)
        step, state = update(d, g, state, params)
        found.append((params, ravel(d), ravel(g), ravel(step), state.info))
        # What is applied is not what came out: the step before is read off the parameters.
        params = jax.tree.map(lambda p, u: p - 0.3 * u, params, step)
    return found


#: The metric that is given, and the one whose matrix the model must have.
METRICS = {
    "exact": (EXACT, EXACT),
    "sampled": (SAMPLED, EXACT),
    "gauss_newton": (RESIDUAL, RESIDUAL),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_step_is_the_minimum_over_direction_and_previous_step(name, damping):
    metric, measuring = METRICS[name]
    (start, d0, g0, step0, _), (params, d, g, step, info) = two_updates(metric, damping)
    fisher = np.asarray(ng.fisher_matrix(measuring, start, BATCH)) + damping * np.eye(8)
    np.testing.assert_allclose(step0, d0 * (g0 @ d0) / (d0 @ fisher @ d0), rtol=1e-8)

    plain = np.asarray(ng.fisher_matrix(measuring, params, BATCH))
    fisher = plain + damping * np.eye(8)
    basis = np.stack([-d, -0.3 * step0], axis=1)
    best = np.linalg.solve(basis.T @ fisher @ basis, -basis.T @ g)
    np.testing.assert_allclose(-step, basis @ best, rtol=1e-6)
    np.testing.assert_allclose([info.rate, info.momentum], best, rtol=1e-5)
    u = -step
    np.testing.assert_allclose(info.predicted, -(g @ u + u @ plain @ u / 2), rtol=1e-6)
    # The control: without the previous step it is another one.
    alone = d * (g @ d) / (d @ fisher @ d)
    assert np.abs(step - alone).max() > 1e-3 * np.abs(step).max()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_length_of_the_direction_does_not_matter(scale):
    tx = ng.scale_by_quadratic_model(EXACT)
    d, g = random_tree(), jax.grad(loss)(PARAMS, BATCH)
    steps = [
        tx.update(
            jax.tree.map(lambda x, f=f: f * x, d), tx.init(PARAMS), PARAMS, batch=BATCH, grad=g
        )[0]
        for f in (1.0, scale)
    ]
    np.testing.assert_allclose(ravel(steps[1]), ravel(steps[0]), rtol=1e-10)


def test_a_previous_step_along_the_direction_adds_nothing():
    tx = ng.scale_by_quadratic_model(EXACT)
    d = random_tree()
    state = tx.init(PARAMS)
    _, state = tx.update(d, state, PARAMS, batch=BATCH, grad=d)
    moved = jax.tree.map(lambda p, x: p + 0.1 * x, PARAMS, d)
    step, state = tx.update(d, state, moved, batch=BATCH, grad=d)
    assert state.info.momentum == 0
    assert np.all(np.isfinite(ravel(step)))


def test_without_a_minimum_the_direction_is_left_alone():
    concave = ng.hessian(lambda p, batch: -jnp.sum(p**2))
    tx, p, d = ng.scale_by_quadratic_model(concave), np.ones(3), np.array([1.0, 2.0, 3.0])
    step, _ = tx.update(d, tx.init(p), p, batch=None, grad=d)
    np.testing.assert_allclose(step, d)
    # Damping gives it one.
    step, _ = tx.update(d, tx.init(p), p, batch=None, grad=d, damping=4.0)
    np.testing.assert_allclose(step, d / 2)


def test_no_gradient_gives_no_step():
    tx, zero = ng.scale_by_quadratic_model(EXACT), jax.tree.map(np.zeros_like, PARAMS)
    step, _ = tx.update(zero, tx.init(PARAMS), PARAMS, batch=BATCH, grad=zero)
    assert not np.any(ravel(step))


def test_a_missing_gradient_is_named():
    tx = ng.scale_by_quadratic_model(EXACT)
    with pytest.raises(TypeError, match="`grad`"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCH)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(tx, steps):
    def step(carry, _):
        params, state = carry
        value, g = jax.value_and_grad(loss)(params, BATCH)
        updates, state = tx.update(g, state, params, batch=BATCH, value=value, value_fn=loss)
        return (optax.apply_updates(params, updates), state), (value, getattr(state, "info", ()))

    (_, state), (values, infos) = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=steps)
    return state, values, infos


@pytest.mark.smoke
def test_the_adaptive_optimizer_is_its_three_parts():
    """levenberg_marquardt around a chain of the other two, which measures the model anew."""
    parts = optax.chain(
        ng.scale_by_natural_gradient(EXACT), ng.scale_by_quadratic_model(EXACT), optax.scale(-1.0)
    )
    _, expected, info = train(ng.levenberg_marquardt(parts, EXACT), 8)
    _, values, infos = train(ng.adaptive_natural_gradient(EXACT), 8)
    np.testing.assert_allclose(values, expected, rtol=1e-8)
    np.testing.assert_allclose(infos.predicted, info.predicted, rtol=1e-5)


@pytest.mark.parametrize(
    "solver",
    [None, ng.woodbury(), ng.cg(), ng.kfac(BATCH), ng.ekfac(BATCH)],
    ids=lambda s: s and s.name,
)
def test_the_adaptive_optimizer_never_rises_and_needs_no_rate(solver):
    tx = ng.adaptive_natural_gradient(EXACT, solver=solver)
    _, values, _ = train(tx, 40)
    assert np.all(np.diff(values) <= 0)
    _, adam, _ = train(optax.with_extra_args_support(optax.adam(0.1)), 40)
    assert values[20] < adam[20]


def quadratic_step(metric, batch, **settings):
    tx = ng.scale_by_quadratic_model(metric, **settings)
    d = jax.tree.map(jnp.ones_like, PARAMS)
    return ravel(tx.update(d, tx.init(PARAMS), PARAMS, batch=batch, grad=d)[0])


@pytest.mark.parametrize("most", [3, 8])
def test_the_model_of_some_examples_is_that_of_a_batch_of_so_many(most):
    places = np.sort(np.random.default_rng(0).permutation(9)[:most])
    expected = quadratic_step(EXACT, jax.tree.map(lambda x: x[places], BATCH))
    np.testing.assert_allclose(quadratic_step(EXACT, BATCH, examples=most), expected)
    whole = quadratic_step(EXACT, BATCH)
    np.testing.assert_allclose(quadratic_step(EXACT, BATCH, examples=9), whole)
    assert np.abs(expected - whole).max() > 1e-3 * np.abs(whole).max()


def test_a_part_of_a_batch_does_not_fall_in_step_with_its_period():
    """Every second example has large inputs. The control: every second one alone."""
    metric = ng.exact_fisher(lambda p, x: x @ p["w"] + p["b"], ng.Normal())
    batch = np.tile([[10.0], [0.1]], (256, 3)) * np.random.default_rng(4).normal(size=(512, 3))
    whole, part = (quadratic_step(metric, batch, examples=n) for n in (None, 256))
    np.testing.assert_allclose(part, whole, rtol=0.3)
    assert not np.allclose(quadratic_step(metric, batch[1::2]), whole, rtol=0.3)


def centered_logits(params, batch):
    z = logits(params, batch)
    return z - jnp.mean(z, axis=0)


def with_offsets(params, batch):
    return logits(params, batch) + np.linspace(0, 1, 9)[:, None]


#: Metrics that would be others, or none, for fewer examples.
BOUND_TO_THEIR_BATCH = {
    "mixing": ng.exact_fisher(centered_logits, ng.Categorical()),
    "places": ng.exact_fisher(with_offsets, ng.Categorical()),
    "weights": ng.exact_fisher(logits, ng.Categorical(), weights=lambda b: b[1] + 1.0),
    "scales": ng.exact_fisher(logits, ng.Normal(np.linspace(1, 2, 9)[:, None])),
    "loss": HESSIAN,
}


@pytest.mark.parametrize("name", BOUND_TO_THEIR_BATCH)
def test_a_metric_that_depends_on_the_whole_batch_keeps_it(name):
    metric = BOUND_TO_THEIR_BATCH[name]
    whole = quadratic_step(metric, BATCH)
    np.testing.assert_array_equal(quadratic_step(metric, BATCH, examples=3), whole)


@pytest.mark.parametrize("examples", [0, 2.5, True, "all"])
def test_a_number_of_examples_that_is_none_is_named(examples):
    for make in (
        lambda: ng.scale_by_quadratic_model(EXACT, examples=examples),
        lambda: ng.adaptive_natural_gradient(EXACT, model_examples=examples),
    ):
        with pytest.raises(ValueError, match=r"examples must be None or a positive int"):
            make()


def test_with_a_solver_that_approximates_the_model_is_of_256_examples_and_damping_has_a_floor():
    """The control: a solver that is exact takes all, and lets the damping fall."""
    rows = np.random.default_rng(1).integers(9, size=300)
    batch = jax.tree.map(lambda x: x[rows], BATCH)
    moved = {}
    for name, solver in {"kfac": ng.kfac(BATCH), "cholesky": ng.cholesky()}.items():
        for most in (None, 256, 300):
            tx = ng.adaptive_natural_gradient(EXACT, solver=solver, model_examples=most)
            value, g = jax.value_and_grad(loss)(PARAMS, batch)
            update = jax.jit(
                lambda g, s, v, tx=tx: tx.update(
                    g, s, PARAMS, batch=batch, value=v, value_fn=lambda p: v - 1e3
                )
            )
            state = tx.init(PARAMS)
            for _ in range(8):
                step, state = update(g, state, value)
            moved[name, most] = ravel(step), float(state.damping)
    close = lambda one, two: np.allclose(moved[one][0], moved[two][0], rtol=1e-6)
    assert close(("kfac", None), ("kfac", 256))
    assert not close(("kfac", None), ("kfac", 300))
    assert close(("cholesky", None), ("cholesky", 300))
    np.testing.assert_allclose(moved["kfac", None][1], 1e-3)
    np.testing.assert_allclose(moved["cholesky", None][1], 1e-2 / 2**8)

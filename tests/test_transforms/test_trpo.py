"""Trust regions: H1 to H6, for discrete and continuous policies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

RNG = np.random.default_rng(6)
STATES = RNG.normal(size=(12, 3))
DISCRETE = {"w": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)}
CONTINUOUS = {"w": RNG.normal(size=(3, 2)), "log_scale": 0.3 * RNG.normal(size=2)}
ADVANTAGES = RNG.normal(size=12)
RADIUS = 0.01


def logits(params, batch):
    return jnp.tanh(batch["states"] @ params["w"]) + params["b"]


def normal(params, batch):
    mean = jnp.tanh(batch["states"] @ params["w"])
    return mean, jnp.broadcast_to(params["log_scale"], mean.shape)


#: Model, likelihood, parameters, actions.
POLICIES = {
    "categorical": (logits, ng.Categorical(), DISCRETE, RNG.integers(0, 4, size=12)),
    "normal": (normal, ng.DiagonalNormal(), CONTINUOUS, RNG.normal(size=(12, 2))),
}


class Problem:
    """A policy with its surrogate objective, scaled."""

    def __init__(self, name, scale=1.0):
        self.model, self.likelihood, self.params, actions = POLICIES[name]
        self.batch = {"states": STATES, "actions": actions, "advantages": ADVANTAGES}
        self.old = self.log_prob(self.params, self.batch)
        self.scale = scale

    def log_prob(self, params, batch):
        return self.likelihood.log_prob(self.model(params, batch), batch["actions"])

    def loss(self, params, batch):
        ratios = jnp.exp(self.log_prob(params, batch) - self.old)
        return -self.scale * jnp.mean(ratios * batch["advantages"])

    def gradient(self):
        return jax.grad(self.loss)(self.params, self.batch)

    def kl(self, step):
        moved = optax.apply_updates(self.params, step)
        return float(ng.kl_divergence(self.model, self.likelihood, self.params, moved, self.batch))

    def update(self, tx, updates, **extra):
        keywords = {"batch": self.batch, "value_fn": self.loss, **extra}
        step = jax.jit(lambda u, p: tx.update(u, tx.init(p), p, **keywords))
        return step(updates, self.params)

    def quadratic(self, step):
        metric = ng.exact_fisher(self.model, self.likelihood)
        return float(ng.fisher_quadratic_form(metric, self.params, self.batch, step) / 2)


def size(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


ALL = pytest.mark.parametrize("name", POLICIES)


@ALL
def test_h1_before_the_search_the_quadratic_kl_is_the_radius(name):
    problem = Problem(name)
    metric = ng.exact_fisher(problem.model, problem.likelihood)
    tx = optax.chain(
        ng.scale_by_natural_gradient(metric, solver=ng.cg()), ng.scale_to_kl(metric, RADIUS)
    )
    step, _ = problem.update(tx, problem.gradient())
    np.testing.assert_allclose(problem.quadratic(step), RADIUS, rtol=1e-10)
    unscaled, _ = problem.update(ng.scale_by_natural_gradient(metric), problem.gradient())
    assert abs(problem.quadratic(unscaled) - RADIUS) > 1e-3


@ALL
@pytest.mark.parametrize(
    ("scale", "solver", "rtol"),
    # Conjugate gradients past their last new direction magnify rounding: powers of two have none.
    [(2.0**-20, None, 1e-12), (2.0**20, None, 1e-12), (1e-6, "exact", 1e-9), (1e6, "exact", 1e-9)],
)
def test_h2_the_scale_of_the_objective_does_not_matter(name, scale, solver, rtol):
    steps = []
    for factor in (1.0, scale):
        problem = Problem(name, factor)
        solve = None if solver is None else ng.cholesky()
        tx = ng.trpo(problem.model, problem.likelihood, RADIUS, solver=solve)
        steps.append(problem.update(tx, problem.gradient())[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13), *steps)
    # The control: a step with a learning rate does change.
    assert size(Problem(name, scale).gradient()) != pytest.approx(size(Problem(name).gradient()))


@pytest.mark.smoke
@ALL
@pytest.mark.parametrize("longer", [1.0, 10.0])
def test_h3_an_accepted_step_is_within_the_radius_and_better(name, longer):
    problem = Problem(name)
    proposal, _ = problem.update(
        optax.chain(
            ng.natural_gradient(1.0, ng.exact_fisher(problem.model, problem.likelihood)),
            ng.scale_to_kl(ng.exact_fisher(problem.model, problem.likelihood), RADIUS),
            optax.scale(longer),
        ),
        problem.gradient(),
    )
    search = ng.scale_by_kl_line_search(problem.model, problem.likelihood, RADIUS)
    step, state = problem.update(search, proposal)
    moved = optax.apply_updates(problem.params, step)
    assert state.info.accepted and problem.kl(step) <= RADIUS
    assert problem.loss(moved, problem.batch) < problem.loss(problem.params, problem.batch)
    np.testing.assert_allclose(state.info.kl, problem.kl(step), rtol=1e-5)
    np.testing.assert_allclose(state.info.kl_before, problem.kl(proposal), rtol=1e-5)
    if longer > 1:
        assert problem.kl(proposal) > RADIUS and state.info.shrinks >= 6


@ALL
@pytest.mark.parametrize("longer", [1.0, 3.0, 30.0])
def test_h5_the_factor_is_the_first_that_satisfies_both(name, longer):
    problem = Problem(name)
    proposal = jax.tree.map(lambda g: -longer * g, problem.gradient())
    search = ng.scale_by_kl_line_search(problem.model, problem.likelihood, RADIUS, shrink=0.8)
    step, state = problem.update(search, proposal)

    def good(k):
        u = jax.tree.map(lambda x: 0.8**k * x, proposal)
        better = problem.loss(optax.apply_updates(problem.params, u), problem.batch)
        return problem.kl(u) <= RADIUS and better < problem.loss(problem.params, problem.batch)

    first = next((k for k in range(16) if good(k)), None)
    assert bool(state.info.accepted) == (first is not None)
    assert int(state.info.shrinks) == (15 if first is None else first)
    factor = 0.0 if first is None else 0.8**first
    expected = jax.tree.map(lambda x: factor * x, proposal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), step, expected)


@ALL
def test_h4_a_rejected_step_leaves_parameters_bit_identical(name):
    problem = Problem(name)
    uphill = problem.gradient()
    search = ng.scale_by_kl_line_search(problem.model, problem.likelihood, RADIUS)
    step, state = problem.update(search, uphill)
    moved = optax.apply_updates(problem.params, step)
    jax.tree.map(np.testing.assert_array_equal, moved, problem.params)
    assert not state.info.accepted and state.info.kl == 0
    # The control: the opposite step is taken.
    _, state = problem.update(search, jax.tree.map(jnp.negative, uphill))
    assert state.info.accepted


@ALL
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_h6_no_gradient_or_none_that_is_finite_gives_no_step(name, bad):
    problem = Problem(name)
    search = ng.scale_by_kl_line_search(problem.model, problem.likelihood, RADIUS)
    for tx in (ng.trpo(problem.model, problem.likelihood), search):
        updates = jax.tree.map(lambda p: np.full_like(p, bad), problem.params)
        step, _ = problem.update(tx, updates)
        assert size(step) == 0


def test_an_infinite_objective_is_never_accepted():
    problem = Problem("categorical")
    search = ng.scale_by_kl_line_search(problem.model, problem.likelihood, RADIUS)
    wall = lambda p: jnp.where(jnp.all(p["b"] == problem.params["b"]), 0.0, -jnp.inf * 0)
    step, state = problem.update(search, problem.gradient(), value_fn=wall)
    assert size(step) == 0 and int(state.info.shrinks) == 15


def test_a_metric_stands_for_model_and_likelihood():
    problem = Problem("categorical")
    metric = ng.exact_fisher(problem.model, problem.likelihood)
    one, _ = problem.update(ng.trpo(problem.model, problem.likelihood, RADIUS), problem.gradient())
    two, _ = problem.update(ng.trpo(metric, max_kl=RADIUS), problem.gradient())
    jax.tree.map(np.testing.assert_array_equal, one, two)
    with pytest.raises(ValueError, match="gauss_newton has no likelihood"):
        ng.trpo(ng.gauss_newton(problem.model))
    with pytest.raises(TypeError, match="likelihood is missing"):
        ng.scale_by_kl_line_search(problem.model)


@pytest.mark.parametrize(
    ("value_fn", "expected"),
    [
        (lambda params, batch: batch["states"].sum() + params["b"].sum(), True),
        (lambda params, other: other["states"].sum() + params["b"].sum(), True),
        (lambda *both: both[1]["states"].sum() + both[0]["b"].sum(), True),
        (lambda params, scale=1.0: scale * params["b"].sum(), True),
        (lambda params, *, batch=None: params["b"].sum() if batch is not None else np.nan, True),
        (lambda: 0.0, False),
    ],
)
def test_the_objective_gets_the_batch_where_it_asks_for_it(value_fn, expected):
    problem = Problem("categorical")
    search = ng.scale_by_kl_line_search(problem.model, problem.likelihood, RADIUS)
    updates = jax.tree.map(lambda p: -1e-3 * np.ones_like(p), problem.params)
    if not expected:
        with pytest.raises(TypeError):
            problem.update(search, updates, value_fn=value_fn)
        return
    _, state = problem.update(search, updates, value_fn=value_fn)
    assert state.info.accepted


def test_a_missing_objective_is_named():
    problem = Problem("categorical")
    for tx in (ng.trpo(problem.model, problem.likelihood),):
        with pytest.raises(TypeError, match="`value_fn`"):
            tx.update(
                problem.gradient(), tx.init(problem.params), problem.params, batch=problem.batch
            )
    with pytest.raises(ValueError, match="real scalar"):
        problem.update(tx, problem.gradient(), value_fn=lambda p: p["b"])
    with pytest.raises(TypeError, match="without auxiliary output, got tuple"):
        problem.update(tx, problem.gradient(), value_fn=lambda p: (p["b"].sum(), None))

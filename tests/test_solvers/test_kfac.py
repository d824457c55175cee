"""What `kfac` and `ekfac` keep from step to step: averages, turns, and when damping counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from natgrad_jax.solvers import _kronecker

RNG = np.random.default_rng(2)
PARAMS = {
    "one": {"w": RNG.normal(size=(3, 5)), "b": RNG.normal(size=5)},
    "two": {"w": RNG.normal(size=(5, 2)), "b": RNG.normal(size=2)},
}
GRADS = jax.tree.map(lambda x: RNG.normal(size=x.shape), PARAMS)
BATCHES = RNG.normal(size=(12, 6, 3))


def model(params, x):
    def layer(x, own):
        z = x @ own["w"]
        return z + jnp.broadcast_to(own["b"], z.shape)

    return layer(jnp.tanh(layer(x, params["one"])), params["two"])


MIXING = np.array([[1.0, 0.5], [0.0, 1.0]])


def residual(params, x):
    return jnp.tanh(model(params, x)) @ MIXING


METRIC = ng.gauss_newton(residual)


def run(solver, steps, dampings=None, grads=GRADS):
    """Directions and states of several steps at the same parameters."""
    tx = ng.scale_by_natural_gradient(METRIC, solver=solver)
    step = jax.jit(tx.update)
    state, found = tx.init(PARAMS), []
    for i in range(steps):
        damping = 0.1 if dampings is None else dampings[i]
        d, state = step(grads, state, PARAMS, batch=BATCHES[i], damping=damping)
        found.append((d, state.solver))
    return found


def same(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in pairs)


def input_moment(batch):
    inputs = np.c_[batch, np.ones(len(batch))]
    return inputs.T @ inputs / len(batch)


@pytest.mark.smoke
@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_factors_are_averages_corrected_for_their_start(make, x64):
    decay = 0.7
    states = [state for _, state in run(make(BATCHES[0], decay=decay), 3)]
    weights = np.array([decay**2, decay, 1.0])
    for i in range(3):
        own = weights[2 - i :]
        parts = [w * input_moment(BATCHES[k]) for k, w in enumerate(own)]
        average = states[i].average
        found = average.moments[0][0][0] / average.weights[0]
        np.testing.assert_allclose(found, sum(parts) / own.sum(), rtol=1e-12)


def test_without_decay_only_the_current_batch_counts(x64):
    """And with it, the control, earlier ones do."""
    for decay, expected in [(0, True), (0.9, False)]:
        late = run(ng.kfac(BATCHES[0], decay=decay, inverses_every=1), 4)[-1][0]
        tx = ng.scale_by_natural_gradient(METRIC, solver=ng.kfac(BATCHES[0]), damping=0.1)
        fresh, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCHES[3])
        assert same(late, fresh) is expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: ng.kfac(BATCHES[0], inverses_every=3),
        lambda: ng.kfac(BATCHES[0], inverses_every=3, damping_split="exact"),
        lambda: ng.ekfac(BATCHES[0], basis_every=3),
    ],
)
def test_each_factor_is_renewed_once_in_a_period_and_never_all_at_once(make, x64):
    states = [state for _, state in run(make(), 10)]
    of = lambda s: jax.tree.leaves(s.inverses if hasattr(s, "inverses") else s.bases)
    changed = lambda old, new: [bool(np.any(a != b)) for a, b in zip(of(old), of(new), strict=True)]
    changes = np.array([changed(*pair) for pair in itertools.pairwise(states)])
    for begin in range(len(changes) - 2):
        np.testing.assert_array_equal(changes[begin : begin + 3].sum(axis=0), 1)
    assert not changes.all(axis=1).any()


def test_turns_are_shared_out_evenly():
    costs = [100, 90, 80, 30, 20, 10, 10]
    steps = _kronecker.slots(costs, 3)
    loads = [sum(c for c, s in zip(costs, steps, strict=True) if s == k) for k in range(3)]
    assert max(loads) <= 1.2 * sum(costs) / 3
    assert _kronecker.slots([5, 5], 1) == [0, 0]


@pytest.mark.parametrize("solver", [ng.ekfac(BATCHES[0]), ng.kfac(BATCHES[0])])
def test_nothing_is_decomposed_outside_the_loop_over_what_is_due(solver, x64):
    """XLA moves what does not depend on the step out of a loop, where it would run every time."""
    tx = ng.scale_by_natural_gradient(METRIC, solver=solver, damping=0.1)
    step = jax.jit(lambda s: tx.update(GRADS, s, PARAMS, batch=BATCHES[0]))
    program = step.lower(tx.init(PARAMS)).compile().as_text()
    loops, entry = program.split("\nENTRY")
    assert "syevd" not in entry
    # Four factors of four orders; the inverses share one program and its rare branch.
    assert loops.count('custom_call_target="lapack_dsyevd') == (4 if solver.name == "ekfac" else 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("solver", "resting"),
    [
        (ng.kfac(BATCHES[0], inverses_every=2), {2}),
        (ng.kfac(BATCHES[0], inverses_every=1, decay=0, factors_every=2), {1, 2, 3, 5}),
        (ng.kfac(BATCHES[0], damping_split="exact"), {2}),
        (ng.ekfac(BATCHES[0], basis_every=2), {2}),
    ],
    ids=["kfac", "without_decay", "exact", "ekfac"],
)
def test_a_moment_that_is_not_finite_leaves_its_average_as_it_was(solver, resting, bad, x64):
    """Infinity enters the first layer alone, for tanh(inf) = 1; NaN goes everywhere."""
    tx = ng.scale_by_natural_gradient(METRIC, solver=solver, damping=0.1)
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    first = lambda average: (average.moments[0][0], average.means[0], average.weights[0])
    for i in range(6):
        batch = BATCHES[i].copy()
        batch[0, 0] = bad if i == 2 else batch[0, 0]
        before = state.solver
        d, state = step(GRADS, state, PARAMS, batch=batch)
        assert same(first(before.average), first(state.solver.average)) is (i in resting)
        if np.isnan(bad) or i != 2:
            assert same(before.average, state.solver.average) is (i in resting)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((d, state)))


@pytest.mark.parametrize(
    ("make", "basis_of_nothing"),
    [
        (lambda batch: ng.kfac(batch, inverses_every=3, decay=0), False),
        (lambda batch: ng.kfac(batch, inverses_every=3, decay=0, damping_split="exact"), False),
        (lambda batch: ng.ekfac(batch, basis_every=3, decay=0), True),
    ],
    ids=["kfac", "exact", "ekfac"],
)
def test_of_a_first_batch_that_is_not_finite_nothing_is_left(make, basis_of_nothing, x64):
    """The direction is 0 where nothing is known yet, and after a period that of a run without it.

    A scale of 300 entries has a diagonal, the layers have matrices.
    """
    rng = np.random.default_rng(0)
    params = {"scale": np.ones(300), "w": rng.normal(size=(300, 2)) / 20, "b": np.zeros(2)}
    row = lambda v: v.reshape(1, -1)
    model = lambda p, x: jnp.tanh((x * row(p["scale"])) @ p["w"] + row(p["b"]))
    metric = ng.gauss_newton(model)
    grads = jax.tree.map(np.ones_like, params)
    good, other = rng.normal(size=(2, 5, 300))
    bad = np.where(np.arange(300) == 0, np.nan, good)
    tx = ng.scale_by_natural_gradient(metric, solver=make(good), damping=1e-3)
    step, runs = jax.jit(tx.update), []
    for first in (bad, good):
        state, directions = tx.init(params), []
        for batch in (first, other, other, other):
            d, state = step(grads, state, params, batch=batch)
            directions.append(d)
        runs.append(directions)
    after_bad, after_good = runs
    for x in jax.tree.leaves(after_bad[0]):
        np.testing.assert_array_equal(x, 0)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(after_good[0]))
    for bad_step, good_step in zip(after_bad, after_good, strict=True):
        for x, y in zip(jax.tree.leaves(bad_step), jax.tree.leaves(good_step), strict=True):
            # A basis of nothing is the identity, in which EKFAC goes on.
            assert not np.any(x) or np.allclose(x, y, rtol=1e-6) or basis_of_nothing
    assert same(after_bad[-1], after_good[-1])


def test_factors_rest_between_their_steps(x64):
    states = [state for _, state in run(ng.kfac(BATCHES[0], factors_every=2), 4)]
    assert same(states[0].average, states[1].average)
    assert not same(states[1].average, states[2].average)
    assert same(states[2].average, states[3].average)


def test_with_the_factored_split_damping_counts_from_the_next_inversion_on(x64):
    constant = run(ng.kfac(BATCHES[0], inverses_every=4), 3, [0.1, 0.1, 0.1])
    changed = run(ng.kfac(BATCHES[0], inverses_every=4), 3, [0.1, 10.0, 10.0])
    stale = lambda runs, i: jax.tree.leaves(runs[i][1].inverses)
    kept = [
        np.array_equal(a, b) for a, b in zip(stale(constant, 1), stale(changed, 1), strict=True)
    ]
    assert 0 < sum(kept) < len(kept)
    exact = ng.kfac(BATCHES[0], inverses_every=4, damping_split="exact")
    one, two = (run(exact, 2, [0.1, d])[-1][0] for d in (0.1, 10.0))
    norm = lambda d: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(d)))
    assert norm(two) < 0.2 * norm(one)


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_damping_zero_is_a_pseudo_inverse(make, x64):
    """One example: every factor is singular."""
    gradient = jax.grad(lambda p: jnp.sum(residual(p, BATCHES[0][:1])))(PARAMS)
    directions = []
    for solver in (make(BATCHES[0][:1]), ng.cholesky()):
        d, _ = ng.natural_gradient_direction(
            METRIC, PARAMS, BATCHES[0][:1], gradient, solver=solver, damping=0.0
        )
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(d))
        directions.append(d)
    size = lambda d: max(np.abs(x).max() for x in jax.tree.leaves(d))
    assert size(directions[0]) < 10 * size(directions[1])


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_scaling_the_gradient_scales_the_direction(make, x64):
    (one, _), (large, _) = (
        run(make(BATCHES[0]), 1, grads=jax.tree.map(lambda g, c=c: c * g, GRADS))[0]
        for c in (1.0, 1e6)
    )
    assert same(jax.tree.map(lambda x: 1e6 * x, one), large)


def test_as_a_preconditioner_it_saves_iterations(x64):
    """E6: where it is exact, conjugate gradients are done at once; without it they are not."""
    x, w = RNG.normal(size=(30, 6)) * np.arange(1.0, 7.0), RNG.normal(size=(6, 2))
    metric = ng.gauss_newton(lambda w, x: x @ w)

    def iterations(preconditioner):
        solver = ng.cg(tol=1e-8, preconditioner=preconditioner)
        _, info = ng.natural_gradient_direction(metric, w, x, w, solver=solver, damping=1e-3)
        assert info.relative_residual < 1e-7
        return int(info.iterations)

    assert iterations(ng.kfac(x, damping_split="exact")) <= 2
    assert iterations(ng.ekfac(x)) <= 2
    assert iterations(None) > 4


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_a_mask_needs_example_params(make, x64):
    mask = {"one": True, "two": False}
    tx = optax.masked(ng.scale_by_natural_gradient(METRIC, solver=make(BATCHES[0])), mask)
    with pytest.raises(ValueError, match="example_params"):
        tx.init(PARAMS)
    solver = make(BATCHES[0], example_params=PARAMS)
    tx = optax.masked(ng.scale_by_natural_gradient(METRIC, solver=solver, damping=0.1), mask)
    arguments = dict(batch=BATCHES[0], full_params=PARAMS)
    d, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **arguments)
    whole = run(make(BATCHES[0]), 1)[0][0]
    # Blocks do not see one another: those of the visible layer are the same.
    assert same(d["one"], whole["one"])
    assert same(d["two"], GRADS["two"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(weight_sharing="mean"), "weight_sharing"),
        (dict(damping_split="none"), "damping_split"),
        (dict(decay=1.0), "decay"),
        (dict(factors_every=0), "factors_every"),
        (dict(inverses_every=2.5), "inverses_every"),
    ],
)
def test_settings_that_are_none_are_named(settings, words):
    with pytest.raises(ValueError, match=f"kfac: {words}"):
        ng.kfac(BATCHES[0], **settings)


def test_metrics_without_factors_are_named(x64):
    for metric, words in [
        (ng.euclidean(), "has"),
        (ng.empirical_fisher(lambda p, x: model(p, x)[:, 0], centered=True), "centered"),
    ]:
        with pytest.raises(ValueError, match=words):
            ng.natural_gradient_direction(
                metric, PARAMS, BATCHES[0], GRADS, solver=ng.kfac(BATCHES[0])
            )


def test_a_batch_of_another_structure_is_named(x64):
    deeper = lambda params, batch: (
        model(params, batch["x"]) * (params["one"]["b"][0] if "y" in batch else 1.0)
    )
    metric = ng.gauss_newton(deeper)
    tx = ng.scale_by_natural_gradient(metric, solver=ng.kfac({"x": BATCHES[0]}))
    with pytest.raises(ValueError, match="other blocks than the example_batch"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch={"x": BATCHES[0], "y": BATCHES[0]})


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_batches_of_any_size_will_do(make, x64):
    tx = ng.scale_by_natural_gradient(METRIC, solver=make(BATCHES[0]), damping=0.1)
    state = tx.init(PARAMS)
    for size in (4, 1):
        d, state = tx.update(GRADS, state, PARAMS, batch=BATCHES[0][:size])
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(d))


def test_without_example_params_a_placeholder_gives_a_prefix_of_the_state(x64):
    tx = ng.scale_by_natural_gradient(METRIC, solver=ng.kfac(BATCHES[0]))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_the_state_holds_factors_and_inverses_and_nothing_more(x64):
    state = ng.scale_by_natural_gradient(METRIC, solver=ng.kfac(BATCHES[0])).init(PARAMS).solver
    orders = [4, 5, 6, 2]
    # With a mean eigenvalue and a weight for each, and the count.
    held = 2 * sum(n * n for n in orders) + 2 * len(orders) + 1
    assert sum(x.size for x in jax.tree.leaves(state)) == held


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_a_scan_over_no_layers_is_no_block(make):
    model = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["l"])[0] @ p["o"]
    params, x = {"l": jnp.zeros((0, 4, 4)), "o": jnp.ones((4, 2))}, jnp.ones((8, 4))
    d, _ = ng.natural_gradient_direction(
        ng.gauss_newton(model), params, x, params, solver=make(x), damping=0.1
    )
    alone, _ = ng.natural_gradient_direction(
        ng.gauss_newton(lambda o, x: x @ o),
        params["o"],
        x,
        params["o"],
        solver=make(x),
        damping=0.1,
    )
    assert d["l"].shape == (0, 4, 4)
    np.testing.assert_allclose(d["o"], alone, rtol=1e-5)


def test_an_empty_batch_is_named(x64):
    with pytest.raises(ValueError, match="the batch is empty"):
        ng.natural_gradient_direction(
            METRIC, PARAMS, BATCHES[0][:0], GRADS, solver=ng.kfac(BATCHES[0])
        )


@pytest.mark.parametrize("solver", [None, ng.kfac(BATCHES[0])])
def test_a_donated_state_takes_nothing_with_it(solver, x64):
    key = jax.random.key(3)
    tx = ng.scale_by_natural_gradient(METRIC, solver=solver, damping=0.1, key=key)
    step = jax.jit(
        lambda state: tx.update(GRADS, state, PARAMS, batch=BATCHES[0])[1], donate_argnums=0
    )
    first, second = step(tx.init(PARAMS)), step(tx.init(PARAMS))
    assert same(first.info, second.info)
    assert jax.random.key_data(key).shape == (2,)


def test_explain_wants_a_solver(x64):
    with pytest.raises(ValueError, match="explain: unknown solver"):
        ng.explain(METRIC, PARAMS, BATCHES[0], ng.kfac)


@pytest.mark.parametrize("make", [ng.kfac, ng.ekfac])
def test_parameters_that_no_output_depends_on_are_divided_by_the_damping(make, x64):
    metric = ng.gauss_newton(lambda params, x: 2 * x)
    tx = ng.scale_by_natural_gradient(metric, solver=make(BATCHES[0]), damping=0.1)
    d, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCHES[0])
    assert same(d, jax.tree.map(lambda g: 10 * g, GRADS))

"""P3: the descent problems of optax's own tests, as least squares, inside `lax.scan`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

from . import cases

MATRIX = np.float32([[1.0, -2.0], [0.5, 3.0]])
VECTOR = np.float32([1.0, -1.0, 2.0])
STRETCH = np.float32([1.0, 0.5, 2.0])


def rosenbrock(p, batch):
    return jnp.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])


#: Name -> residual(params, batch) and a start.
PROBLEMS = {
    "parabola": (lambda p, batch: STRETCH * (p - VECTOR), np.zeros(3, np.float32)),
    "rosenbrock": (rosenbrock, np.float32([-1.0, 1.0])),
    "matrix_parabola": (lambda p, batch: p - MATRIX, np.zeros((2, 2), np.float32)),
    "mixed_tuple": (
        lambda p, batch: (STRETCH * (p[0] - VECTOR), p[1] - MATRIX),
        (np.zeros(3, np.float32), np.zeros((2, 2), np.float32)),
    ),
}
ALONE = list(PROBLEMS)
# All of them as one problem: every row of the table meets them in one compiled program.
PROBLEMS["together"] = (
    lambda p, batch: {name: PROBLEMS[name][0](p[name], batch) for name in ALONE},
    {name: PROBLEMS[name][1] for name in ALONE},
)
RESIDUALS = {name: residual for name, (residual, _) in PROBLEMS.items()}


def loss(name, params, batch=None):
    residuals = jax.tree.leaves(RESIDUALS[name](params, batch))
    return sum(0.5 * jnp.mean(jnp.sum(r.reshape(len(r), -1) ** 2, -1)) for r in residuals)


METRICS = {name: ng.gauss_newton(residual) for name, residual in RESIDUALS.items()}
HESSIANS = {name: ng.hessian(functools.partial(loss, name)) for name in PROBLEMS}


def stacked(name):
    """The residuals as the mean of a normal distribution: a model that has a likelihood."""

    def model(params, batch):
        leaves = jax.tree.leaves(RESIDUALS[name](params, batch))
        return jnp.concatenate([r.reshape(-1) / len(r) ** 0.5 for r in leaves])[None]

    return ng.exact_fisher(model, ng.Normal())


WITH_LIKELIHOOD = {name: stacked(name) for name in PROBLEMS}

# Other metrics than these do not fit a least-squares problem; the solvers do not know them apart.
FITTING = (None, cases.METRICS["exact_fisher"], cases.METRICS["hessian"])
DESCENDING = [
    (name, "together")
    for name, case in cases.CASES.items()
    if case.arguments.get("metric") in FITTING
]
DESCENDING += [("scale_by_natural_gradient-automatic", problem) for problem in ALONE]


def final_loss(tx, name, steps):
    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: loss(name, p))(params)
        updates, state = tx.update(
            grads, state, params, batch=None, grad=grads, value_fn=lambda p: loss(name, p)
        )
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return loss(name, params)

    return float(run(jax.tree.map(jnp.asarray, PROBLEMS[name][1])))


@pytest.mark.parametrize(("name", "problem"), DESCENDING)
def test_descends_to_the_minimum(name, problem):
    case = cases.CASES[name]
    metric = (HESSIANS if name.endswith("hessian") else METRICS)[problem]
    takes = inspect.signature(case.factory).parameters
    changes = cases.shaped(name, PROBLEMS[problem][1], None)
    if "metric" in takes:
        changes["metric"] = metric
    if "model" in takes:
        changes |= {"model": WITH_LIKELIHOOD[problem], "likelihood": None}
    tx = case.make(**changes)
    optimizer = tx if case.optimizer is None else case.optimizer(tx, metric)
    start = float(loss(problem, PROBLEMS[problem][1]))
    assert final_loss(optimizer, problem, case.steps) < 1e-3 * start


def test_the_wrong_sign_does_not_descend():
    """The control: what a `scale_by_*` gives, applied without the minus of a learning rate."""
    tx = ng.scale_by_natural_gradient(METRICS["parabola"], damping=1.0)
    start = float(loss("parabola", PROBLEMS["parabola"][1]))
    assert final_loss(tx, "parabola", 20) > start

"""The tables: a new metric, solver or transformation adds one row and gets every test.

Everything shares one tiny model with P = 8 parameters and N = 4 examples; `oracle.py` has its
matrices by hand. Hyper-parameters are operands of compiled programs, so tests that share a row
share its program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgrad_jax as ng

# Counts how often the model is traced: a second call of a compiled function must not add to it.
TRACES = {"model": 0}

_rng = np.random.default_rng(3)
# Small, so that no probability of the model is near 0 or 1.
PARAMS = {"b": 0.3 * _rng.normal(size=(2,)), "w": 0.5 * _rng.normal(size=(3, 2))}
GRADS = {"b": _rng.normal(size=(2,)), "w": _rng.normal(size=(3, 2))}
BATCH = {"x": _rng.normal(size=(4, 3)), "y": np.array([0, 1, 1, 0], np.int32)}

DAMPING = 1e-2


def logits(params, batch):
    """tanh(x w) + b in the dtypes of the parameters, whatever they are."""
    TRACES["model"] += 1
    w, b = params["w"], params["b"]
    return jnp.tanh(batch["x"].astype(w.dtype) @ w).astype(b.dtype) + b[None]


def log_prob(params, batch):
    return ng.Categorical().log_prob(logits(params, batch), batch["y"])


def residual(params, batch):
    z = logits(params, batch)
    return z - jax.nn.one_hot(batch["y"], 2, dtype=z.dtype)


def loss(params, batch):
    return -jnp.mean(log_prob(params, batch))


METRICS = {
    "exact_fisher": ng.exact_fisher(logits, ng.Categorical()),
    "sampled_fisher": ng.sampled_fisher(logits, ng.Categorical(), num_samples=2),
    "empirical_fisher": ng.empirical_fisher(log_prob),
    "gauss_newton": ng.gauss_newton(residual),
    "hessian": ng.hessian(loss),
    "euclidean": ng.euclidean(),
}


class SolverRow(NamedTuple):
    """A solver: the part of F it works with, and the relative residual it stops at."""

    solver: ng.Solver | None
    structure: str = "dense"
    tolerance: float = 0.0


SOLVERS = {
    "automatic": SolverRow(None),
    "cholesky": SolverRow(ng.cholesky()),
    "woodbury": SolverRow(ng.woodbury()),
    "qr": SolverRow(ng.qr()),
    "spectral": SolverRow(ng.spectral()),
    "cg": SolverRow(ng.cg(), tolerance=1e-6),
    "cg_diagonal": SolverRow(ng.cg(preconditioner=ng.diagonal()), tolerance=1e-6),
    "diagonal": SolverRow(ng.diagonal(), "diagonal"),
    "block_diagonal": SolverRow(ng.block_diagonal(), "blocks"),
}
# Solvers that are told the shapes of a problem.
SHAPED = {
    # Rosenbrock's valley forgives no inverse that is five steps old.
    "kfac": lambda params, batch: ng.kfac(batch, example_params=params, inverses_every=1),
    "kfac_exact": lambda params, batch: ng.kfac(
        batch, example_params=params, damping_split="exact", factors_every=2, inverses_every=2
    ),
    "ekfac": lambda params, batch: ng.ekfac(batch, example_params=params),
}
EXACT = [name for name, row in SOLVERS.items() if row.structure == "dense"]


def slope(params):
    """An objective whose gradient is that of the table."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(GRADS), strict=True)
    return sum(
        jnp.sum(x.astype(jnp.zeros(()).dtype) * g.astype(jnp.zeros(()).dtype)) for x, g in pairs
    )


def with_objective(factory):
    """A factory whose transformations are told an objective, unless `update` is told another."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)

        def update(updates, state, params=None, *, value_fn=slope, grad=None, **extra):
            grad = updates if grad is None else grad
            return tx.update(updates, state, params, value_fn=value_fn, grad=grad, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


class Case(NamedTuple):
    """A public transformation with settings.

    Attributes:
      factory: the public function.
      arguments: its arguments, all by keyword.
      schedules: those that may be schedules.
      params_like: fields of its state that hold trees like the parameters.
      optimizer: (a tx of this factory, its metric) -> an optimizer that descends; None: it is one.
      steps: how many steps that needs on the hardest of the contract's problems.
      static_args: arguments that `optax.inject_hyperparams` must not take for schedules.
      uses_batch: whether `update` needs parameters and batch.
      compiled: whether `update` is compiled also when called eagerly. What takes a `value_fn` is
        not: a fresh lambda on each step would compile each step.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    arguments: dict[str, Any]
    schedules: tuple[str, ...] = ()
    params_like: tuple[str, ...] = ()
    optimizer: Callable[[Any, Any], Any] | None = None
    steps: int = 60
    static_args: tuple[str, ...] = ()
    uses_batch: bool = True
    compiled: bool = True

    def make(self, **changes):
        return self.factory(**{**self.arguments, **changes})


def _rate(rate):
    return lambda tx, metric: optax.chain(tx, optax.scale(-rate))


def _decaying(rate, decay):
    """For steps of constant length: they must shrink to converge."""
    schedule = optax.exponential_decay(rate, 1, decay)
    return lambda tx, metric: optax.chain(tx, optax.scale_by_learning_rate(schedule))


def _after_natural_gradient(tx, metric):
    return optax.chain(
        ng.scale_by_natural_gradient(metric, damping=DAMPING),
        tx,
        optax.scale_by_learning_rate(optax.exponential_decay(1.0, 1, 0.97)),
    )


def _after_a_step(tx, metric):
    """For transformations of the step itself, in front of which a natural gradient makes one."""
    return optax.chain(ng.scale_by_natural_gradient(metric, damping=DAMPING), optax.scale(-1.0), tx)


def _levenberg_marquardt(metric, solver=None, initial_damping=DAMPING, factor=2.0):
    """The wrapper around its usual inner transformation, of the same metric."""
    inner = ng.natural_gradient(0.9, metric, solver=solver)
    return ng.levenberg_marquardt(inner, metric, initial_damping=initial_damping, factor=factor)


_exact = METRICS["exact_fisher"]
_MOMENTUM = dict(metric=_exact, damping=DAMPING, momentum=0.5)
_FULL = dict(
    learning_rate=0.5,
    metric=_exact,
    damping=DAMPING,
    momentum=0.3,
    max_kl=1.0,
    weight_decay=1e-3,
    key=5,
)

CASES = {
    **{
        f"scale_by_natural_gradient-{name}": Case(
            ng.scale_by_natural_gradient,
            dict(metric=_exact, solver=row.solver, damping=DAMPING),
            schedules=("damping",),
            params_like=("previous",) if "cg" in name else (),
            optimizer=_rate(1.0 if row.structure == "dense" else 0.3),
            steps=60 if row.structure == "dense" else 20_000,
        )
        for name, row in SOLVERS.items()
    },
    **{
        f"scale_by_natural_gradient-{name}": Case(
            ng.scale_by_natural_gradient,
            dict(metric=metric, damping=DAMPING),
            schedules=("damping",),
            optimizer=_rate(1.0),
        )
        for name, metric in METRICS.items()
        if metric is not _exact
    },
    **{
        f"scale_by_natural_gradient-{name}": Case(
            ng.scale_by_natural_gradient,
            dict(metric=_exact, solver=make(PARAMS, BATCH), damping=DAMPING),
            schedules=("damping",),
            optimizer=_rate(0.3),
            steps=20_000,
        )
        for name, make in SHAPED.items()
    },
    "scale_by_natural_gradient-momentum": Case(
        ng.scale_by_natural_gradient,
        _MOMENTUM,
        schedules=("damping", "momentum"),
        params_like=("velocity",),
        optimizer=_rate(0.3),
        steps=300,
    ),
    "scale_by_natural_gradient-damping_scale": Case(
        ng.scale_by_natural_gradient,
        dict(metric=_exact, damping=DAMPING, damping_scale=2.0),
        schedules=("damping",),
        optimizer=_rate(1.0),
    ),
    "natural_gradient": Case(
        ng.natural_gradient,
        dict(learning_rate=0.5, metric=_exact, damping=DAMPING),
        schedules=("learning_rate", "damping"),
        steps=100,
    ),
    "natural_gradient-everything": Case(
        ng.natural_gradient,
        _FULL,
        schedules=("learning_rate", "damping", "momentum"),
        params_like=("velocity",),
        steps=300,
    ),
    "scale_to_kl": Case(
        ng.scale_to_kl, dict(metric=_exact, kl=0.1), optimizer=_after_natural_gradient, steps=300
    ),
    "clip_by_kl": Case(
        ng.clip_by_kl,
        dict(metric=_exact, max_kl=0.1),
        optimizer=_after_natural_gradient,
        steps=300,
    ),
    "scale_by_kl_line_search": Case(
        with_objective(ng.scale_by_kl_line_search),
        dict(model=logits, likelihood=ng.Categorical(), max_kl=0.1),
        optimizer=_after_a_step,
        steps=300,
        static_args=("model",),
        compiled=False,
    ),
    "trpo": Case(
        with_objective(ng.trpo),
        dict(model=logits, likelihood=ng.Categorical(), max_kl=0.1, damping=DAMPING),
        schedules=("damping",),
        params_like=("previous",),
        steps=300,
        static_args=("model",),
        compiled=False,
    ),
    "levenberg_marquardt": Case(
        with_objective(_levenberg_marquardt),
        dict(metric=_exact, initial_damping=DAMPING, factor=2.0),
        compiled=False,
    ),
    "levenberg_marquardt-kfac": Case(
        with_objective(_levenberg_marquardt),
        dict(metric=_exact, solver=SHAPED["kfac"](PARAMS, BATCH), initial_damping=DAMPING),
        steps=20_000,
        compiled=False,
    ),
    "scale_by_quadratic_model": Case(
        with_objective(ng.scale_by_quadratic_model),
        dict(metric=_exact, damping=DAMPING),
        schedules=("damping",),
        params_like=("params",),
        optimizer=lambda tx, metric: optax.chain(
            ng.scale_by_natural_gradient(metric, damping=DAMPING), tx, optax.scale(-0.5)
        ),
        steps=300,
    ),
    "adaptive_natural_gradient": Case(
        with_objective(ng.adaptive_natural_gradient),
        dict(metric=_exact, initial_damping=DAMPING),
        params_like=("params",),
        compiled=False,
    ),
    **{
        f"scale_by_steepest_descent-{norm}": Case(
            ng.scale_by_steepest_descent,
            dict(norm=norm),
            optimizer=_decaying(0.2, 0.9995),
            steps=20_000,
            uses_batch=False,
        )
        for norm in ("l1", "l2")
    },
}

#: One row for each transformation, for properties that do not depend on solver or metric; the
#: solver that keeps a state counts as one.
REPRESENTATIVES = [
    "scale_by_natural_gradient-automatic",
    "scale_by_natural_gradient-cg_diagonal",
    "scale_by_natural_gradient-sampled_fisher",
    "natural_gradient-everything",
    "scale_to_kl",
    "clip_by_kl",
    "trpo",
    "levenberg_marquardt",
    "adaptive_natural_gradient",
    "scale_by_steepest_descent-l1",
    "scale_by_steepest_descent-l2",
]


@functools.cache
def transformation(name):
    """The transformation of a row; one object, so that tests share its compiled program."""
    return CASES[name].make()


def shaped(name, params, batch):
    """What a row needs changed for a problem of other shapes."""
    solver = name.removeprefix("scale_by_natural_gradient-").removeprefix("levenberg_marquardt-")
    return {"solver": SHAPED[solver](params, batch)} if solver in SHAPED else {}


def arrays(dtype=None):
    """Parameters, gradients and batch of the tiny model, floating leaves in `dtype`."""
    dtype = jnp.zeros(()).dtype if dtype is None else dtype

    def leaf(x):
        return jnp.asarray(x, dtype) if x.dtype.kind == "f" else jnp.asarray(x)

    return tuple(jax.tree.map(leaf, tree) for tree in (PARAMS, GRADS, BATCH))

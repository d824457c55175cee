"""NIST's certified nonlinear regressions from both starts, in float64, beside two other packages.

    right digits of the worst parameter / of the worst standard error / steps or evaluations

`python benchmarks/nist.py` takes the problems stated in the tests, `--data DIRECTORY` all of NIST's
own files in it (MGH10.dat, ...). Standard errors are those of each package's own answer: ours from
`asymptotic_covariance`, scipy's and optimistix's from (J^T J)^-1 RSS / (N - P) at their answer, as
`scipy.optimize.curve_fit` has it. Budget: 8 digits of parameters and 5 of standard errors.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import natgrad_jax as ng

jax.config.update("jax_enable_x64", True)
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.real_use.nist import PROBLEMS  # noqa: E402
from tests.real_use.nist import Problem  # noqa: E402
from tests.real_use.nist import digits  # noqa: E402
from tests.real_use.nist import read  # noqa: E402

LIMIT = 1500


def ours(problem: Problem):
    """A function of the start; with geodesic acceleration and damping as they come."""
    metric, batch = ng.gauss_newton(problem.residual), problem.batch
    loss = lambda b, batch: 0.5 * jnp.mean(problem.residual(b, batch) ** 2)
    inner = ng.natural_gradient(1.0, metric, solver=ng.cholesky())
    tx = ng.levenberg_marquardt(inner, metric)

    def step(carry):
        b, state = carry
        value, grads = jax.value_and_grad(loss)(b, batch)
        updates, state = tx.update(grads, state, b, batch=batch, value=value, value_fn=loss)
        return optax.apply_updates(b, updates), state

    going = lambda carry: ~carry[1].info.converged & (carry[1].count < LIMIT)
    run = jax.jit(lambda b: jax.lax.while_loop(going, step, (b, tx.init(b))))

    def solve(start):
        b, state = run(jnp.asarray(start))
        covariance = ng.asymptotic_covariance(
            metric, b, batch, len(problem.y), noise_variance="estimated"
        )
        return b, np.sqrt(np.diag(covariance)), int(state.count)

    return solve


def textbook_errors(problem: Problem, b):
    """Roots of the diagonal of (J^T J)^-1 RSS / (N - P) by singular values of J."""
    jacobian = np.asarray(jax.jacobian(problem.residual)(jnp.asarray(b), problem.batch))
    residual = np.asarray(problem.residual(jnp.asarray(b), problem.batch))
    if not np.all(np.isfinite(jacobian)):
        return np.full(len(problem.parameters), np.nan)
    _, values, right = np.linalg.svd(jacobian, full_matrices=False)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = right.T / values
        return np.sqrt(
            np.sum(scaled**2, axis=1) * (residual @ residual) / (len(residual) - len(values))
        )


def scipy_lm(problem: Problem):
    """MINPACK, which `least_squares` calls "lm", with its own scaling of columns."""
    residual = jax.jit(lambda b: problem.residual(b, problem.batch))
    jacobian = jax.jit(jax.jacfwd(residual))

    def solve(start):
        with np.errstate(all="ignore"):
            found = scipy.optimize.least_squares(
                lambda b: np.asarray(residual(b)),
                start,
                jac=lambda b: np.asarray(jacobian(b)),
                method="lm",
                x_scale="jac",
                xtol=1e-15,
                ftol=1e-15,
                gtol=1e-15,
                max_nfev=5000,
            )
        return found.x, textbook_errors(problem, found.x), found.nfev

    return solve


def optimistix_lm(problem: Problem):
    """`optimistix.LevenbergMarquardt` at tolerances of 1e-12."""
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=1e-12, atol=1e-12)

    def solve(start):
        found = optimistix.least_squares(
            problem.residual,
            solver,
            jnp.asarray(start),
            args=problem.batch,
            max_steps=LIMIT,
            throw=False,
        )
        steps = int(found.stats["num_steps"])
        return found.value, textbook_errors(problem, found.value), steps

    return solve


def main() -> None:
    """Prints the table, and how many problems each package solves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a directory with NIST's files")
    data = parser.parse_args().data
    files = sorted(data.glob("*.dat")) if data else []
    problems = {path.stem: read(path) for path in files} if data else PROBLEMS
    solvers = {"natgrad_jax": ours, "scipy lm": scipy_lm}
    if importlib.util.find_spec("optimistix"):
        solvers["optimistix"] = optimistix_lm
    print(f"{'':11}" + "".join(f"{name:>20}" for name in solvers))
    solved = dict.fromkeys(solvers, 0)
    for name, problem in problems.items():
        runs = {label: make(problem) for label, make in solvers.items()}
        for number, start in enumerate(problem.starts, 1):
            cells = []
            for label, solve in runs.items():
                b, errors, steps = solve(start)
                right = digits(b, problem.parameters), digits(errors, problem.errors)
                solved[label] += right[0] >= 8 and right[1] >= 5
                cells.append(f"{right[0]:8.1f}{right[1]:6.1f}{steps:6d}")
            print(f"{name:9} {number}" + "".join(cells), flush=True)
    total = 2 * len(problems)
    print("solved     " + "".join(f"{f'{count} of {total}':>20}" for count in solved.values()))


if __name__ == "__main__":
    main()

"""Stochastic reconfiguration in sample space against NetKet's `srt`, float64, one core, N = 1024.

    srt / woodbury on empirical_fisher(centered=True), P = 100 k (MLP 307-307)      budget >= 30
    the same at P = 10 k (MLP 91-91)                                                budget >= 7
    both on NetKet's own MLP with its log_cosh, P = 100 k and 10 k           budget >= 25 and >= 6

A real positive wave function, whose logarithm the net gives. `srt` takes local energies e and
solves with the centered rows R = (J - mean J) / sqrt(N) and 2 (e - mean e) / sqrt(N); that is
(R^T R + shift I)^-1 g for the energy's gradient g = 2 R^T (e - mean e) / sqrt(N), which our solver
gets (making it is not timed: it is a backward pass of what the driver has done). Both directions
must agree to 1e-6. `srt` is the function that NetKet's driver VMC_SR calls; it is internal, and
this script was written against NetKet 3.23. NetKet needs an environment of its own with `chex` in
it: PYTHONPATH=. python benchmarks/netket_srt.py.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import sys

import _timing
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

EXAMPLES, INPUTS = 1024, 16
SHIFT = 1e-3


def log_psi(params, x):
    """The logarithm of the wave function, (N,)."""
    return _timing.apply_mlp(params, x)[:, 0]


def wave_function(variables, x):
    """`log_psi` as NetKet applies a model."""
    return log_psi(variables["params"], x)


def own_net(width: int):
    """Our net as NetKet applies a model: (model, parameters)."""
    return wave_function, _timing.mlp((INPUTS, width, width, 1), jax.random.key(0), jnp.float64)


def netket_net(width: int):
    """NetKet's MLP with the activation of its own networks: (model, parameters)."""
    import netket as nk

    layers = {"hidden_dims": (width, width), "hidden_activations": nk.nn.log_cosh}
    model = nk.models.MLP(**layers, param_dtype=jnp.float64)
    variables = model.init(jax.random.key(0), jnp.ones((1, INPUTS)))
    return model.apply, variables["params"]


def measure(srt, cholesky, net, width: int, budget: int) -> None:
    model, params = net(width)
    log_psi = lambda p, x: model({"params": p}, x)
    spins = jax.random.rademacher(jax.random.key(1), (EXAMPLES, INPUTS), jnp.float64)
    energies = jax.random.normal(jax.random.key(2), (EXAMPLES,), jnp.float64)
    centered = energies - jnp.mean(energies)
    energy = lambda p: 2 * jnp.dot(centered, log_psi(p, spins)) / EXAMPLES
    grads = jax.jit(jax.grad(energy))(params)
    metric = ng.empirical_fisher(log_psi, centered=True)
    ours = jax.jit(
        lambda p, x, g: ng.natural_gradient_direction(
            metric, p, x, g, solver=ng.woodbury(), damping=SHIFT
        )[0]
    )

    def theirs():
        return srt(
            model,
            energies,
            params,
            {},
            spins,
            diag_shift=SHIFT,
            solver_fn=cholesky,
            mode="real",
        )[0]

    expected = ravel_pytree(theirs())[0]
    found = ravel_pytree(ours(params, spins, grads))[0]
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert error < 1e-6, error
    times = _timing.interleaved(
        {"woodbury": lambda: ours(params, spins, grads), "NetKet's srt": theirs}, rounds=5
    )
    _timing.print_ratios(
        f"{net.__name__} {width}-{width}, P = {expected.size}, N = {EXAMPLES} (budget {budget} x)",
        times,
        "woodbury",
    )


def main() -> None:
    try:
        from netket._src.ngd.sr_srt_common import srt
        from netket.optimizer.solver import cholesky
    except ImportError as error:
        sys.exit(f"netket_srt: NetKet 3.23 is needed (pip install netket): {error}")
    jax.config.update("jax_enable_x64", True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    measure(srt, cholesky, own_net, 307, 30)
    measure(srt, cholesky, own_net, 91, 7)
    measure(srt, cholesky, netket_net, 307, 25)
    measure(srt, cholesky, netket_net, 91, 6)


if __name__ == "__main__":
    main()

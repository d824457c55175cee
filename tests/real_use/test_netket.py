"""NetKet's own wave functions: what `explain` says of them, and their quantum geometric tensor.

log psi takes all samples at once, (N, sites) to (N,); parameters are those of flax, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

nk = pytest.importorskip("netket")
pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")
SITES = 4


def _spins():
    return nk.hilbert.Spin(s=0.5, N=SITES)


MODELS = {
    "RBM": lambda: nk.models.RBM(alpha=2),
    "MLP": lambda: nk.models.MLP(hidden_dims=(6, 5), hidden_activations=nk.nn.activation.log_cosh),
    "MLP with gelu": lambda: nk.models.MLP(hidden_dims=(6,)),
    "Jastrow": lambda: nk.models.Jastrow(param_dtype=jnp.float64),
    "RBM of amplitude and phase": lambda: nk.models.RBMModPhase(alpha=1),
    "dense ARNN": lambda: nk.models.ARNNDense(layers=2, features=3, hilbert=_spins()),
    "convolutional ARNN": lambda: nk.models.ARNNConv1D(
        layers=2, features=3, hilbert=_spins(), kernel_size=2
    ),
}


def wave_function(name):
    """The real part of log psi, its parameters and samples."""
    rng = np.random.default_rng(0)
    samples = jnp.asarray(rng.choice([-1.0, 1.0], size=(7, SITES)))
    module = MODELS[name]()
    variables = module.init(jax.random.key(0), samples)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape)), variables["params"]
    )
    rest = {k: v for k, v in variables.items() if k != "params"}
    return lambda p, x: module.apply({"params": p, **rest}, x).real, params, samples


def scores_of(log_psi, params, samples):
    jacobian = jax.tree.leaves(jax.jacrev(lambda p: log_psi(p, samples))(params))
    return np.concatenate([np.asarray(x).reshape(len(samples), -1) for x in jacobian], axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_samples_of_a_wave_function_are_independent(name):
    report = ng.explain(ng.empirical_fisher(wave_function(name)[0]), *wave_function(name)[1:])
    assert report.mode == "examples", str(report)


@pytest.mark.parametrize("name", ["RBM", "MLP", "MLP with gelu"])
def test_the_weights_of_its_dense_layers_are_factored(name):
    log_psi, params, samples = wave_function(name)
    report = ng.explain(ng.empirical_fisher(log_psi), params, samples)
    weights = [leaf.form for leaf in report.leaves if len(leaf.shape) == 2]
    assert weights and set(weights) == {"factored"}, str(report)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_its_geometric_tensor_is_the_moment_of_scores(name, centered):
    log_psi, params, samples = wave_function(name)
    scores = scores_of(log_psi, params, samples)
    scores = scores - scores.mean(0) if centered else scores
    expected = scores.T @ scores / len(samples)
    # Warnings are errors here: nothing may be said of mixing.
    found = ng.fisher_matrix(ng.empirical_fisher(log_psi, centered=centered), params, samples)
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_its_direction_of_reconfiguration_is_exact(name):
    log_psi, params, samples = wave_function(name)
    scores = scores_of(log_psi, params, samples)
    scores = scores - scores.mean(0)
    g = np.random.default_rng(1).normal(size=scores.shape[1])
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(g, np.cumsum([x.size for x in leaves])[:-1])
    shaped = [jnp.asarray(part.reshape(x.shape)) for part, x in zip(parts, leaves, strict=True)]
    grads = jax.tree.unflatten(structure, shaped)
    metric = ng.empirical_fisher(log_psi, centered=True)
    d, _ = ng.natural_gradient_direction(
        metric, params, samples, grads, solver=ng.woodbury(), damping=0.1
    )
    found = np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(d)])
    fisher = scores.T @ scores / len(samples) + 0.1 * np.eye(len(g))
    np.testing.assert_allclose(found, np.linalg.solve(fisher, g), rtol=1e-7, atol=1e-9)

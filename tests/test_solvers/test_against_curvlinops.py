"""Kronecker factors beside those of curvlinops, an independent implementation for torch.

Optional: it runs where the extra `benchmarks` is installed.
"""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

with warnings.catch_warnings():
    # torch.jit announces its own end when it is imported.
    warnings.simplefilter("ignore", FutureWarning)
    curvlinops = pytest.importorskip("curvlinops")
    torch = pytest.importorskip("torch")

RNG = np.random.default_rng(4)
SIZES = (5, 4, 3)
PARAMS = [
    {"w": RNG.normal(size=(p, q)), "b": RNG.normal(size=q)} for p, q in itertools.pairwise(SIZES)
]
INPUTS, LABELS = RNG.normal(size=(7, 5)), RNG.integers(0, 3, size=7)


def logits(params, x):
    first, last = params
    hidden = jnp.tanh(x @ first["w"] + jnp.broadcast_to(first["b"], (len(x), 4)))
    return hidden @ last["w"] + jnp.broadcast_to(last["b"], (len(x), 3))


EXACT = ng.exact_fisher(lambda p, batch: logits(p, batch[0]), ng.Categorical())
EMPIRICAL = ng.empirical_fisher(
    lambda p, batch: ng.Categorical().log_prob(logits(p, batch[0]), batch[1])
)


def theirs(operator, fisher):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    model = model.double()
    with torch.no_grad():
        for layer, own in zip((model[0], model[2]), PARAMS, strict=True):
            layer.weight.copy_(torch.as_tensor(own["w"].T))
            layer.bias.copy_(torch.as_tensor(own["b"]))
    data = [(torch.as_tensor(INPUTS), torch.as_tensor(LABELS))]
    return operator(
        model,
        torch.nn.CrossEntropyLoss(),
        list(model.parameters()),
        data,
        fisher_type=fisher,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


def as_torch(tree):
    leaves = [x for own in tree for x in (np.asarray(own["w"]).T, np.asarray(own["b"]))]
    return np.concatenate([x.reshape(-1) for x in leaves])


@pytest.mark.parametrize(
    ("metric", "fisher"), [(EXACT, "type-2"), (EMPIRICAL, "empirical")], ids=["exact", "empirical"]
)
@pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])
def test_products_agree(metric, fisher, corrected, x64):
    """And those of the other operator, the control, do not."""
    approximation = ng.kronecker_approximation(
        metric, PARAMS, (INPUTS, LABELS), eigenvalue_corrected=corrected
    )
    v = jax.tree.map(lambda x: RNG.normal(size=x.shape), PARAMS)
    found = as_torch(approximation.product(v))
    operators = [curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator]
    own, other = (
        np.asarray(theirs(operator, fisher) @ torch.as_tensor(as_torch(v)))
        for operator in (operators if not corrected else operators[::-1])
    )
    np.testing.assert_allclose(found, own, rtol=1e-8, atol=1e-8 * np.abs(own).max())
    assert np.abs(found - other).max() > 1e-3 * np.abs(own).max()

"""Bad input is named at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.likelihoods import Bernoulli
from natgrad_jax.likelihoods import Categorical
from natgrad_jax.likelihoods import DiagonalNormal
from natgrad_jax.likelihoods import Joint
from natgrad_jax.likelihoods import Normal
from natgrad_jax.likelihoods import Poisson
from natgrad_jax.likelihoods import from_distribution
from tests.test_likelihoods.facts import Exponential
from tests.test_likelihoods.facts import Hidden
from tests.test_likelihoods.facts import SampledOnly

INF = float("inf")


ZEROS, PAIRS = np.zeros((3, 2), np.float32), (np.zeros((3, 2)), np.zeros((3, 4)))
LABELS = np.zeros((3,), np.int32)
JOINT = Joint({"a": Normal(), "b": Normal()})
KEY = np.zeros((2,), np.uint32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Normal(0.0), ValueError, "Normal: scale must be positive, got 0.0"),
        (lambda: Normal(-1), ValueError, "Normal: scale must be positive, got -1"),
        (
            lambda: Normal(np.array([1.0, -2.0])),
            ValueError,
            r"Normal: scale must be .* got \[ 1. -2",
        ),
        (lambda: Normal(float("nan")), ValueError, "Normal: scale must be positive, got nan"),
        (
            lambda: Normal(np.ones(3)).kl(ZEROS, ZEROS),
            ValueError,
            r"Normal.kl: scale \(3,\).*\(3, 2\)",
        ),
        (lambda: Normal(np.ones((1, 1, 2))).kl(ZEROS, ZEROS), ValueError, r"scale \(1, 1, 2\)"),
        (
            lambda: Normal().log_prob(ZEROS, ZEROS[:, :1]),
            ValueError,
            r"Normal.log_prob: outputs of shape \(3, 2\) need .* \(3, 2\), got .* \(3, 1\)",
        ),
        (
            lambda: Categorical().log_prob(ZEROS, LABELS[:, None] + np.zeros((1, 2), np.int32)),
            ValueError,
            r"Categorical.log_prob: outputs of shape \(3, 2\) need .* \(3,\), got .* \(3, 2\)",
        ),
        (lambda: Poisson().log_prob(ZEROS, LABELS), ValueError, r"Poisson.log_prob: .*\(3,\)"),
        (
            lambda: Categorical().log_prob(ZEROS, ZEROS[:, 0]),
            TypeError,
            "Categorical.log_prob: targets must be integer class labels, got dtype float32",
        ),
        (lambda: Categorical().log_prob(ZEROS, LABELS > 0), TypeError, "integer.*bool"),
        (
            lambda: Bernoulli().log_prob(ZEROS, ZEROS + 1j),
            TypeError,
            "Bernoulli.log_prob: .*complex",
        ),
        (lambda: Normal().log_prob(ZEROS, [0.0]), TypeError, "targets must be one array, got list"),
        (lambda: Categorical().log_prob(ZEROS[0], LABELS[0]), ValueError, r"rows.*classes.*\(2,\)"),
        (
            lambda: Bernoulli().sample(KEY, np.float32(0)),
            ValueError,
            r"Bernoulli.sample: outputs need a leading axis of rows, got shape \(\)",
        ),
        (
            lambda: Poisson().kl(1.0, 1.0),
            TypeError,
            "Poisson.kl: outputs must be one array, got float",
        ),
        (
            lambda: Categorical().sample(KEY, (ZEROS, ZEROS)),
            TypeError,
            "Categorical.sample: outputs must be one array, got tuple",
        ),
        (lambda: Normal().kl(LABELS, LABELS), TypeError, "Normal.kl: .*floating point, got int32"),
        (lambda: Normal().kl(ZEROS + 1j, ZEROS), TypeError, "real floating point, got complex64"),
        (lambda: Normal().kl(ZEROS, ZEROS[:2]), ValueError, r"Normal.kl: .*\(3, 2\).*\(2, 2\)"),
        (
            lambda: Normal().fisher_product(ZEROS, ZEROS[:2]),
            ValueError,
            r"Normal.fisher_product: .*\(3, 2\).*\(2, 2\)",
        ),
        (
            lambda: Hidden(Normal()).fisher_factor_product(ZEROS, ZEROS[0]),
            ValueError,
            r"Hidden.fisher_factor_product: .*\(3, 2\).*\(2,\)",
        ),
        (
            lambda: DiagonalNormal().sample(KEY, ZEROS),
            TypeError,
            r"DiagonalNormal.sample: outputs must be a pair \(mean, log_scale\), got PyTreeDef",
        ),
        (
            lambda: DiagonalNormal().sample(KEY, (ZEROS,)),
            TypeError,
            r"pair.*got PyTreeDef\(\(\*,\)\)",
        ),
        (
            lambda: DiagonalNormal().sample(KEY, PAIRS),
            ValueError,
            r"DiagonalNormal.sample: mean \(3, 2\) and log_scale \(3, 4\) must have one shape",
        ),
        (
            lambda: DiagonalNormal().log_prob((ZEROS, ZEROS), LABELS),
            ValueError,
            r"DiagonalNormal.log_prob: outputs of shape \(3, 2\) .* got .* \(3,\)",
        ),
        (lambda: Joint((Normal(), Categorical)), TypeError, "Joint: head 1 must be a Likelihood"),
        (lambda: Joint(Normal()), TypeError, "Joint: needs a tuple, list or dict.*Normal"),
        (lambda: Joint({}), ValueError, "Joint: needs at least one likelihood"),
        (
            lambda: JOINT.log_prob({"a": ZEROS, "c": ZEROS}, {"a": ZEROS, "b": ZEROS}),
            ValueError,
            r"Joint.log_prob: .*\['a', 'c'\].*\['a', 'b'\]",
        ),
        (
            lambda: JOINT.log_prob({"a": ZEROS, "b": ZEROS}, {"a": ZEROS}),
            ValueError,
            r"Joint.log_prob: .*\['a'\].*\['a', 'b'\]",
        ),
        (lambda: JOINT.sample(KEY, (ZEROS, ZEROS)), ValueError, r"Joint.sample: .*tuple.*\[0, 1\]"),
        (
            lambda: JOINT.fisher_product(ZEROS, ZEROS),
            TypeError,
            "Joint.fisher_product: needs a tuple",
        ),
        (
            lambda: Joint((SampledOnly(),)).kl((ZEROS,), (ZEROS,)),
            TypeError,
            "exact Fisher of SampledOnly needs `kl`",
        ),
        (
            lambda: from_distribution(3),
            TypeError,
            "from_distribution: make and kl must be functions",
        ),
        (
            lambda: from_distribution(Exponential, kl=3),
            TypeError,
            "functions, got .*Exponential.*, 3",
        ),
        (
            lambda: from_distribution(lambda z: Exponential(jnp.sum(z))).log_prob(
                ZEROS, ZEROS[0, 0]
            ),
            ValueError,
            r"from_distribution.log_prob: .*\(3,\).*shape \(\)",
        ),
    ],
)
def test_bad_input_is_named_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()

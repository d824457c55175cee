"""One's own likelihoods, several heads, other libraries."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from natgrad_jax.likelihoods import Categorical
from natgrad_jax.likelihoods import DiagonalNormal
from natgrad_jax.likelihoods import Joint
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.likelihoods import Normal
from natgrad_jax.likelihoods import from_distribution
from tests.test_likelihoods.facts import METHODS
from tests.test_likelihoods.facts import Exponential
from tests.test_likelihoods.facts import Hidden
from tests.test_likelihoods.facts import SampledOnly
from tests.test_likelihoods.facts import arrays
from tests.test_likelihoods.facts import assert_trees_close
from tests.test_likelihoods.facts import dense
from tests.test_likelihoods.facts import other
from tests.test_likelihoods.facts import transposed
from tests.test_likelihoods.oracles import LOGITS

INF = float("inf")


class Correlated(Likelihood):
    """Two correlated Gaussians in a dict of outputs; the precision is not diagonal in a row."""

    precision = np.array([[2.0, -0.6], [-0.6, 0.5]])

    def kl(self, outputs_p, outputs_q):
        a, b = (outputs_p[name] - outputs_q[name] for name in "ab")
        p = self.precision
        return 0.5 * (p[0, 0] * a**2 + 2 * p[0, 1] * a * b + p[1, 1] * b**2)


def test_ones_own_likelihood_with_a_tree_of_outputs(x64):
    z = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([3.0, -1.0])}
    products = Correlated().fisher_product, Correlated().fisher_factor_product
    fisher, factor = jax.jit(lambda z: [dense(product, z) for product in products])(z)
    expected = np.stack([Correlated.precision] * 2)
    np.testing.assert_allclose(fisher, expected, atol=1e-14)
    np.testing.assert_allclose(factor @ transposed(factor), expected, atol=1e-14)


def test_what_is_missing_is_named():
    z, own = jnp.zeros((2,)), SampledOnly()
    assert own.log_prob(z, own.sample(jax.random.key(0), z)).shape == (2,)
    for call in (own.kl, own.fisher_product, own.fisher_factor_product):
        with pytest.raises(
            TypeError, match="exact Fisher of SampledOnly needs `kl`.*sampled_fisher"
        ):
            call(z, z)
    with pytest.raises(TypeError, match="Correlated.log_prob.*must implement"):
        Correlated().log_prob(z, z)
    with pytest.raises(TypeError, match="Correlated.sample"):
        Correlated().sample(jax.random.key(0), z)


def test_likelihoods_compare_by_identity():
    one, two = Normal(1.0), Normal(1.0)
    assert one == one and one != two and len({one, two, one}) == 2


Heads = collections.namedtuple("Heads", ["first", "second"])
CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda a, b: (a, b)),
    "list": (lambda a, b: [a, b], lambda a, b: [a, b]),
    "dict": (lambda a, b: {"z": a, "y": b}, lambda a, b: {"z": a, "y": b}),
    "namedtuple": (lambda a, b: (a, b), Heads),
    "ordered": (lambda a, b: {"z": a, "y": b}, lambda a, b: collections.OrderedDict(z=a, y=b)),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_heads_are_summed_and_block_diagonal(container):
    of_likelihoods, of_arrays = CONTAINERS[container]
    action, value = Normal(0.5), DiagonalNormal()
    joint = Joint(of_likelihoods(action, value))
    means, pair = jnp.ones((3, 2)), (jnp.ones((3,)), jnp.zeros((3,)))
    outputs, shifted = of_arrays(means, pair), of_arrays(2 * means, pair[::-1])
    targets = joint.sample(jax.random.key(0), outputs)
    assert jax.tree.structure(targets) == jax.tree.structure(of_arrays(0, 0))
    first, second = (targets[k] for k in (("z", "y") if isinstance(targets, dict) else (0, 1)))
    expected = action.log_prob(means, first) + value.log_prob(pair, second)
    np.testing.assert_allclose(joint.log_prob(outputs, targets), expected, rtol=1e-6)
    expected = action.kl(means, 2 * means) + value.kl(pair, pair[::-1])
    np.testing.assert_allclose(joint.kl(outputs, shifted), expected, rtol=1e-6)
    for method in METHODS:
        heads = (action, means, 2 * means), (value, pair, pair[::-1])
        expected = of_arrays(*(getattr(head, method)(z, v) for head, z, v in heads))
        got = getattr(joint, method)(outputs, shifted)
        assert jax.tree.structure(got) == jax.tree.structure(outputs)
        assert_trees_close(got, expected, rtol=1e-6)
    default = jax.jit(Hidden(joint).fisher_product)(outputs, shifted)
    assert_trees_close(default, joint.fisher_product(outputs, shifted), rtol=1e-6)


def test_heads_draw_from_keys_of_their_own():
    z = jnp.zeros((5,))
    one, two = Joint((Normal(), Normal())).sample(jax.random.key(0), (z, z))
    assert not np.any(np.asarray(one) == np.asarray(two))


def test_heads_may_differ_in_dtype_and_in_rows(x64):
    joint = Joint((Normal(), Normal()))
    mixed = jnp.zeros((3,), jnp.float32), jnp.zeros((3,), jnp.float64)
    assert joint.log_prob(mixed, mixed).dtype == jnp.float64
    uneven = jnp.ones((3,)), jnp.ones((5,))
    assert_trees_close(joint.fisher_product(uneven, uneven), uneven)
    assert [y.shape for y in joint.sample(jax.random.key(0), uneven)] == [(3,), (5,)]
    for call in (joint.log_prob, joint.kl):
        with pytest.raises(ValueError, match="cannot be summed row by row.*3.*5"):
            call(uneven, uneven)


def check_adapter(adapted, closed, outputs):
    z, v = arrays((outputs, other(outputs)))
    repeated = jax.tree.map(lambda z: jnp.tile(z[:1], (4000,) + (1,) * (z.ndim - 1)), z)

    @jax.jit
    def compute(z, v, repeated):
        y = adapted.sample(jax.random.key(0), z)
        facts = [(x.log_prob(z, y), x.kl(z, v), x.fisher_product(z, v)) for x in (adapted, closed)]
        drawn = [x.sample(jax.random.key(1), repeated) for x in (adapted, closed)]
        return (
            facts,
            drawn,
            dense(adapted.fisher_factor_product, z),
            dense(closed.fisher_product, z),
        )

    (got, expected), (ours, theirs), factor, fisher = compute(z, v, repeated)
    assert_trees_close(got, expected, rtol=1e-9, atol=1e-10)
    difference = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    assert np.all(difference < 6 * np.std(ours, axis=0) / np.sqrt(2000))
    np.testing.assert_allclose(factor @ transposed(factor), fisher, atol=1e-10)


IMAGES = np.random.default_rng(0).normal(size=(3, 2, 2))


def test_distrax_distributions(x64, standard_promotion):
    distrax = pytest.importorskip("distrax")
    check_adapter(from_distribution(lambda z: distrax.Categorical(logits=z)), Categorical(), LOGITS)
    diagonal = lambda z: distrax.MultivariateNormalDiag(z[0], jnp.exp(z[1]))
    check_adapter(from_distribution(diagonal), DiagonalNormal(), (IMAGES[0], IMAGES[1]))


def test_numpyro_distributions(x64, standard_promotion):
    numpyro = pytest.importorskip("numpyro.distributions")
    make = lambda z: numpyro.Categorical(logits=z)
    kl = lambda p, q: jnp.sum(p.probs * (jnp.log(p.probs) - jnp.log(q.probs)), axis=-1)
    check_adapter(from_distribution(make, kl=kl), Categorical(), LOGITS)
    make = lambda z: numpyro.Normal(z[0], jnp.exp(z[1])).to_event(1)
    diagonal = from_distribution(make, kl=numpyro.kl_divergence)
    check_adapter(diagonal, DiagonalNormal(), (IMAGES[0], IMAGES[1]))
    with pytest.raises(
        TypeError, match="needs `kl`; pass kl= to from_distribution.*sampled_fisher"
    ):
        from_distribution(make).fisher_product((IMAGES[0], IMAGES[1]), (IMAGES[0], IMAGES[1]))


def test_any_object_will_do(x64):
    adapted, z = from_distribution(Exponential), jnp.asarray(IMAGES)
    y = adapted.sample(jax.random.key(0), z)
    expected = scipy.stats.expon.logpdf(y, scale=np.exp(-IMAGES)).sum((1, 2))
    np.testing.assert_allclose(adapted.log_prob(z, y), expected, rtol=1e-12)
    products = jax.jit(lambda z: [getattr(adapted, method)(z, z) for method in METHODS])(z)
    assert_trees_close(products, [z, z], rtol=1e-12)  # unit information
    assert adapted.log_prob(z.astype(jnp.bfloat16), y.astype(jnp.float32)).dtype == jnp.float32
    assert isinstance(adapted, Likelihood)

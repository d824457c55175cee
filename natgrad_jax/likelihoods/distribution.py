"""Distribution objects of other libraries as likelihoods."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.base import Likelihood

Tree = Any


def from_distribution(
    make: Callable[[Tree], Any], *, kl: Callable[[Any, Any], jax.Array] | None = None
) -> Likelihood:
    r"""The likelihood of distribution objects in the style of distrax, numpyro or TFP.

    The Fisher products are those of :class:`Likelihood`, by differentiating the divergence twice; a
    class with a closed form is cheaper.

    Args:
      make: outputs, leaves (N, ...), to an object with `log_prob(targets)` and `sample`, which gets
        the key as `seed=` if its signature has it, else as first argument. Its batch shape begins
        with N; what follows is summed. It sees all rows at once, and may hold one constant a row.
      kl: KL[p || q] of two such objects; by default p's own `kl_divergence(q)`.

    Returns:
      A :class:`Likelihood`.

    Raises:
      TypeError: `make` or `kl` is no function; in use, the exact Fisher is asked for without a KL.
      ValueError: in use, the log-probabilities do not begin with N.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> class Laplace:
      ...     def __init__(self, mean):
      ...         self.mean = mean
      ...     def log_prob(self, value):
      ...         return -jnp.abs(value - self.mean)
      >>> laplace = ng.from_distribution(Laplace)
      >>> laplace.log_prob(jnp.zeros((2, 3)), jnp.ones((2, 3))).tolist()
      [-3.0, -3.0]
    """
    if not callable(make) or not (kl is None or callable(kl)):
        raise TypeError(f"from_distribution: make and kl must be functions, got {make!r}, {kl!r}")
    return _FromDistribution(make, kl)


class _FromDistribution(Likelihood):
    def __init__(self, make: Callable, kl: Callable | None):
        self._make, self._divergence = make, kl

    def log_prob(self, outputs: Tree, targets: Tree) -> jax.Array:
        z = reading.promote("from_distribution.log_prob", outputs)
        return self._rows("log_prob", z, self._make(z).log_prob(targets))

    def sample(self, key: jax.Array, outputs: Tree) -> Tree:
        draw = self._make(reading.promote("from_distribution.sample", outputs)).sample
        return draw(seed=key) if "seed" in inspect.signature(draw).parameters else draw(key)

    def kl(self, outputs_p: Tree, outputs_q: Tree) -> jax.Array:
        z_p, z_q = reading.promote("from_distribution.kl", (outputs_p, outputs_q))
        p, q = self._make(z_p), self._make(z_q)
        if self._divergence is not None:
            return self._rows("kl", z_p, self._divergence(p, q))
        try:
            return self._rows("kl", z_p, p.kl_divergence(q))
        except (AttributeError, NotImplementedError) as error:
            raise reading.NoDivergenceError(p, "pass kl= to from_distribution") from error

    def _rows(self, method: str, z: Tree, values: jax.Array) -> jax.Array:
        rows, shape = jax.tree.leaves(z)[0].shape[:1], jnp.shape(values)
        if shape[:1] != rows:
            needs = f"must begin with the leading axis {rows} of outputs, got shape {shape}"
            raise ValueError(f"from_distribution.{method}: what the distribution gives {needs}")
        return reading.sum_trailing(values.astype(_trees.work_dtype(z)))

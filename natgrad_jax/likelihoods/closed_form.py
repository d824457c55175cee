"""What likelihoods with a closed form share: checks, casts, sums over positions, draws by row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.base import Likelihood

Tree = Any


class ClosedForm(Likelihood):
    """Checks, casts and sums around `_log_prob` and `_kl` (one value a position), `_sample`, and M.

    All get the outputs z of all rows, promoted, and c, the likelihood's constant for each position
    of them (None without one). M is given by its diagonal, `_information`, or by its products,
    `_fisher` and `_factor`. What is left out says that it has no closed form.
    """

    _log_prob: Callable[..., jax.Array]
    _sample: Callable[..., Tree]
    _kl: Callable[..., jax.Array] | None = None
    _information: Callable[..., Tree]

    def log_prob(self, outputs: Tree, targets: Tree) -> jax.Array:
        """Log-probability of the targets in nats, (N,), summed over trailing positions."""
        call = reading.call(self, "log_prob")
        z, c = self._parameters(call, outputs)
        return reading.sum_trailing(self._log_prob(z, self._read_targets(call, z, targets), c))

    def sample(self, key: jax.Array, outputs: Tree) -> Tree:
        """Targets drawn from the model, as `log_prob` takes them."""
        return self._sample(key, *self._parameters(reading.call(self, "sample"), outputs))

    def kl(self, outputs_p: Tree, outputs_q: Tree) -> jax.Array:
        """KL[p || q] in nats, (N,), summed over trailing positions."""
        if self._kl is None:
            return super().kl(outputs_p, outputs_q)
        call = reading.call(self, "kl")
        p, q = self._read(call, outputs_p), self._read(call, outputs_q)
        reading.check_alike(call, p, q)
        p, q = _trees.cast((p, q), _trees.work_dtype(p, q))
        return reading.sum_trailing(self._kl(p, q, self._constant(call, p)))

    def fisher_product(self, outputs: Tree, tangents: Tree) -> Tree:
        """M_n v_n for every row, in closed form."""
        call = reading.call(self, "fisher_product")
        z, c = self._parameters(call, outputs)
        z, v = reading.operands(call, z, tangents)
        return self._fisher(z, v, c)

    def fisher_factor_product(self, outputs: Tree, coefficients: Tree) -> Tree:
        """B_n u_n for every row, in closed form."""
        call = reading.call(self, "fisher_factor_product")
        z, c = self._parameters(call, outputs)
        z, u = reading.operands(call, z, coefficients)
        return self._factor(z, u, c)

    def _draw(self, key: jax.Array, outputs: Tree, row_keys: jax.Array) -> Tree:
        if type(self).sample is not ClosedForm.sample:  # a subclass draws in another way
            return self.sample(key, outputs)
        parameters = self._parameters(reading.call(self, "sample"), outputs)
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        draw = lambda k, row: jax.tree.map(lambda y: y[0], self._sample(k, *one(row)))
        return jax.vmap(draw)(row_keys, parameters)

    def _parameters(self, call: str, outputs: Tree) -> tuple[Tree, Any]:
        z = self._read(call, outputs)
        return z, self._constant(call, z)

    def _read(self, call: str, outputs: Tree) -> Tree:
        return reading.promote(call, reading.array(call, "outputs", outputs))

    def _constant(self, call: str, z: Tree) -> Any:
        del call, z
        return None

    def _read_targets(self, call: str, z: Tree, targets: Tree) -> jax.Array:
        first = jax.tree.leaves(z)[0]
        return reading.targets(call, targets, first.shape, first).astype(first.dtype)

    def _fisher(self, z: Tree, v: Tree, c: Any) -> Tree:
        return jax.tree.map(lambda m, x: m * x, self._information(z, c), v)

    def _factor(self, z: Tree, u: Tree, c: Any) -> Tree:
        return jax.tree.map(lambda m, x: jnp.sqrt(m) * x, self._information(z, c), u)


def alike(outputs: Tree, *leaves: jax.Array) -> Tree:
    """Arrays in the structure of outputs, a tuple or a list."""
    return jax.tree.unflatten(jax.tree.structure(outputs), leaves)


def pair_product(matrix: tuple, v: tuple) -> tuple[jax.Array, jax.Array]:
    """M v for symmetric matrices (2, 2) given as (m00, m01, m11)."""
    m00, m01, m11 = matrix
    return m00 * v[0] + m01 * v[1], m01 * v[0] + m11 * v[1]


def pair_factor(matrix: tuple, u: tuple) -> tuple[jax.Array, jax.Array]:
    """B u with the Cholesky factor of M, as `pair_product` takes it."""
    m00, m01, m11 = matrix
    first = jnp.sqrt(m00)
    below = m01 / jnp.where(first > 0, first, 1)
    rest = jnp.sqrt(jnp.maximum(m11 - below * below, 0))
    return first * u[0], below * u[0] + rest * u[1]

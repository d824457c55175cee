"""The base class of likelihoods: two methods to write, the rest by automatic differentiation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from natgrad_jax import _outputs

Tree = Any


class Likelihood:
    """A family of distributions p(targets | outputs); subclass it for one's own.

    Implement `log_prob` and `sample`, and `kl` for the exact Fisher; the Fisher products follow by
    automatic differentiation, and may be overridden. No `__init__` is needed. Instances compare and
    hash by identity: build one and keep it, or what is compiled for it is compiled again.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> class Exponential(ng.Likelihood):  # outputs: log rate
      ...     def log_prob(self, outputs, targets):
      ...         return outputs - jnp.exp(outputs) * targets
      ...     def sample(self, key, outputs):
      ...         return jax.random.exponential(key, outputs.shape) / jnp.exp(outputs)
      ...     def kl(self, outputs_p, outputs_q):
      ...         return jnp.expm1(outputs_q - outputs_p) - (outputs_q - outputs_p)
      >>> z = jnp.array([-1.0, 0.0, 2.0])
      >>> Exponential().fisher_product(z, jnp.ones((3,))).tolist()  # unit information everywhere
      [1.0, 1.0, 1.0]
    """

    def log_prob(self, outputs: Tree, targets: Tree) -> jax.Array:
        """Log-probability of the targets in nats, (N,), summed over trailing positions."""
        raise TypeError(
            f"{_outputs.call(self, 'log_prob')}: a Likelihood must implement `log_prob`"
        )

    def sample(self, key: jax.Array, outputs: Tree) -> Tree:
        """Targets drawn from the model with a `jax.random` key, as `log_prob` takes them."""
        raise TypeError(
            f"{_outputs.call(self, 'sample')}: implement `sample` to draw from the model"
        )

    def kl(self, outputs_p: Tree, outputs_q: Tree) -> jax.Array:
        """KL[p(. | outputs_p) || p(. | outputs_q)] in nats, (N,), summed over trailing positions.

        Raises:
          TypeError: this likelihood has none; `fisher_product` raises it too.
        """
        raise TypeError(_outputs.needs_kl(self, "implement it"))

    def fisher_product(self, outputs: Tree, tangents: Tree) -> Tree:
        """M_n v_n for every row, tangents v and result like outputs, without a mean over rows.

        By default the Hessian of `kl` in its second argument, forward over reverse mode.
        """
        z, v = _outputs.operands(_outputs.call(self, "fisher_product"), outputs, tangents)
        gradient = jax.grad(lambda other: jnp.sum(self.kl(z, other)))
        # `linearize` and not `jvp`: its product is linear by construction, so it can be transposed.
        return jax.linearize(gradient, z)[1](v)

    def fisher_factor_product(self, outputs: Tree, coefficients: Tree) -> Tree:
        """B_n u_n for every row, M_n = B_n B_n^T, coefficients u and result like outputs.

        By default B_n is the symmetric square root of the dense M_n: K Fisher products and K^3
        operations a row, K being the numbers in a row. Eigenvalues below zero are rounding: cut.
        """

        def row(z, u):
            u, unravel = ravel_pytree(u)
            batch = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
            column = lambda e: ravel_pytree(self.fisher_product(batch(z), batch(unravel(e))))[0]
            values, vectors = jnp.linalg.eigh(jax.vmap(column)(jnp.eye(u.size, dtype=u.dtype)))
            root, highest = jnp.sqrt(jnp.maximum(values, 0)), jax.lax.Precision.HIGHEST
            u = root * jnp.matmul(vectors.T, u, precision=highest)
            return unravel(jnp.matmul(vectors, u, precision=highest))

        call = _outputs.call(self, "fisher_factor_product")
        return jax.vmap(row)(*_outputs.operands(call, outputs, coefficients))

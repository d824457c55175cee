"""The base class of likelihoods: two methods to write, the rest by automatic differentiation."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _trees
from natgrad_jax.likelihoods import reading

Tree = Any


class Likelihood:
    """A family of distributions p(targets | outputs); subclass it for one's own.

    Implement `log_prob` and `sample`, and `kl` for the exact Fisher; the Fisher products follow by
    automatic differentiation, and may be overridden. No `__init__` is needed. Instances compare and
    hash by identity: build one and keep it, or what is compiled for it is compiled again.

    Methods see the outputs of all rows at once, never one row by itself: an attribute may hold one
    number a row (noise, exposure, trials). Rows are independent: row n of every result depends on
    row n of the arguments alone.

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

    Notes:
      `sampled_fisher` calls `sample` once for all rows and each sample. Where it draws arrays whose
      leading axis is that of the rows, JAX's counter-based generator gives a row the same numbers
      however many rows follow, so that padding a batch changes no draw. The likelihoods of this
      package draw with a key for each row, and promise it.
    """

    def log_prob(self, outputs: Tree, targets: Tree) -> jax.Array:
        """Log-probability of the targets in nats, (N,), summed over trailing positions."""
        raise TypeError(f"{reading.call(self, 'log_prob')}: a Likelihood must implement `log_prob`")

    def sample(self, key: jax.Array, outputs: Tree) -> Tree:
        """Targets drawn from the model with a `jax.random` key, as `log_prob` takes them."""
        raise TypeError(
            f"{reading.call(self, 'sample')}: implement `sample` to draw from the model"
        )

    def kl(self, outputs_p: Tree, outputs_q: Tree) -> jax.Array:
        """KL[p(. | outputs_p) || p(. | outputs_q)] in nats, (N,), summed over trailing positions.

        Raises:
          TypeError: this likelihood has none; `fisher_product` raises it too.
        """
        raise reading.NoDivergenceError(self, "implement it")

    def fisher_product(self, outputs: Tree, tangents: Tree) -> Tree:
        """M_n v_n for every row, tangents v and result like outputs, without a mean over rows.

        By default the Hessian of `kl`, summed over rows, in its second argument.

        Raises:
          ValueError: `kl` does not give one number a row.
        """
        z, v = reading.operands(reading.call(self, "fisher_product"), outputs, tangents)

        def total(other: Tree) -> jax.Array:
            return jnp.sum(reading.one_a_row(reading.call(self, "kl"), self.kl(z, other), z))

        # `linearize` and not `jvp`: its product is linear by construction, so it can be transposed.
        return jax.linearize(jax.grad(total), z)[1](v)

    def fisher_factor_product(self, outputs: Tree, coefficients: Tree) -> Tree:
        """B_n u_n for every row, M_n = B_n B_n^T, coefficients u and result like outputs.

        By default B_n is the symmetric square root of the dense M_n, whose column c comes from one
        Fisher product of all rows with the c-th unit vector in every row: C products and C^3
        operations a row, C being the numbers in a row. Eigenvalues below zero are rounding: cut.
        """
        call = reading.call(self, "fisher_factor_product")
        z, u = reading.operands(call, outputs, coefficients)
        number = reading.number_of_rows(call, z)
        rows = lambda tree: jnp.concatenate(
            [x.reshape(number, x.size // max(number, 1)) for x in jax.tree.leaves(tree)], axis=1
        )
        flat = rows(u)

        def column(unit: jax.Array) -> jax.Array:
            everywhere = _like_rows(jnp.broadcast_to(unit, flat.shape), z)
            return rows(self.fisher_product(z, everywhere))

        units = jnp.eye(flat.shape[1], dtype=flat.dtype)
        values, vectors = jnp.linalg.eigh(jax.vmap(column, out_axes=2)(units))
        root = jnp.sqrt(jnp.maximum(values, 0))
        product = lambda spec, x: jnp.einsum(spec, vectors, x, precision=jax.lax.Precision.HIGHEST)
        return _like_rows(product("ncd,nd->nc", root * product("ncd,nc->nd", flat)), z)

    def _draw(self, key: jax.Array, outputs: Tree, row_keys: jax.Array) -> Tree:
        """Targets for `sampled_fisher`, by one key for all rows or by one a row, (N,)."""
        del row_keys
        return self.sample(key, outputs)


def _like_rows(flat: jax.Array, like: Tree) -> Tree:
    """(N, C) as a tree with leaves (N, ...)."""
    leaves, structure = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        stop = start + _trees.size(leaf) // max(len(flat), 1)
        parts.append(flat[:, start:stop].reshape(leaf.shape))
        start = stop
    return jax.tree.unflatten(structure, parts)

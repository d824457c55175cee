"""Independent heads as one likelihood."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from natgrad_jax import _trees
from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.base import Likelihood

Tree = Any


class Joint(Likelihood):
    r"""Independent heads h: :math:`\log p(y | z) = \sum_h \log p_h(y_h | z_h)`, M block-diagonal.

    Args:
      likelihoods: a tuple, list or dict that matches the top level of outputs and targets. Every
        head has weight one: a loss that weights heads differently is another likelihood.

    Raises:
      TypeError: something in it is no :class:`Likelihood`.
      ValueError: it is empty; in use, outputs have other heads, or heads to be summed differ in N.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> joint = ng.Joint({"policy": ng.Categorical(), "value": ng.Normal()})
      >>> p = {"policy": jnp.zeros((1, 4)), "value": jnp.zeros((1,))}
      >>> joint.kl(p, p | {"value": jnp.full((1,), 2.0)}).tolist()
      [2.0]
    """

    def __init__(self, likelihoods: Sequence[Likelihood] | Mapping[Any, Likelihood]):
        self.likelihoods = likelihoods
        self._heads, _ = reading.children("Joint", likelihoods)
        for name, head in self._heads.items():
            if not isinstance(head, Likelihood):
                raise TypeError(f"Joint: head {name!r} must be a Likelihood, got {head!r}")
        if not self._heads:
            raise ValueError("Joint: needs at least one likelihood, got none")

    def log_prob(self, outputs: Tree, targets: Tree) -> jax.Array:
        """Log-probabilities of all heads, summed, (N,)."""
        return self._sum("log_prob", outputs, targets)

    def sample(self, key: jax.Array, outputs: Tree) -> Tree:
        """Targets of every head, each from a key of its own."""
        keys = dict(zip(self._heads, jax.random.split(key, len(self._heads)), strict=True))
        z, like_outputs = self._parts("sample", outputs)
        draw = lambda name: self._heads[name].sample(keys[name], z[name])
        return like_outputs({name: draw(name) for name in self._heads})

    def _draw(self, key: jax.Array, outputs: Tree, row_keys: jax.Array) -> Tree:
        number = len(self._heads)
        keys = dict(zip(self._heads, jax.random.split(key, number), strict=True))
        by_row = jax.vmap(lambda k: jax.random.split(k, number), out_axes=1)(row_keys)
        rows = dict(zip(self._heads, by_row, strict=True))
        z, like_outputs = self._parts("sample", outputs)
        draw = lambda name: self._heads[name]._draw(keys[name], z[name], rows[name])
        return like_outputs({name: draw(name) for name in self._heads})

    def kl(self, outputs_p: Tree, outputs_q: Tree) -> jax.Array:
        """KL divergences of all heads, summed, (N,)."""
        return self._sum("kl", outputs_p, outputs_q)

    def fisher_product(self, outputs: Tree, tangents: Tree) -> Tree:
        """M v, head by head."""
        results, like_outputs = self._map("fisher_product", outputs, tangents)
        return like_outputs(results)

    def fisher_factor_product(self, outputs: Tree, coefficients: Tree) -> Tree:
        """B u, head by head."""
        results, like_outputs = self._map("fisher_factor_product", outputs, coefficients)
        return like_outputs(results)

    def _parts(self, method: str, tree: Tree) -> tuple[dict[Any, Tree], Callable[[dict], Tree]]:
        parts, like_tree = reading.children(f"Joint.{method}", tree)
        if set(parts) != set(self._heads):
            got = f"got a {type(tree).__name__} with heads {list(parts)}"
            raise ValueError(f"Joint.{method}: {got}, the likelihoods are {list(self._heads)}")
        return parts, like_tree

    def _map(self, method: str, first: Tree, second: Tree) -> tuple[dict, Callable[[dict], Tree]]:
        a, like_first = self._parts(method, first)
        b, _ = self._parts(method, second)
        call = lambda name, head: getattr(head, method)(a[name], b[name])
        return {name: call(name, head) for name, head in self._heads.items()}, like_first

    def _sum(self, method: str, first: Tree, second: Tree) -> jax.Array:
        values, _ = self._map(method, first, second)
        rows = {name: value.shape for name, value in values.items()}
        if len(set(rows.values())) > 1:
            problem = f"log-probabilities cannot be summed row by row, heads have rows {rows}"
            raise ValueError(f"Joint.{method}: {problem}")
        parts = _trees.cast(list(values.values()), _trees.work_dtype(values))
        return sum(parts[1:], parts[0])

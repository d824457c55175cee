"""The KL divergence between the distributions of two parameter values."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from natgrad_jax import _boundary
from natgrad_jax import examples
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.metrics import mean_kl

Tree = Any


def kl_divergence(
    model: Callable[[Tree, Tree], Tree],
    likelihood: Likelihood,
    params_p: Tree,
    params_q: Tree,
    batch: Tree,
    *,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
) -> jax.Array:
    r"""The mean KL divergence between the distributions of two parameter values.

    .. math::
        \sum_r w_r \mathrm{KL}\left[p(y | f_r(\theta_p)) \,\|\, p(y | f_r(\theta_q))\right]

    Args:
      model: function (params, batch) -> outputs.
      likelihood: a :class:`Likelihood` with a KL.
      params_p: parameters of the first distribution.
      params_q: parameters of the second.
      batch: pytree of arrays, as the model takes it.
      weights: as for :func:`exact_fisher`; by default the mean over rows.
      batch_axes: as for :func:`exact_fisher`.

    Returns:
      A scalar in nats.

    Raises:
      ValueError: the two parameter trees differ in structure or shapes.
      TypeError: the likelihood has no KL.

    Examples:
      To second order it is half the Fisher quadratic form:

      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> model, x = (lambda p, x: x @ p), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> p, d = jnp.array([0.1, -0.2]), jnp.array([0.01, -0.02])
      >>> kl = ng.kl_divergence(model, ng.Bernoulli(), p, p + d, x)
      >>> form = ng.fisher_quadratic_form(ng.exact_fisher(model, ng.Bernoulli()), p, x, d)
      >>> bool(jnp.allclose(kl, form / 2, rtol=0.05))
      True
    """
    _boundary.check_params("kl_divergence", params_p)
    _boundary.check_batch("kl_divergence", batch)
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"kl_divergence: likelihood must be a Likelihood, got {likelihood!r}")
    _boundary.check_like_params("kl_divergence", "params_q", params_q, params_p)
    groups = examples.example_groups("kl_divergence", batch, batch_axes)
    return _kl(model, likelihood, weights, groups, params_p, params_q, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _kl(model, likelihood, weights, groups, params_p: Tree, params_q: Tree, batch: Tree):
    outputs = model(params_p, batch), model(params_q, batch)
    return mean_kl.mean_kl("kl_divergence", likelihood, weights, groups, *outputs, batch)

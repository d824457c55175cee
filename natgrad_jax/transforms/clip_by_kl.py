"""Steps of a bounded length in distribution space."""

import jax
import optax

from natgrad_jax.metrics import Metric
from natgrad_jax.transforms.scale_to_kl import kl_transformation


def clip_by_kl(
    metric: Metric, max_kl: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens a step that would move the distribution by more than a given KL divergence.

    .. math::
        d \leftarrow d \min\left(1, \sqrt{2 c / (d^T F d)}\right)

    with F as for :func:`scale_to_kl`. Place it last in a chain, after the learning rate: the limit
    then holds for the step that is applied.

    Args:
      metric: the metric that measures.
      max_kl: the largest divergence c > 0 of a step, in nats per row.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs the parameters and the keyword
      ``batch``. It takes steps of either sign; a step with d^T F d <= 0 is left alone. ``info`` in
      its state holds the divergence that came in and the factor.

    Raises:
      TypeError: ``metric`` is no metric.
      ValueError: ``max_kl`` is a number that is not positive.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal())
      >>> tx, x, p = ng.clip_by_kl(metric, 0.02), jnp.array([[1.0, 0.0]]), jnp.zeros((2,))
      >>> step = lambda length: tx.update(jnp.array([length, 0.0]), tx.init(p), p, batch=x)[0]
      >>> bool(jnp.allclose(step(3.0)[0], 0.2)), bool(jnp.allclose(step(0.1)[0], 0.1))
      (True, True)
    """
    return kl_transformation("clip_by_kl", metric, max_kl, at_most=True)

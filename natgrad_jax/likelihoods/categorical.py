"""One of C classes."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import arithmetic
from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.closed_form import ClosedForm


class Categorical(ClosedForm):
    r"""One of C classes, with logits z as outputs: :math:`p_k = \exp(z_k) / \sum_j \exp(z_j)`.

    :math:`M = diag(p) - p p^T` and :math:`B = (I - p 1^T) diag(\sqrt p)`; B is not symmetric.
    Outputs are (N, ..., C), samples int32, targets integer labels (N, ...) or, as floating point
    numbers (N, ..., C), probabilities y of the classes, which make log p minus the cross-entropy,
    :math:`\sum_k y_k \log p_k`.

    The score of a label is minus the summed probability of the other classes, not 1 - p: it keeps
    its digits where a prediction is certain. A logit of -inf is probability zero, never NaN; a row
    of nothing else has no mass and M = 0. Labels outside 0..C-1 have log-probability NaN. `kl` is
    infinite where q forbids what p allows.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> logits = jnp.array([[0.3, -jnp.inf, 1.2]])
      >>> constant = jnp.ones((1, 3))  # adding a constant to all logits changes nothing
      >>> product = ng.Categorical().fisher_product(logits, constant)
      >>> bool(jnp.allclose(product, 0.0, atol=1e-6))
      True
    """

    def _read(self, call: str, outputs: Any) -> jax.Array:
        z = super()._read(call, outputs)
        if z.ndim < 2:
            raise ValueError(f"{call}: outputs need axes (rows, ..., classes), got shape {z.shape}")
        return z

    def _read_targets(self, call: str, z: jax.Array, targets: Any) -> jax.Array:
        y = reading.array(call, "targets", targets)
        soft = jnp.issubdtype(y.dtype, jnp.floating)
        if soft and y.shape == z.shape:
            return y.astype(z.dtype)
        reading.targets(call, y, z.shape[:-1], z)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(
                f"{call}: targets must be integer class labels, got dtype {y.dtype} (probabilities"
                f" have the shape of the outputs, {z.shape})"
            )
        return y.astype(jnp.int32)

    def _log_prob(self, z: jax.Array, y: jax.Array, c: None) -> jax.Array:
        del c
        return _cross_entropy(z, y) if y.ndim == z.ndim else _label_log_prob(z, y)

    def _kl(self, p: jax.Array, q: jax.Array, c: None) -> jax.Array:
        del c
        log_p, log_q = arithmetic.log_softmax(p), arithmetic.log_softmax(q)
        return jnp.sum(arithmetic.relative_entropy(log_p, log_q), axis=-1)

    def _sample(self, key: jax.Array, z: jax.Array, c: None) -> jax.Array:
        del c
        return jax.random.categorical(key, z, axis=-1).astype(jnp.int32)

    def _fisher(self, z: jax.Array, v: jax.Array, c: None) -> jax.Array:
        del c
        p = jnp.exp(arithmetic.log_softmax(z))
        return arithmetic.subtract_mass(p, p * v)

    def _factor(self, z: jax.Array, u: jax.Array, c: None) -> jax.Array:
        del c
        log_p = arithmetic.log_softmax(z)
        return arithmetic.subtract_mass(jnp.exp(log_p), jnp.exp(0.5 * log_p) * u)


def _label_masses(z: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    """The label, logits less their largest, unnormalised probabilities, those not of the label."""
    chosen = y[..., None] == jnp.arange(z.shape[-1], dtype=y.dtype).reshape((1,) * y.ndim + (-1,))
    peak = jnp.max(z, axis=-1, keepdims=True)
    shifted = z - jnp.where(peak == -jnp.inf, 0, peak)
    mass = jnp.exp(shifted)
    return chosen, shifted, mass, jnp.sum(jnp.where(chosen, 0, mass), axis=-1, keepdims=True)


@jax.custom_jvp
def _label_log_prob(z: jax.Array, y: jax.Array) -> jax.Array:
    chosen, shifted, mass, rest = _label_masses(z, y)
    own = jnp.sum(jnp.where(chosen, shifted, 0), axis=-1)
    total = jnp.sum(jnp.where(chosen, mass, 0), axis=-1) + rest[..., 0]
    # Where the label is the likeliest class its own mass is 1: log1p keeps the others.
    normaliser = jnp.where(own == 0, jnp.log1p(rest[..., 0]), jnp.log(jnp.maximum(total, 1)))
    return jnp.where((y >= 0) & (y < z.shape[-1]), own - normaliser, jnp.nan)


@_label_log_prob.defjvp
def _label_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (z, y), (t, _) = primals, tangents
    return _label_log_prob(z, y), jnp.sum(_label_score(z, y) * t, axis=-1)


@jax.custom_jvp
def _label_score(z: jax.Array, y: jax.Array) -> jax.Array:
    chosen, _, mass, rest = _label_masses(z, y)
    total = jnp.sum(jnp.where(chosen, mass, 0), axis=-1, keepdims=True) + rest
    return jnp.where(chosen, rest, -mass) / jnp.where(total > 0, total, 1)


@_label_score.defjvp
def _label_score_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (z, y), (t, _) = primals, tangents
    p = jnp.exp(arithmetic.log_softmax(z))
    return _label_score(z, y), -arithmetic.subtract_mass(p, p * t)


@jax.custom_jvp
def _cross_entropy(z: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(arithmetic.times(y, arithmetic.log_softmax(z)), axis=-1)


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (z, y), (t, t_y) = primals, tangents
    log_p = arithmetic.log_softmax(z)
    p = jnp.exp(log_p)
    score = y * arithmetic.others(p) - p * arithmetic.others(y)
    change = score * t + arithmetic.times(t_y, log_p)
    return _cross_entropy(z, y), jnp.sum(change, axis=-1)

"""Classes in an order."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.likelihoods import reading
from natgrad_jax.likelihoods.arithmetic import log_sigmoid
from natgrad_jax.likelihoods.arithmetic import relative_entropy
from natgrad_jax.likelihoods.arithmetic import sigmoid
from natgrad_jax.likelihoods.closed_form import ClosedForm
from natgrad_jax.likelihoods.closed_form import alike

#: exp(_WIDEST) between two cutpoints is certainty in every dtype, and its square is finite.
_WIDEST = 40.0


class Ordinal(ClosedForm):
    r"""One of K ordered classes, by a cumulative logit: :math:`P(y \le k) = \sigma(a_k - \eta)`.

    Outputs are the pair (location :math:`\eta`, cutpoints c), (N, ...) and (N, ..., K - 1). The
    cutpoints a increase for every c: the first is :math:`a_0 = c_0`, the others follow by
    :math:`a_k = a_{k - 1} + \exp(c_k)`. Cutpoints that are parameters are broadcast to the rows.
    Only :math:`c_0 - \eta` shows in the data: leave the intercept out of one of them. With the
    probability p and score s of each class, :math:`M = \sum_k p_k s_k s_k^T`. Targets (integers
    from 0 to K - 1) and samples (int32) are (N, ...); other labels have log-probability NaN.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> location, cutpoints = jnp.zeros((1,)), jnp.array([[0.0, -1.0]])
      >>> p = [jnp.exp(ng.Ordinal().log_prob((location, cutpoints), jnp.array([k])))
      ...      for k in range(3)]
      >>> bool(p[0] == 0.5), bool(jnp.allclose(sum(p), 1.0))
      (True, True)

    References:
      McCullagh, 1980, Regression models for ordinal data.
    """

    def _read(self, call: str, outputs: Any) -> Any:
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            got = jax.tree.structure(outputs)
            raise TypeError(f"{call}: outputs must be a pair (location, cutpoints), got {got}")
        location, cutpoints = reading.promote(call, outputs)
        if cutpoints.shape[:-1] != location.shape or cutpoints.shape[-1] < 1:
            raise ValueError(
                f"{call}: location (N, ...) needs cutpoints (N, ..., K - 1), got {location.shape}"
                f" and {cutpoints.shape}; broadcast cutpoints that all rows share"
            )
        return alike(outputs, location, cutpoints)

    def _read_targets(self, call: str, z: Any, targets: Any) -> jax.Array:
        y = reading.targets(call, targets, z[0].shape, z[0])
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"{call}: targets must be integer class labels, got dtype {y.dtype}")
        return y.astype(jnp.int32)

    def _log_prob(self, z: Any, y: jax.Array, c: None) -> jax.Array:
        del c
        log_p = _log_probabilities(z)
        classes = jnp.arange(log_p.shape[-1], dtype=y.dtype).reshape((1,) * y.ndim + (-1,))
        chosen = jnp.sum(jnp.where(y[..., None] == classes, log_p, 0), axis=-1)
        return jnp.where((y >= 0) & (y < log_p.shape[-1]), chosen, jnp.nan)

    def _kl(self, p: Any, q: Any, c: None) -> jax.Array:
        del c
        return jnp.sum(relative_entropy(_log_probabilities(p), _log_probabilities(q)), axis=-1)

    def _sample(self, key: jax.Array, z: Any, c: None) -> jax.Array:
        del c
        return jax.random.categorical(key, _log_probabilities(z), axis=-1).astype(jnp.int32)

    def _fisher(self, z: Any, v: Any, c: None) -> Any:
        del c
        scores = _scores(z)
        v = jnp.concatenate([v[0][..., None], v[1]], axis=-1)
        return _apart(z, _back(scores, jnp.exp(_log_probabilities(z)) * _along(scores, v)))

    def _factor(self, z: Any, u: Any, c: None) -> Any:
        """One coefficient a class: K, as many as there are outputs."""
        del c
        u = jnp.concatenate([u[0][..., None], u[1]], axis=-1)
        return _apart(z, _back(_scores(z), jnp.exp(0.5 * _log_probabilities(z)) * u))


def _cumulative(z: Any) -> tuple[jax.Array, jax.Array]:
    """a_k - eta, (..., K - 1), and the gaps between them, (..., K - 2)."""
    gaps = jnp.exp(jnp.minimum(z[1][..., 1:], _WIDEST))
    first = z[1][..., :1] - z[0][..., None]
    return jnp.concatenate([first, first + jnp.cumsum(gaps, axis=-1)], axis=-1), gaps


def _padded(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def _log_probabilities(z: Any) -> jax.Array:
    """log [sigma(b) - sigma(a)] = log sigma(b) + log sigma(-a) + log(1 - e^(a - b)), (..., K)."""
    a, _ = _cumulative(z)
    below, above = _padded(log_sigmoid(a), 0, 1), _padded(log_sigmoid(-a), 1, 0)
    return below + above + _padded(_log1m_exp(jnp.minimum(z[1][..., 1:], _WIDEST)), 1, 1)


def _scores(z: Any) -> jax.Array:
    """The score of each class, (..., K classes, K outputs)."""
    a, gaps = _cumulative(z)
    upper, lower = _padded(sigmoid(-a), 0, 1), _padded(sigmoid(a), 1, 0)
    number = upper.shape[-1]
    classes, gap = jnp.arange(number)[:, None], jnp.arange(1, number - 1)[None, :]
    spread = lambda mask: mask.reshape((1,) * (upper.ndim - 1) + mask.shape)
    up = jnp.where(spread(gap <= classes), upper[..., None], 0)
    down = jnp.where(spread(gap < classes), lower[..., None], 0)
    own = jnp.where(spread(gap == classes), _of_gap(z[1][..., 1:])[..., None, :], 0)
    first = (upper - lower)[..., None]
    return jnp.concatenate([-first, first, gaps[..., None, :] * (up - down) + own], axis=-1)


def _along(scores: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...ki,...i->...k", scores, v, precision=jax.lax.Precision.HIGHEST)


def _back(scores: jax.Array, u: jax.Array) -> jax.Array:
    return jnp.einsum("...ki,...k->...i", scores, u, precision=jax.lax.Precision.HIGHEST)


def _apart(z: Any, flat: jax.Array) -> Any:
    return alike(z, flat[..., 0], flat[..., 1:])


@jax.custom_jvp
def _log1m_exp(s: jax.Array) -> jax.Array:
    """log(1 - exp(-g)), g = exp(s); for small g it is s."""
    near = s < 0
    small = jnp.exp(jnp.where(near, s, 0))
    positive = jnp.maximum(small, jnp.finfo(s.dtype).tiny)
    ratio = jnp.where(small > 0, -jnp.expm1(-positive) / positive, 1)
    return jnp.where(near, s + jnp.log(ratio), jnp.log1p(-jnp.exp(-jnp.exp(jnp.where(near, 0, s)))))


@_log1m_exp.defjvp
def _log1m_exp_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (s,), (t,) = primals, tangents
    return _log1m_exp(s), _of_gap(s) * t


def _of_gap(s: jax.Array) -> jax.Array:
    """g / (exp(g) - 1), g = exp(s)."""
    g = jnp.exp(jnp.clip(s, -80, 5))
    return jnp.where(s < 5, g / jnp.expm1(g), 0)

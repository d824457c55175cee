r"""Output space: what outputs say about targets, and the metric that this induces on outputs.

A likelihood is a family :math:`p(y | z)`. Outputs z have leaves (N, ...): one row for each example
(or token); trailing positions (time, pixels) are independent and summed within a row. Row n has

.. math::
    M_n = E_{y \sim p(\cdot | z_n)}[s s^T] = B_n B_n^T, \qquad s = \nabla_{z_n} \log p(y | z_n),

the Hessian of :math:`KL[p(\cdot | z_n) || p(\cdot | z')]` at :math:`z' = z_n` (Amari, 1998;
Martens, 2020). Methods work row by row; the mean over rows is taken by the metrics. Arithmetic
runs, and results come back, in float64 where outputs have it and in float32 otherwise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax import _outputs
from natgrad_jax import _trees
from natgrad_jax._distribution import from_distribution as from_distribution
from natgrad_jax._likelihood import Likelihood as Likelihood

Tree = Any


class _ClosedForm(Likelihood):
    """Checks, casts and sums around `_log_prob` and `_kl` (one value a position), `_sample`, and M.

    M is given by its diagonal, `_information`, or by its products, `_fisher` and `_factor`.
    """

    _log_prob: Callable[..., jax.Array]
    _sample: Callable[..., Tree]
    _kl: Callable[..., jax.Array]
    _information: Callable[..., Tree]

    def log_prob(self, outputs, targets):
        call = _outputs.call(self, "log_prob")
        z = self._read(call, outputs)
        return _outputs.sum_trailing(self._log_prob(z, self._read_targets(call, z, targets)))

    def sample(self, key, outputs):
        return self._sample(key, self._read(_outputs.call(self, "sample"), outputs))

    def kl(self, outputs_p, outputs_q):
        call = _outputs.call(self, "kl")
        p, q = self._read(call, outputs_p), self._read(call, outputs_q)
        _outputs.check_alike(call, p, q)
        return _outputs.sum_trailing(self._kl(*_trees.cast((p, q), _trees.work_dtype(p, q))))

    def fisher_product(self, outputs, tangents):
        call = _outputs.call(self, "fisher_product")
        return self._fisher(*_outputs.operands(call, self._read(call, outputs), tangents))

    def fisher_factor_product(self, outputs, coefficients):
        call = _outputs.call(self, "fisher_factor_product")
        return self._factor(*_outputs.operands(call, self._read(call, outputs), coefficients))

    def _read(self, call, outputs):
        return _outputs.promote(call, _outputs.array(call, "outputs", outputs))

    def _read_targets(self, call, z, targets):
        return _outputs.targets(call, targets, z.shape, z).astype(z.dtype)

    def _fisher(self, z, v):
        return jax.tree.map(lambda m, x: m * x, self._information(z), v)

    def _factor(self, z, u):
        return jax.tree.map(lambda m, x: jnp.sqrt(m) * x, self._information(z), u)


class Categorical(_ClosedForm):
    r"""One of C classes, with logits z as outputs: :math:`p_k = \exp(z_k) / \sum_j \exp(z_j)`.

    :math:`M = diag(p) - p p^T` and :math:`B = (I - p 1^T) diag(\sqrt p)`; B is not symmetric.
    Outputs are (N, ..., C), integer targets (N, ...), samples int32.

    A logit of -inf is probability zero, never NaN; a row of nothing else has no mass and M = 0.
    Labels outside 0..C-1 have log-probability NaN. `kl` is infinite where q forbids what p allows.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> logits = jnp.array([[0.3, -jnp.inf, 1.2]])
      >>> constant = jnp.ones((1, 3))  # adding a constant to all logits changes nothing
      >>> product = ng.Categorical().fisher_product(logits, constant)
      >>> bool(jnp.allclose(product, 0.0, atol=1e-6))
      True
    """

    def _read(self, call, outputs):
        z = super()._read(call, outputs)
        if z.ndim < 2:
            raise ValueError(f"{call}: outputs need axes (rows, ..., classes), got shape {z.shape}")
        return z

    def _read_targets(self, call, z, targets):
        y = _outputs.targets(call, targets, z.shape[:-1], z)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"{call}: targets must be integer class labels, got dtype {y.dtype}")
        return y.astype(jnp.int32)

    def _log_prob(self, z, y):
        # A negative index would count from the end: out of range, to NaN, with other wrong labels.
        index = jnp.where(y < 0, z.shape[-1], y)[..., None]
        return jnp.take_along_axis(_outputs.log_softmax(z), index, axis=-1, mode="fill")[..., 0]

    def _kl(self, p, q):
        return jnp.sum(
            _outputs.relative_entropy(_outputs.log_softmax(p), _outputs.log_softmax(q)), axis=-1
        )

    def _sample(self, key, z):
        return jax.random.categorical(key, z, axis=-1).astype(jnp.int32)

    def _fisher(self, z, v):
        p = jnp.exp(_outputs.log_softmax(z))
        return _outputs.subtract_mass(p, p * v)

    def _factor(self, z, u):
        log_p = _outputs.log_softmax(z)
        return _outputs.subtract_mass(jnp.exp(log_p), jnp.exp(0.5 * log_p) * u)


class Bernoulli(_ClosedForm):
    r"""A coin, with the logit z as outputs: :math:`p(1) = \sigma(z) = 1 / (1 + \exp(-z))`.

    :math:`M = \sigma(z) \sigma(-z)`. Outputs, targets (booleans or numbers in [0, 1]) and samples
    (0.0 or 1.0) are (N, ...). Fractional targets make log p minus the cross-entropy. Logits of -inf
    and +inf are certainty.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> z = jnp.array([-jnp.inf, 0.0, 1e4])
      >>> ng.Bernoulli().fisher_product(z, jnp.ones((3,))).tolist()
      [0.0, 0.25, 0.0]
    """

    def _log_prob(self, z, y):
        return _outputs.times(y, jax.nn.log_sigmoid(z)) + _outputs.times(
            1 - y, jax.nn.log_sigmoid(-z)
        )

    def _kl(self, p, q):
        heads = _outputs.relative_entropy(jax.nn.log_sigmoid(p), jax.nn.log_sigmoid(q))
        return heads + _outputs.relative_entropy(jax.nn.log_sigmoid(-p), jax.nn.log_sigmoid(-q))

    def _sample(self, key, z):
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)

    def _information(self, z):
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)  # 1 - sigmoid(z) would cancel


class Normal(_ClosedForm):
    r"""A Gaussian of known scale, with the mean z as outputs: :math:`y = z + scale \cdot noise`.

    :math:`M = 1 / scale^2`. Outputs, targets and samples are (N, ...). With scale 1 minus log p is
    *half* the squared error, up to a constant.

    Args:
      scale: standard deviation in the units of the targets: a positive number, or an array that
        broadcasts to the outputs (with a row axis it fits batches of one size only).

    Raises:
      ValueError: the scale is not positive or, in use, does not broadcast to the outputs.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> normal = ng.Normal(scale=jnp.array([0.5, 2.0]))
      >>> normal.fisher_product(jnp.zeros((1, 2)), jnp.ones((1, 2))).tolist()
      [[4.0, 0.25]]
    """

    def __init__(self, scale: jax.typing.ArrayLike = 1.0):
        # A traced scale has no value yet.
        if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
            raise ValueError(f"Normal: scale must be positive, got {scale}")
        self.scale = scale

    def _read(self, call, outputs):
        z, shape = super()._read(call, outputs), jnp.shape(self.scale)
        aligned = zip(shape[::-1], z.shape[::-1], strict=False)
        if len(shape) > z.ndim or not all(a in (1, b) for a, b in aligned):
            raise ValueError(f"{call}: scale {shape} does not broadcast to outputs {z.shape}")
        return z

    def _log_prob(self, z, y):
        scale = self._scale_like(z)
        return -0.5 * ((y - z) / scale) ** 2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)

    def _kl(self, p, q):
        return 0.5 * ((p - q) / self._scale_like(p)) ** 2

    def _sample(self, key, z):
        return z + self._scale_like(z) * jax.random.normal(key, z.shape, z.dtype)

    def _information(self, z):
        return self._scale_like(z) ** -2

    def _scale_like(self, z):
        return jnp.broadcast_to(jnp.asarray(self.scale).astype(z.dtype), z.shape)


class DiagonalNormal(_ClosedForm):
    r"""A Gaussian, with the pair z = (mean m, log scale s) as outputs: :math:`y = m + e^s noise`.

    :math:`M = diag(e^{-2 s}, 2)`: a log scale is known equally well everywhere. The mean, the log
    scale, targets and samples are (N, ...).

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> outputs, ones = (jnp.zeros((1,)), jnp.zeros((1,))), (jnp.ones((1,)), jnp.ones((1,)))
      >>> [product.tolist() for product in ng.DiagonalNormal().fisher_product(outputs, ones)]
      [[1.0], [2.0]]
    """

    def _read(self, call, outputs):
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            got = jax.tree.structure(outputs)
            raise TypeError(f"{call}: outputs must be a pair (mean, log_scale), got {got}")
        mean, log_scale = (
            _outputs.array(call, "mean and log_scale", leaf).shape for leaf in outputs
        )
        if mean != log_scale:
            raise ValueError(f"{call}: mean {mean} and log_scale {log_scale} must have one shape")
        return _outputs.promote(call, outputs)

    def _read_targets(self, call, z, targets):
        return super()._read_targets(call, z[0], targets)

    def _log_prob(self, z, y):
        quadratic = 0.5 * ((y - z[0]) * jnp.exp(-z[1])) ** 2
        return -quadratic - z[1] - 0.5 * math.log(2 * math.pi)

    def _kl(self, p, q):
        ratio = 2 * (p[1] - q[1])  # log of the ratio of variances
        return 0.5 * (jnp.expm1(ratio) - ratio + ((p[0] - q[0]) * jnp.exp(-q[1])) ** 2)

    def _sample(self, key, z):
        return z[0] + jnp.exp(z[1]) * jax.random.normal(key, z[0].shape, z[0].dtype)

    def _information(self, z):
        information = jnp.exp(-2 * z[1]), jnp.full_like(z[1], 2)
        return jax.tree.unflatten(jax.tree.structure(z), information)


class Poisson(_ClosedForm):
    r"""Counts, with the log rate z as outputs: :math:`p(y) = \exp(y z - e^z) / y!`.

    :math:`M = e^z`. Outputs, targets (whole numbers) and samples (int32) are (N, ...). A log rate
    of -inf is count zero with certainty. Draws need JAX's default (threefry) keys.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> ng.Poisson().fisher_product(jnp.array([-jnp.inf, 0.0]), jnp.ones((2,))).tolist()
      [0.0, 1.0]
    """

    def _log_prob(self, z, y):
        return _outputs.times(y, z) - jnp.exp(z) - jax.scipy.special.gammaln(y + 1)

    def _kl(self, p, q):
        return _outputs.relative_entropy(p, q)

    def _sample(self, key, z):
        return jax.random.poisson(key, jnp.exp(z), dtype=jnp.int32)

    def _information(self, z):
        return jnp.exp(z)


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
        self._heads, _ = _outputs.children("Joint", likelihoods)
        for name, head in self._heads.items():
            if not isinstance(head, Likelihood):
                raise TypeError(f"Joint: head {name!r} must be a Likelihood, got {head!r}")
        if not self._heads:
            raise ValueError("Joint: needs at least one likelihood, got none")

    def log_prob(self, outputs, targets):
        """Log-probabilities of all heads, summed, (N,)."""
        return self._sum("log_prob", outputs, targets)

    def sample(self, key, outputs):
        """Targets of every head, each from a key of its own."""
        keys = dict(zip(self._heads, jax.random.split(key, len(self._heads)), strict=True))
        z, like_outputs = self._parts("sample", outputs)
        draw = lambda name: self._heads[name].sample(keys[name], z[name])
        return like_outputs({name: draw(name) for name in self._heads})

    def kl(self, outputs_p, outputs_q):
        """KL divergences of all heads, summed, (N,)."""
        return self._sum("kl", outputs_p, outputs_q)

    def fisher_product(self, outputs, tangents):
        """M v, head by head."""
        results, like_outputs = self._map("fisher_product", outputs, tangents)
        return like_outputs(results)

    def fisher_factor_product(self, outputs, coefficients):
        """B u, head by head."""
        results, like_outputs = self._map("fisher_factor_product", outputs, coefficients)
        return like_outputs(results)

    def _parts(self, method, tree):
        parts, like_tree = _outputs.children(f"Joint.{method}", tree)
        if set(parts) != set(self._heads):
            got = f"got a {type(tree).__name__} with heads {list(parts)}"
            raise ValueError(f"Joint.{method}: {got}, the likelihoods are {list(self._heads)}")
        return parts, like_tree

    def _map(self, method, first, second):
        a, like_first = self._parts(method, first)
        b, _ = self._parts(method, second)
        call = lambda name, head: getattr(head, method)(a[name], b[name])
        return {name: call(name, head) for name, head in self._heads.items()}, like_first

    def _sum(self, method, first, second):
        values, _ = self._map(method, first, second)
        rows = {name: value.shape for name, value in values.items()}
        if len(set(rows.values())) > 1:
            problem = f"log-probabilities cannot be summed row by row, heads have rows {rows}"
            raise ValueError(f"Joint.{method}: {problem}")
        return sum(_trees.cast(list(values.values()), _trees.work_dtype(values)))

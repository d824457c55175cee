r"""Output space: what outputs say about targets, and the metric that this induces on outputs.

A likelihood is a family :math:`p(y | z)`. Outputs z have leaves (N, ...): one row for each example
(or token); trailing positions (time, pixels) are independent and summed within a row. Row n has

.. math::
    M_n = E_{y \sim p(\cdot | z_n)}[s s^T] = B_n B_n^T, \qquad s = \nabla_{z_n} \log p(y | z_n),

the Hessian of :math:`KL[p(\cdot | z_n) || p(\cdot | z')]` at :math:`z' = z_n` (Amari, 1998;
Martens, 2020). Methods work row by row; the mean over rows is taken by the metrics. Arithmetic
runs, and results come back, in float64 where outputs have it and in float32 otherwise.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from natgrad_jax import _trees

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
        raise TypeError(f"{_call(self, 'log_prob')}: a Likelihood must implement `log_prob`")

    def sample(self, key: jax.Array, outputs: Tree) -> Tree:
        """Targets drawn from the model with a `jax.random` key, as `log_prob` takes them."""
        raise TypeError(f"{_call(self, 'sample')}: implement `sample` to draw from the model")

    def kl(self, outputs_p: Tree, outputs_q: Tree) -> jax.Array:
        """KL[p(. | outputs_p) || p(. | outputs_q)] in nats, (N,), summed over trailing positions.

        Raises:
          TypeError: this likelihood has none; `fisher_product` raises it too.
        """
        raise TypeError(_needs_kl(self, "implement it"))

    def fisher_product(self, outputs: Tree, tangents: Tree) -> Tree:
        """M_n v_n for every row, tangents v and result like outputs, without a mean over rows.

        By default the Hessian of `kl` in its second argument, forward over reverse mode.
        """
        z, v = _operands(_call(self, "fisher_product"), outputs, tangents)
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

        call = _call(self, "fisher_factor_product")
        return jax.vmap(row)(*_operands(call, outputs, coefficients))


class _ClosedForm(Likelihood):
    """Checks, casts and sums around `_log_prob` and `_kl` (one value a position), `_sample`, and M.

    M is given by its diagonal, `_information`, or by its products, `_fisher` and `_factor`.
    """

    _log_prob: Callable[..., jax.Array]
    _sample: Callable[..., Tree]
    _kl: Callable[..., jax.Array]
    _information: Callable[..., Tree]

    def log_prob(self, outputs, targets):
        call = _call(self, "log_prob")
        z = self._read(call, outputs)
        return _sum_trailing(self._log_prob(z, self._read_targets(call, z, targets)))

    def sample(self, key, outputs):
        return self._sample(key, self._read(_call(self, "sample"), outputs))

    def kl(self, outputs_p, outputs_q):
        call = _call(self, "kl")
        p, q = self._read(call, outputs_p), self._read(call, outputs_q)
        _check_alike(call, p, q)
        return _sum_trailing(self._kl(*_trees.cast((p, q), _trees.work_dtype(p, q))))

    def fisher_product(self, outputs, tangents):
        call = _call(self, "fisher_product")
        return self._fisher(*_operands(call, self._read(call, outputs), tangents))

    def fisher_factor_product(self, outputs, coefficients):
        call = _call(self, "fisher_factor_product")
        return self._factor(*_operands(call, self._read(call, outputs), coefficients))

    def _read(self, call, outputs):
        return _promote(call, _array(call, "outputs", outputs))

    def _read_targets(self, call, z, targets):
        return _targets(call, targets, z.shape, z).astype(z.dtype)

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
        y = _targets(call, targets, z.shape[:-1], z)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"{call}: targets must be integer class labels, got dtype {y.dtype}")
        return y.astype(jnp.int32)

    def _log_prob(self, z, y):
        # A negative index would count from the end: out of range, to NaN, with other wrong labels.
        index = jnp.where(y < 0, z.shape[-1], y)[..., None]
        return jnp.take_along_axis(_log_softmax(z), index, axis=-1, mode="fill")[..., 0]

    def _kl(self, p, q):
        return jnp.sum(_relative_entropy(_log_softmax(p), _log_softmax(q)), axis=-1)

    def _sample(self, key, z):
        return jax.random.categorical(key, z, axis=-1).astype(jnp.int32)

    def _fisher(self, z, v):
        p = jnp.exp(_log_softmax(z))
        return _subtract_mass(p, p * v)

    def _factor(self, z, u):
        log_p = _log_softmax(z)
        return _subtract_mass(jnp.exp(log_p), jnp.exp(0.5 * log_p) * u)


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
        return _times(y, jax.nn.log_sigmoid(z)) + _times(1 - y, jax.nn.log_sigmoid(-z))

    def _kl(self, p, q):
        heads = _relative_entropy(jax.nn.log_sigmoid(p), jax.nn.log_sigmoid(q))
        return heads + _relative_entropy(jax.nn.log_sigmoid(-p), jax.nn.log_sigmoid(-q))

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
        mean, log_scale = (_array(call, "mean and log_scale", leaf).shape for leaf in outputs)
        if mean != log_scale:
            raise ValueError(f"{call}: mean {mean} and log_scale {log_scale} must have one shape")
        return _promote(call, outputs)

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
        return _times(y, z) - jnp.exp(z) - jax.scipy.special.gammaln(y + 1)

    def _kl(self, p, q):
        return _relative_entropy(p, q)

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
        self._heads, _ = _open("Joint", likelihoods)
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
        parts, like_tree = _open(f"Joint.{method}", tree)
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


def from_distribution(
    make: Callable[[Tree], Any], *, kl: Callable[[Any, Any], jax.Array] | None = None
) -> Likelihood:
    r"""The likelihood of distribution objects in the style of distrax, numpyro or TFP.

    The Fisher products are those of :class:`Likelihood`, by differentiating the divergence twice; a
    class with a closed form is cheaper.

    Args:
      make: outputs, leaves (N, ...), to an object with `log_prob(targets)` and `sample`, which gets
        the key as `seed=` if its signature has it, else as first argument. Its batch shape begins
        with N; what follows is summed.
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
    def __init__(self, make, kl):
        self._make, self._divergence = make, kl

    def log_prob(self, outputs, targets):
        z = _promote("from_distribution.log_prob", outputs)
        return self._rows("log_prob", z, self._make(z).log_prob(targets))

    def sample(self, key, outputs):
        draw = self._make(_promote("from_distribution.sample", outputs)).sample
        return draw(seed=key) if "seed" in inspect.signature(draw).parameters else draw(key)

    def kl(self, outputs_p, outputs_q):
        z_p, z_q = _promote("from_distribution.kl", (outputs_p, outputs_q))
        p, q = self._make(z_p), self._make(z_q)
        if self._divergence is not None:
            return self._rows("kl", z_p, self._divergence(p, q))
        try:
            return self._rows("kl", z_p, p.kl_divergence(q))
        except (AttributeError, NotImplementedError) as error:
            raise TypeError(_needs_kl(p, "pass kl= to from_distribution")) from error

    def _rows(self, method, z, values):
        rows, shape = jax.tree.leaves(z)[0].shape[:1], jnp.shape(values)
        if shape[:1] != rows:
            needs = f"must begin with the leading axis {rows} of outputs, got shape {shape}"
            raise ValueError(f"from_distribution.{method}: what the distribution gives {needs}")
        return _sum_trailing(values.astype(_trees.work_dtype(z)))


def _call(likelihood, method):
    return f"{type(likelihood).__name__}.{method}"


def _needs_kl(owner, remedy):
    needs = f"the exact Fisher of {type(owner).__name__} needs `kl`"
    return f"{_call(owner, 'kl')}: {needs}; {remedy}, or use sampled_fisher"


def _array(call, what, value):
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{call}: {what} must be one array, got {type(value).__name__}: {value!r}")
    return jnp.asarray(value)


def _targets(call, targets, shape, outputs):
    y = _array(call, "targets", targets)
    if y.shape != shape:
        needs = f"outputs of shape {outputs.shape} need targets of shape {shape}"
        raise ValueError(f"{call}: {needs}, got targets of shape {y.shape}")
    if jnp.iscomplexobj(y):
        raise TypeError(f"{call}: targets must be real, got dtype {y.dtype}")
    return y


def _promote(call, outputs):
    """Outputs as real arrays with rows, in the dtype of the arithmetic."""

    def check(leaf):
        leaf = _array(call, "each leaf of outputs", leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{call}: outputs must be real floating point, got {leaf.dtype}")
        if leaf.ndim < 1:
            raise ValueError(f"{call}: outputs need a leading axis of rows, got shape ()")
        return leaf

    outputs = jax.tree.map(check, outputs)
    return _trees.cast(outputs, _trees.work_dtype(outputs))


def _operands(call, outputs, vectors):
    """Outputs promoted, and vectors (tangents or coefficients) in their structure and dtype."""
    outputs = _promote(call, outputs)
    _check_alike(call, outputs, vectors)
    vectors = _trees.cast(jax.tree.leaves(vectors), _trees.work_dtype(outputs))
    return outputs, jax.tree.unflatten(jax.tree.structure(outputs), vectors)


def _check_alike(call, first, second):
    a, b = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (first, second))
    if a != b:
        raise ValueError(f"{call}: both arguments must have the same shapes, got {a} and {b}")


def _open(call, tree):
    """The children of a tuple, list or mapping by name, and the way back from such a dict."""
    if not isinstance(tree, tuple | list | Mapping):
        got = f"got {type(tree).__name__}: {tree!r}"
        raise TypeError(f"{call}: needs a tuple, list or dict with one entry a head, {got}")
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, lambda node: node is not tree)
    # Positions name the entries of sequences, named tuples included: any sequence fits another.
    children = {getattr(p[0], "key", i): child for i, (p, child) in enumerate(paths)}
    return children, lambda by_name: jax.tree.unflatten(structure, [by_name[k] for k in children])


def _sum_trailing(values):
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def _times(weight, value):
    """weight * value with 0 * inf = 0; its derivative in weight is wrong at 0."""
    return weight * jnp.where(weight == 0, 0, value)


def _log_softmax(logits):
    """Log-probabilities; -inf where logits are, also in rows of nothing else."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - jnp.where(peak == -jnp.inf, 0, peak)
    mass = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.where(mass > 0, mass, 1))


def _subtract_mass(p, y):
    """(I - p 1^T) y along the last axis.

    The entry of the likeliest class is minus the sum of the others: y - p sum(y) would cancel
    there, and its rounding exceeds the whole Fisher matrix of a confident prediction.
    """
    top = jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=bool)
    others = jnp.where(top, 0, y - p * jnp.sum(y, axis=-1, keepdims=True))
    return jnp.where(top, -jnp.sum(others, axis=-1, keepdims=True), others)


def _relative_entropy(log_p, log_q):
    """p log(p / q) - p + q >= 0 of masses given by their logarithms, zero mass included.

    The last two terms cancel in a sum over all classes. With them every term is of second order
    near p = q, so that small divergences keep their digits.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.where(p > 0, log_q - log_p, 0)
    near = (p > 0) & (jnp.abs(gap) < 1)
    small = jnp.where(near, gap, 0)  # the branch not taken must stay finite for the gradient
    return jnp.where(near, p * (jnp.expm1(small) - small), q - p - p * gap)

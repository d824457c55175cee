r"""Riemannian metrics on parameters: a map to outputs, pulled back through an output-space metric.

With outputs $z_r = f(\theta)_r$ over rows $r$, Jacobians $J_r = \partial z_r / \partial \theta$, an
output-space metric $M_r = B_r B_r^T$ and row weights $w_r$ that sum to one,

.. math::
    F = \sum_r w_r J_r^T M_r J_r = R^T R, \qquad R_r = \sqrt{w_r} B_r^T J_r .

A metric binds the functions that make it and holds no arrays; arrays come at call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import _mean_kl
from natgrad_jax import _reading
from natgrad_jax import _trees
from natgrad_jax import examples
from natgrad_jax import output_metrics
from natgrad_jax import robust
from natgrad_jax import sampling
from natgrad_jax.likelihoods import Likelihood
from natgrad_jax.output_metrics import OutputMetric as OutputMetric

Tree = Any


class Metric(NamedTuple):
    """A Riemannian metric on parameters, as functions of (params, batch).

    Build one with `exact_fisher`, `sampled_fisher`, `empirical_fisher`, `gauss_newton`, `hessian`
    or `euclidean`. It is hashable, holds no arrays and passes through `optax.inject_hyperparams`.

    Attributes:
      name: the public function that made it.
      outputs: (params, batch) -> the tree that is differentiated; the loss for `hessian`; None for
        `euclidean`.
      output_metric: (outputs, batch, key) -> OutputMetric; None where F is no pull-back.
      distance_metric: like `output_metric`, but exact where model and likelihood allow it, and
        never in need of a key: with it distances are measured.
      groups: batch -> groups of examples.
      needs_key: whether F is estimated from samples.
      definite: whether F is positive semi-definite by construction.
      independent: True where the user claims that output row n depends on example n alone; None
        where that is read off the model.
      divergence: (outputs p, outputs q, batch) -> mean KL[p || q]; None without a likelihood.
      weighted: whether rows have weights of their own.
      weights: batch -> these, before they are divided by their sum.
      robust: whether the loss of residuals is another than half their square.
    """

    name: str
    outputs: Callable[[Tree, Tree], Tree] | None
    output_metric: Callable[[Tree, Tree, jax.Array | None], OutputMetric] | None
    distance_metric: Callable[[Tree, Tree, jax.Array | None], OutputMetric] | None
    groups: Callable[[Tree], tuple[examples.Group, ...]] | None
    needs_key: bool = False
    definite: bool = True
    independent: bool | None = None
    divergence: Callable[[Tree, Tree, Tree], jax.Array] | None = None
    weighted: bool = False
    weights: Callable[[Tree], Tree] | None = None
    robust: bool = False


def exact_fisher(
    model: Callable[[Tree, Tree], Tree],
    likelihood: Likelihood,
    *,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The Fisher information matrix, its expectation over targets taken exactly.

    .. math::
        F = \sum_r w_r J_r^T M_r J_r, \qquad
        M_r = \mathbb{E}_{y \sim p(y | z_r)}[\nabla_z \log p \, \nabla_z \log p^T]

    with outputs :math:`z = f(\theta)` of the model, :math:`J_r = \partial z_r / \partial\theta` and
    row weights :math:`w_r`, by default 1 / (number of rows): F matches a loss that is the *mean*
    over examples of the negative log-likelihood. In natural parameters of an exponential family
    this is the generalised Gauss-Newton matrix.

    Args:
      model: function (params, batch) -> outputs, leaves of shape (N, ...) or (k N, ...) when each
        of N examples gives k rows, those of one example standing together.
      likelihood: a :class:`Likelihood` that matches the outputs.
      weights: None, or a function of the batch that gives one non-negative number for each row,
        (k N,), or each example, (N,). They are divided by their sum: only their ratios matter.
        Zero masks padding whose outputs are finite.
      batch_axes: along which axis of each batch leaf examples lie, as ``in_axes`` of ``jax.vmap``.
      independent: whether examples are independent is read off the model. Where the reader cannot
        show it, rows come from the whole batch, exactly and expensively, with a warning; True
        claims it instead: rows then are those of each example evaluated by itself. The claim is
        checked at the first and the last example: where a function of this package is called
        eagerly, once for each metric and shape of batch, with a warning where it is false, and by
        :func:`verify`; not inside `jax.jit`.

    Returns:
      A :class:`Metric`.

    Raises:
      TypeError: ``likelihood`` is no :class:`Likelihood`, or has no exact Fisher matrix.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.exact_fisher(lambda p, x: x @ p, ng.Normal(scale=0.5))
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> fisher = ng.fisher_matrix(metric, jnp.zeros((2,)), x)
      >>> bool(jnp.allclose(fisher, x.T @ x / 2 / 0.5**2))
      True

    Notes:
      Solvers that work on rows use one row for each example *and output column*. With many output
      columns take :func:`cg`, or :func:`sampled_fisher`. :func:`explain` tells how the rows of each
      parameter are held, :func:`verify` whether they are right.

    References:
      Amari, 1998, Natural gradient works efficiently in learning; Martens, 2020, New insights and
      perspectives on the natural gradient method.
    """
    model = _check_functions("exact_fisher", "model", model, weights)
    _check_likelihood("exact_fisher", likelihood)
    if (
        type(likelihood).fisher_product is Likelihood.fisher_product
        and type(likelihood).kl is Likelihood.kl
    ):
        raise TypeError(
            f"exact_fisher: the exact Fisher matrix of {type(likelihood).__name__} needs its `kl`;"
            " implement kl(outputs_p, outputs_q), or use sampled_fisher"
        )
    name, groups = "exact_fisher", _groups("exact_fisher", batch_axes)
    exact = _exact(name, likelihood, weights, groups)
    kl = _mean_kl.divergence(name, likelihood, weights, groups)
    made = Metric(name, model, exact, exact, groups, independent=independent, divergence=kl)
    return made._replace(weighted=weights is not None, weights=weights)


def sampled_fisher(
    model: Callable[[Tree, Tree], Tree],
    likelihood: Likelihood,
    *,
    num_samples: int = 1,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The Fisher information matrix estimated from targets drawn from the model.

    .. math::
        F = \sum_r w_r \frac{1}{S} \sum_s J_r^T g_{rs} g_{rs}^T J_r, \qquad
        g_{rs} = \nabla_z \log p(y_{rs} | z_r), \quad y_{rs} \sim p(y | z_r)

    It has one row for each example and sample whatever the number of outputs, and its mean over
    keys is the exact Fisher matrix.

    Args:
      model: function (params, batch) -> outputs, leaves of shape (N, ...).
      likelihood: a :class:`Likelihood` that matches the outputs.
      num_samples: samples S for each row.
      weights: as for :func:`exact_fisher`.
      batch_axes: as for :func:`exact_fisher`.
      independent: as for :func:`exact_fisher`.

    Returns:
      A :class:`Metric` that needs a key.

    Raises:
      TypeError: ``likelihood`` is no :class:`Likelihood`.
      ValueError: ``num_samples`` is not a positive integer; in use, the likelihood does not give
        one log-probability a row, or draws targets of another shape.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.sampled_fisher(lambda p, x: x * p, ng.Normal(), num_samples=3)
      >>> fisher = ng.fisher_matrix(metric, jnp.ones((1,)), jnp.ones((4, 1)), key=jax.random.key(0))
      >>> gram = ng.gram_matrix(metric, jnp.ones((1,)), jnp.ones((4, 1)), key=jax.random.key(0))
      >>> gram.shape, bool(jnp.allclose(jnp.trace(gram), fisher[0, 0]))
      ((12, 12), True)

    Notes:
      With fewer rows than parameters most of a gradient lies outside the row space, where it is
      only divided by the damping: bound the step (``max_kl``) or use a larger damping. Targets are
      drawn for all rows at once. Likelihoods of this package draw each row with
      ``fold_in(key, row)``, so that padding does not change what the others draw;
      :class:`Likelihood` says what holds for one's own.

      Distances (``max_kl``, :func:`scale_to_kl`, the quadratic model, predicted reductions) are
      measured with the exact Fisher matrix where the likelihood has one. Where it has none, as a
      :func:`from_distribution` without a KL, a sampled one measures them: its samples are drawn
      with a fixed key of their own, so that they do not depend on those of the direction. (Measured
      with its own samples a direction would seem short: it is what those samples allow.)

    References:
      Kunstner, Balles and Hennig, 2019, Limitations of the empirical Fisher approximation.
    """
    model = _check_functions("sampled_fisher", "model", model, weights)
    _check_likelihood("sampled_fisher", likelihood)
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"sampled_fisher: num_samples must be a positive int, got {num_samples!r}")
    name, groups = "sampled_fisher", _groups("sampled_fisher", batch_axes)

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        scores = sampling.output_scores(likelihood, outputs, key, num_samples)
        factor_product, coefficients = sampling.score_columns(
            jax.tree.map(jnp.sqrt, row_weights), scores
        )

        def product(tangents: Tree) -> Tree:
            transposed = jax.linear_transpose(factor_product, coefficients)
            cotangents = _trees.cast(tangents, _trees.work_dtype(outputs))
            return factor_product(transposed(cotangents)[0])

        return OutputMetric(product, factor_product, coefficients, row_weights)

    exact = _exact(name, likelihood, weights, groups)

    def distance_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        if sampling.has_exact_fisher(likelihood, outputs):
            return exact(outputs, batch, key)
        return output_metric(outputs, batch, sampling.distance_key())

    kl = _mean_kl.divergence(name, likelihood, weights, groups)
    made = Metric(name, model, output_metric, distance_metric, groups, needs_key=True)
    return made._replace(
        independent=independent, divergence=kl, weighted=weights is not None, weights=weights
    )


def empirical_fisher(
    log_prob: Callable[[Tree, Tree], jax.Array],
    *,
    centered: bool = False,
    weights: Callable[[Tree], jax.Array] | None = None,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The second moment of scores at the data: the *empirical* Fisher matrix.

    .. math::
        F = \sum_n w_n s_n s_n^T, \qquad s_n = \nabla_\theta \log p(x_n | \theta),

    or, centered, :math:`F = \sum_n w_n (s_n - \bar s)(s_n - \bar s)^T` with the weighted mean score
    :math:`\bar s`. It differs from the Fisher matrix, whose targets are the model's own. It is not
    the outer product of the mean gradient either.

    Args:
      log_prob: function (params, batch) -> log-probabilities (N,).
      centered: subtract the mean score. With :math:`\log\psi` of a real wave function this is
        stochastic reconfiguration, the quantum geometric tensor (:math:`\log|\psi|^2` gives four
        times it).
      weights: as for :func:`exact_fisher`.
      batch_axes: as for :func:`exact_fisher`.
      independent: as for :func:`exact_fisher`.

    Returns:
      A :class:`Metric`.

    Examples:
      >>> import jax, jax.numpy as jnp, natgrad_jax as ng
      >>> log_prob = lambda mean, x: -0.5 * (x - mean) ** 2
      >>> metric = ng.empirical_fisher(log_prob)
      >>> x = jnp.array([1.0, -2.0])
      >>> ng.fisher_matrix(metric, jnp.zeros(()), x).round(4).tolist()   # the mean squared score
      [[2.5]]

    Notes:
      Gradients of the mean log-probability lie in its row space, where `woodbury` is exact at any
      damping. One row for each example.

    References:
      Kunstner, Balles and Hennig, 2019; Sorella, 1998, Green function Monte Carlo with stochastic
      reconfiguration.
    """
    log_prob = _check_functions("empirical_fisher", "log_prob", log_prob, weights)
    name, groups = "empirical_fisher", _groups("empirical_fisher", batch_axes)

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        del key
        if len(jax.tree.leaves(outputs)) != 1 or jax.tree.leaves(outputs)[0].ndim != 1:
            shapes = jax.tree.map(lambda x: x.shape, outputs)
            raise ValueError(
                f"{name}: log_prob(params, batch) must return one number for each example, an array"
                f" of shape (N,), got {shapes}"
            )
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        plain = output_metrics.row_metric(outputs, row_weights)
        if not centered:
            return plain
        (weight,) = jax.tree.leaves(row_weights)

        def product(tangents: Tree) -> Tree:
            mean = lambda v: jnp.dot(weight, v.astype(weight.dtype), precision="highest")
            return jax.tree.map(lambda v: weight * (v.astype(weight.dtype) - mean(v)), tangents)

        return plain._replace(product=product, removed=jnp.sqrt(weight))

    made = Metric(name, log_prob, output_metric, output_metric, groups, independent=independent)
    return made._replace(weighted=weights is not None, weights=weights)


def gauss_newton(
    residual: Callable[[Tree, Tree], Tree],
    *,
    weights: Callable[[Tree], Tree] | None = None,
    loss: str = "linear",
    scale: jax.typing.ArrayLike = 1.0,
    batch_axes: Tree = 0,
    independent: bool | None = None,
) -> Metric:
    r"""The Gauss-Newton matrix of a least-squares loss, or of a robust one.

    .. math::
        F = \sum_i \frac{1}{N_i} \sum_n J_{in}^T J_{in}, \qquad
        J_{in} = \partial r_{in} / \partial\theta,

    the metric of the loss :math:`\sum_i \frac{1}{2 N_i} \sum_n \|r_{in}\|^2` over residual
    leaves i. With another ``loss`` every single residual r has the weight
    :math:`\rho'(r^2 / c^2)`, for :func:`robust_loss`.

    Args:
      residual: function (params, batch) -> tree of residuals, leaves of shape (N_i, ...).
      weights: as for :func:`exact_fisher`; with several groups, the residual's tree of weights.
      loss: "linear", "soft_l1", "huber" or "cauchy", defined and named as in scipy's
        ``least_squares``. The second-order term :math:`2 \rho''(z) r r^T` of the loss is left out:
        it is negative, and F stays positive semi-definite (iteratively reweighted least squares).
        The objective and its gradient are those of :func:`robust_loss`.
      scale: c, the size of a residual from which on it counts as an outlier (``f_scale``).
      batch_axes: as for :func:`exact_fisher`. Here mapped batch leaves may come in several sizes
        (interior and boundary points): each residual leaf then has one of these sizes.
      independent: as for :func:`exact_fisher`, and checked likewise, at eager calls and by
        :func:`verify`.

    Returns:
      A :class:`Metric`.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> residual = lambda p, batch: {"pde": p[0] * batch["x"], "bc": p[1] * batch["y"]}
      >>> metric = ng.gauss_newton(residual)
      >>> batch = {"x": jnp.ones((4,)), "y": 2 * jnp.ones((3,))}
      >>> ng.fisher_diagonal(metric, jnp.ones((2,)), batch).round(4).tolist()
      [1.0, 4.0]

    References:
      Mueller and Zeinhofer, 2023, Achieving high accuracy with PINNs via energy natural gradients;
      Triggs, McLauchlan, Hartley and Fitzgibbon, 2000, Bundle adjustment (robust losses).
    """
    residual = _check_functions("gauss_newton", "residual", residual, weights)
    robust.check("gauss_newton", loss, scale)
    name, groups = "gauss_newton", _groups("gauss_newton", batch_axes, several=True)

    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        del key
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        if loss == "linear":
            return output_metrics.row_metric(outputs, row_weights)
        return robust.output_metric(loss, scale, outputs, row_weights)

    made = Metric(name, residual, output_metric, output_metric, groups, independent=independent)
    made = made._replace(weighted=weights is not None, weights=weights)
    return made._replace(robust=loss != "linear")


def hessian(loss: Callable[[Tree, Tree], jax.Array]) -> Metric:
    r"""The Hessian of a loss, which makes the natural gradient Newton's method.

    Args:
      loss: function (params, batch) -> scalar.

    Returns:
      A :class:`Metric`. It may be indefinite: eigenvalues keep their sign, and `cg` stops at
      negative curvature. It has no rows: solvers that need them raise.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.hessian(lambda p, batch: p[0] ** 2 - 3 * p[1] ** 2)
      >>> ng.fisher_diagonal(metric, jnp.ones((2,)), None).tolist()
      [2.0, -6.0]
    """
    loss = _check_functions("hessian", "loss", loss, None)
    return Metric("hessian", loss, None, None, None, definite=False)


def euclidean() -> Metric:
    r"""The identity matrix, which makes the natural gradient the gradient over (1 + damping).

    Returns:
      A :class:`Metric`.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> ng.fisher_matrix(ng.euclidean(), jnp.ones((2,)), None).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    return Metric("euclidean", None, None, None, None)


def _check_functions(
    caller: str, name: str, function: Callable[[Tree, Tree], Any], weights: object
) -> Callable[[Tree, Tree], Any]:
    """The function, which tells of the batch where it cannot read it."""
    if not callable(function):
        raise TypeError(f"{caller}: {name} must be a function of (params, batch), got {function!r}")
    if weights is not None and not callable(weights):
        raise TypeError(f"{caller}: weights must be a function of the batch, got {weights!r}")
    return _reading.told(caller, name, function)


def _check_likelihood(caller: str, likelihood: object) -> None:
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"{caller}: likelihood must be a natgrad_jax.Likelihood such as Categorical(), got"
            f" {likelihood!r}"
        )


def _groups(
    caller: str, batch_axes: Tree, *, several: bool = False
) -> Callable[[Tree], tuple[examples.Group, ...]]:
    return lambda batch: examples.example_groups(caller, batch, batch_axes, several=several)


def _exact(name, likelihood, weights, groups) -> Callable[..., OutputMetric]:
    def output_metric(outputs: Tree, batch: Tree, key: jax.Array | None) -> OutputMetric:
        del key
        row_weights = examples.row_weights(name, weights, batch, outputs, groups(batch))
        root = jax.tree.map(jnp.sqrt, row_weights)
        return OutputMetric(
            lambda v: examples.scale_rows(row_weights, likelihood.fisher_product(outputs, v)),
            lambda u: examples.scale_rows(root, likelihood.fisher_factor_product(outputs, u)),
            output_metrics.coefficients_like(outputs),
            row_weights,
        )

    return output_metric

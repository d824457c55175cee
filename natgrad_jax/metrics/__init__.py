r"""Riemannian metrics on parameters: a map to outputs, pulled back through an output-space metric.

With outputs $z_r = f(\theta)_r$ over rows $r$, Jacobians $J_r = \partial z_r / \partial \theta$, an
output-space metric $M_r = B_r B_r^T$ and row weights $w_r$ that sum to one,

.. math::
    F = \sum_r w_r J_r^T M_r J_r = R^T R, \qquad R_r = \sqrt{w_r} B_r^T J_r .

A metric binds the functions that make it and holds no arrays; arrays come at call.
"""

from natgrad_jax.metrics.empirical_fisher import empirical_fisher as empirical_fisher
from natgrad_jax.metrics.euclidean import euclidean as euclidean
from natgrad_jax.metrics.exact_fisher import exact_fisher as exact_fisher
from natgrad_jax.metrics.gauss_newton import gauss_newton as gauss_newton
from natgrad_jax.metrics.hessian import hessian as hessian
from natgrad_jax.metrics.metric import Metric as Metric
from natgrad_jax.metrics.output_metrics import OutputMetric as OutputMetric
from natgrad_jax.metrics.sampled_fisher import sampled_fisher as sampled_fisher

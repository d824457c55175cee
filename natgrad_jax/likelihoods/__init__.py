r"""Output space: what outputs say about targets, and the metric that this induces on outputs.

A likelihood is a family :math:`p(y | z)`. Outputs z have leaves (N, ...): one row for each example
(or token); trailing positions (time, pixels) are independent and summed within a row. Row n has

.. math::
    M_n = E_{y \sim p(\cdot | z_n)}[s s^T] = B_n B_n^T, \qquad s = \nabla_{z_n} \log p(y | z_n),

the Hessian of :math:`KL[p(\cdot | z_n) || p(\cdot | z')]` at :math:`z' = z_n` (Amari, 1998;
Martens, 2020). Every method sees the outputs of all rows at once, so that a likelihood may hold one
constant a row; rows are independent, and the mean over them is taken by the metrics. Arithmetic
runs, and results come back, in float64 where outputs have it and in float32 otherwise.
"""

from natgrad_jax.likelihoods.base import Likelihood as Likelihood
from natgrad_jax.likelihoods.beta import Beta as Beta
from natgrad_jax.likelihoods.binary import Bernoulli as Bernoulli
from natgrad_jax.likelihoods.binary import Binomial as Binomial
from natgrad_jax.likelihoods.categorical import Categorical as Categorical
from natgrad_jax.likelihoods.distribution import from_distribution as from_distribution
from natgrad_jax.likelihoods.gamma import Gamma as Gamma
from natgrad_jax.likelihoods.joint import Joint as Joint
from natgrad_jax.likelihoods.multivariate_normal import MultivariateNormal as MultivariateNormal
from natgrad_jax.likelihoods.negative_binomial import NegativeBinomial as NegativeBinomial
from natgrad_jax.likelihoods.normal import DiagonalNormal as DiagonalNormal
from natgrad_jax.likelihoods.normal import Normal as Normal
from natgrad_jax.likelihoods.ordinal import Ordinal as Ordinal
from natgrad_jax.likelihoods.poisson import Poisson as Poisson
from natgrad_jax.likelihoods.student_t import StudentT as StudentT

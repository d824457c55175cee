"""Natural gradients for JAX, as optax transformations."""

# Likelihoods: p(targets | outputs)
from natgrad_jax.likelihoods import Bernoulli as Bernoulli
from natgrad_jax.likelihoods import Beta as Beta
from natgrad_jax.likelihoods import Binomial as Binomial
from natgrad_jax.likelihoods import Categorical as Categorical
from natgrad_jax.likelihoods import DiagonalNormal as DiagonalNormal
from natgrad_jax.likelihoods import Gamma as Gamma
from natgrad_jax.likelihoods import Joint as Joint
from natgrad_jax.likelihoods import Likelihood as Likelihood
from natgrad_jax.likelihoods import MultivariateNormal as MultivariateNormal
from natgrad_jax.likelihoods import NegativeBinomial as NegativeBinomial
from natgrad_jax.likelihoods import Normal as Normal
from natgrad_jax.likelihoods import Ordinal as Ordinal
from natgrad_jax.likelihoods import Poisson as Poisson
from natgrad_jax.likelihoods import StudentT as StudentT
from natgrad_jax.likelihoods import from_distribution as from_distribution

# Metrics on parameters
from natgrad_jax.metrics import Metric as Metric
from natgrad_jax.metrics import empirical_fisher as empirical_fisher
from natgrad_jax.metrics import euclidean as euclidean
from natgrad_jax.metrics import exact_fisher as exact_fisher
from natgrad_jax.metrics import gauss_newton as gauss_newton
from natgrad_jax.metrics import hessian as hessian
from natgrad_jax.metrics import sampled_fisher as sampled_fisher
from natgrad_jax.metrics.robust import robust_loss as robust_loss

# Pure functions of (metric, params, batch)
from natgrad_jax.direction import NaturalGradientInfo as NaturalGradientInfo
from natgrad_jax.direction import natural_gradient_direction as natural_gradient_direction
from natgrad_jax.covariance import CovarianceInfo as CovarianceInfo
from natgrad_jax.covariance import asymptotic_covariance as asymptotic_covariance
from natgrad_jax.fisher import fisher_diagonal as fisher_diagonal
from natgrad_jax.fisher import fisher_matrix as fisher_matrix
from natgrad_jax.fisher import fisher_quadratic_form as fisher_quadratic_form
from natgrad_jax.fisher import fisher_vector_product as fisher_vector_product
from natgrad_jax.fisher import gram_matrix as gram_matrix
from natgrad_jax.metrics.divergence import kl_divergence as kl_divergence
from natgrad_jax.explanation import Explanation as Explanation
from natgrad_jax.explanation import explain as explain
from natgrad_jax.kronecker_approximation import KroneckerApproximation as KroneckerApproximation
from natgrad_jax.kronecker_approximation import (
    kronecker_approximation as kronecker_approximation,
)
from natgrad_jax.scores import score as score
from natgrad_jax.scores import score_norms as score_norms
from natgrad_jax.verification import Verification as Verification
from natgrad_jax.verification import verify as verify

# Solvers of (F + damping I) d = g
from natgrad_jax.solvers import Solver as Solver
from natgrad_jax.solvers import block_diagonal as block_diagonal
from natgrad_jax.solvers import cg as cg
from natgrad_jax.solvers import cholesky as cholesky
from natgrad_jax.solvers import diagonal as diagonal
from natgrad_jax.solvers import ekfac as ekfac
from natgrad_jax.solvers import kfac as kfac
from natgrad_jax.solvers import qr as qr
from natgrad_jax.solvers import spectral as spectral
from natgrad_jax.solvers import woodbury as woodbury

# optax transformations
from natgrad_jax.transforms import adaptive_natural_gradient as adaptive_natural_gradient
from natgrad_jax.transforms import bind_batch as bind_batch
from natgrad_jax.transforms import clip_by_kl as clip_by_kl
from natgrad_jax.transforms import levenberg_marquardt as levenberg_marquardt
from natgrad_jax.transforms import natural_gradient as natural_gradient
from natgrad_jax.transforms import scale_by_kl_line_search as scale_by_kl_line_search
from natgrad_jax.transforms import scale_by_natural_gradient as scale_by_natural_gradient
from natgrad_jax.transforms import scale_by_quadratic_model as scale_by_quadratic_model
from natgrad_jax.transforms import scale_by_steepest_descent as scale_by_steepest_descent
from natgrad_jax.transforms import scale_to_kl as scale_to_kl
from natgrad_jax.transforms import trpo as trpo

# Diagnostics of their states
from natgrad_jax.diagnostics import Diagnostics as Diagnostics
from natgrad_jax.diagnostics import info as info

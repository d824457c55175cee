"""optax transformations, one a file."""

from natgrad_jax.transforms.adaptive_natural_gradient import (
    adaptive_natural_gradient as adaptive_natural_gradient,
)
from natgrad_jax.transforms.bind_batch import BindBatchState as BindBatchState
from natgrad_jax.transforms.bind_batch import bind_batch as bind_batch
from natgrad_jax.transforms.clip_by_kl import clip_by_kl as clip_by_kl
from natgrad_jax.transforms.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from natgrad_jax.transforms.natural_gradient import natural_gradient as natural_gradient
from natgrad_jax.transforms.scale_by_kl_line_search import (
    scale_by_kl_line_search as scale_by_kl_line_search,
)
from natgrad_jax.transforms.scale_by_natural_gradient import (
    ScaleByNaturalGradientState as ScaleByNaturalGradientState,
)
from natgrad_jax.transforms.scale_by_natural_gradient import (
    scale_by_natural_gradient as scale_by_natural_gradient,
)
from natgrad_jax.transforms.scale_by_quadratic_model import (
    scale_by_quadratic_model as scale_by_quadratic_model,
)
from natgrad_jax.transforms.scale_by_steepest_descent import (
    scale_by_steepest_descent as scale_by_steepest_descent,
)
from natgrad_jax.transforms.scale_to_kl import scale_to_kl as scale_to_kl
from natgrad_jax.transforms.trpo import trpo as trpo

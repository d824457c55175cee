"""What each primitive does: the registry, and a file for each family."""

from natgrad_jax.jacobian.primitives import complex as complex
from natgrad_jax.jacobian.primitives import contraction as contraction
from natgrad_jax.jacobian.primitives import control_flow as control_flow
from natgrad_jax.jacobian.primitives import convolution as convolution
from natgrad_jax.jacobian.primitives import elementwise as elementwise
from natgrad_jax.jacobian.primitives import gather_scatter as gather_scatter
from natgrad_jax.jacobian.primitives import joining as joining
from natgrad_jax.jacobian.primitives import linear_algebra as linear_algebra
from natgrad_jax.jacobian.primitives import random as random
from natgrad_jax.jacobian.primitives import reductions as reductions
from natgrad_jax.jacobian.primitives import registry as registry
from natgrad_jax.jacobian.primitives import slicing as slicing
from natgrad_jax.jacobian.primitives import structural as structural

"""Per-example Jacobians: the rows R of a pull-back metric F = R^T R."""

from natgrad_jax.jacobian._jaxpr import has_forward_mode as has_forward_mode
from natgrad_jax.jacobian._jaxpr import rounding_unit as rounding_unit
from natgrad_jax.jacobian._jaxpr import unused_inputs as unused_inputs
from natgrad_jax.jacobian.dense import pulled_columns as pulled_columns
from natgrad_jax.jacobian.engine import jacobian as jacobian
from natgrad_jax.jacobian.interface import Jacobian as Jacobian
from natgrad_jax.jacobian.kronecker import Kronecker as Kronecker
from natgrad_jax.jacobian.kronecker import kronecker as kronecker

"""Per-example Jacobians: the rows R of a pull-back metric F = R^T R."""

from natgrad_jax.jacobian.dense import dense_jacobian as dense_jacobian
from natgrad_jax.jacobian.interface import Jacobian as Jacobian

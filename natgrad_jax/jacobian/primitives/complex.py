"""Complex numbers: entry by entry, and a pair of real parameters becomes one complex array."""

from natgrad_jax.jacobian.primitives.elementwise import RULE
from natgrad_jax.jacobian.primitives.registry import register

register("conj imag real", RULE)
register("complex", RULE._replace(complex_parts=(1, 1j)))

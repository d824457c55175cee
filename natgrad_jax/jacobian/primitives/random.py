"""Random numbers: a key is an example's own, or the same for all."""

from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.primitives.elementwise import examples as elementwise
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import leading
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require


def _batched(equation: Any, labels: list[Label]) -> Label:
    """Keys in the leading dimensions of the operand; what each gives has further ones."""
    label = axis(labels)
    for shape, own in zip(_jaxpr.shapes_in(equation), labels, strict=True):
        require(own is None or label.dim < len(shape))
    require(label.dim < len(_jaxpr.shapes_out(equation)[0]))
    return label


register("random_bits random_unwrap random_split random_seed", Rule(examples=one(_batched)))
register("random_wrap", Rule(examples=leading(1)))
register("random_fold_in random_clone", Rule(examples=elementwise))
register("random_gamma", Rule(examples=elementwise))

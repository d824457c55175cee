"""The table: for every primitive, functions that lead to it. A new primitive is a new row."""

from tests.fuzz import rows_arrays
from tests.fuzz import rows_control
from tests.fuzz import rows_elementwise
from tests.fuzz import rows_linalg
from tests.fuzz.primitives import differentiable

#: primitive -> cases, whether or not the JAX at hand has the primitive.
TABLE = rows_elementwise.ROWS | rows_arrays.ROWS | rows_linalg.ROWS | rows_control.ROWS
# Their derivatives are the user's, so that JAX registers none.
_OWN_RULES = {"custom_jvp_call", "custom_vjp_call"}


def present() -> dict:
    """The rows whose primitive the JAX at hand has, in the order of their names."""
    names = differentiable() | _OWN_RULES
    return {name: TABLE[name] for name in sorted(TABLE) if name in names}


def numbered() -> list:
    """All cases that the JAX at hand has: (primitive, number of the case, case)."""
    return [(name, i, case) for name, row in present().items() for i, case in enumerate(row)]

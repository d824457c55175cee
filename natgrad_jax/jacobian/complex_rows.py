"""Rows of complex arithmetic between real parameters and real outputs.

A cotangent g of a complex z is the row d Re(g z): for z = a W of a real parameter the rows are
Re(a (x) g) = Re a (x) Re g - Im a (x) Im g, twice as many positions; of a pair of real parameters
W = U + i V they are Re and -Im of a (x) g, whose inner products are Re((a . a*) (g . g*)).
"""

import jax.numpy as jnp

from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.joined import Joined
from natgrad_jax.jacobian.joined import in_leaf


def is_complex(part: Part) -> bool:
    """Whether a part holds complex numbers."""
    return any(x is not None and jnp.iscomplexobj(x) for x in part)


def real_part(part: Part, unit: complex = 1) -> Part:
    """Rows Re(unit * row), in real numbers."""
    right = part.right * unit if unit != 1 else part.right
    if part.left is None or not jnp.iscomplexobj(part.left):
        return part._replace(right=jnp.real(right))
    if not jnp.iscomplexobj(right):
        return part._replace(left=jnp.real(part.left))
    left = jnp.concatenate([jnp.real(part.left), jnp.imag(part.left)], axis=3)
    return Part(left, jnp.concatenate([jnp.real(right), -jnp.imag(right)], axis=3))


def real_factors(factor: Factor, joined: dict[int, Joined]) -> list[Factor]:
    """A factor as ones of real numbers: those of a complex array one by one for its parts."""
    joint = joined.get(factor.place.leaf)
    if joint is None or not joint.units:
        return [factor]
    turned = [
        tuple(None if part is None else real_part(part, unit) for part in factor.parts)
        for unit in joint.units
    ]
    return [
        Factor(place_in_leaf(factor.place, joint, number), parts)
        for number, parts in enumerate(turned)
    ]


def place_in_leaf(place: Place, joint: Joined, number: int) -> Place:
    """The place in the parameter that is part `number` of a complex array."""
    offset, b = in_leaf(joint, number, place.offset, place.b)
    p, q = (in_leaf(joint, number, 0, pieces)[1] for pieces in (place.p, place.q))
    view = joint.views[number]
    return Place(view.root, joint.shapes[number], offset, b, p, q)

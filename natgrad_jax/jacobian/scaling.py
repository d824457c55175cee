"""Parameters in other units, theta = c phi: what becomes of their rows in factored form.

The units c are one positive number for each parameter leaf, or an array like the leaf.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import factored
from natgrad_jax.jacobian import view as views
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.factored import Part
from natgrad_jax.jacobian.factored import Place
from natgrad_jax.jacobian.joined import Joined


def of_place(place: Place, joined: dict[int, Joined], units: list[jax.Array]) -> jax.Array:
    """The units of the entries of a place, (B, p, q), of size one along what they do not vary."""
    pieces = place.b + place.p + place.q
    if place.leaf not in joined:
        own = units[place.leaf]
        entries = views.take(own, place.offset, pieces) if own.ndim else own
        return entries.reshape(place.sizes if own.ndim else (1, 1, 1))
    joint = joined[place.leaf]
    if any(units[view.root].ndim for view in joint.views):
        return views.take(joint.gather(units), place.offset, pieces).reshape(place.sizes)
    owners = joint.owners(views.indices(place.offset, pieces)).reshape(place.sizes)
    return of_owners(owners, joint, units)


def of_owners(owners: np.ndarray, joint: Joined, units: list[jax.Array]) -> jax.Array:
    """The units of entries by the number of their parameter, of size one as in `of_place`."""
    for axis in range(owners.ndim):
        first = owners.take([0], axis) if owners.size else owners
        if np.all(first == owners):
            owners = first
    return jnp.stack([units[view.root] for view in joint.views])[owners]


def in_units(
    factor: Factor, joined: dict[int, Joined], units: list[jax.Array]
) -> tuple[Factor, jax.Array | None]:
    """Rows of phi: a factor, and a number that multiplies its inner products; None for one.

    One number for all entries stays apart, so that what several factors share remains shared (a
    weight and its bias have the same cotangents). Units that are no product of those of inputs and
    outputs need the rows themselves.
    """
    place, parts = factor
    c = of_place(place, joined, units)
    if c.shape == (1, 1, 1):
        return factor, c.reshape(()) ** 2
    if c.shape[1] == 1:
        change = lambda part: on_right(part, c[:, 0])
    elif c.shape[2] == 1:
        change = lambda part: on_left(part, c[:, :, 0])
    else:
        change, place = functools.partial(_rows, place, c), _flat(place)
    return Factor(place, tuple(None if x is None else change(x) for x in parts)), None


def on_right(part: Part, c: jax.Array) -> Part:
    """The part with its outputs times (B or 1, q or 1)."""
    return part._replace(right=part.right * c[None, None, :, None, :])


def on_left(part: Part, c: jax.Array) -> Part:
    """The part with its inputs times (B or 1, p)."""
    if not part.looks_up:
        return part._replace(left=part.left * c[None, None, :, None, :])
    copies = part.left.shape[2]
    wide = jnp.broadcast_to(c, (copies, c.shape[1]))
    picked = wide[jnp.arange(copies)[:, None], part.left]
    return part._replace(right=part.right * picked[..., None])


def _rows(place: Place, c: jax.Array, part: Part) -> Part:
    entries = factored.entries_of(part, factored.explicit(part, place.sizes[1]))
    return Part(None, (entries * c[None, None]).reshape(*entries.shape[:2], 1, 1, -1))


def _flat(place: Place) -> Place:
    """The entries of a place, in their order, as outputs."""
    pieces = views.merged(((math.prod(place.sizes), 1),))
    return Place(place.leaf, place.sizes, 0, (), (), pieces)

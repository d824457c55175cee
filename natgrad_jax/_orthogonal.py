"""Orthogonal factors of rows R: solves with R^T R + damping I that never form that product.

A product of matrices squares their condition number: modes whose singular value is below
sqrt(eps) times the largest are rounding in it. In the triangular factor of

    [R; sqrt(damping) I] = Q L,    R^T R + damping I = L^T L

they are not, down to eps times the largest (Björck, 1996, Numerical methods for least squares
problems). Householder's Q leaves to each column an error of its own size, so that units of the
parameters do not matter.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax._symmetric import lane_by_lane
from natgrad_jax._symmetric import matvec

_HIGHEST = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """Damped rows, ready to be solved with.

    Attributes:
      solve: g (n,) -> (R^T R + damping I)^-1 g, the pseudo-inverse for damping 0.
      used_svd: whether the singular value decomposition was needed.
      damping: that of `solve`, which is more than was asked for where `shifted`.
      shifted: whether it is.
    """

    solve: Callable[[jax.Array], jax.Array]
    used_svd: jax.Array
    damping: jax.Array
    shifted: jax.Array


def cut(n: int, dtype: jnp.dtype) -> float:
    """Singular values of n unit columns count as null below this share of the largest.

    Rounding makes null ones as large as some eps sqrt(n).
    """
    return 10 * float(jnp.finfo(dtype).eps) * n**0.5


def factorize(rows: jax.Array, damping: jax.Array, *, equilibrate: bool) -> Factor:
    """Prepares solves with R^T R + damping I.

    By the inverse of a triangle; for damping 0 by singular values, those of null modes cut, where
    the triangle is not well conditioned. A damping that is rounding beside R, the square of
    `cut` times its longest column, is raised to that: the factor is then a preconditioner.

    Args:
      rows: R (M, n), M >= n, entries of order one at most.
      damping: scalar of the dtype of R, of order one at most.
      equilibrate: whether null modes are those of R with columns of unit length, so that units do
        not decide. Columns below `cut` of the longest are null, whatever their unit.

    Returns:
      A :class:`Factor`.
    """
    n, dtype = rows.shape[1], rows.dtype
    lengths = jnp.linalg.norm(rows, axis=0)
    longest = jnp.max(lengths, initial=0)
    lowest = jnp.where(damping > 0, (cut(n, dtype) * longest) ** 2, 0)
    shifted = damping < lowest
    damping = jnp.maximum(damping, lowest)
    stacked = jnp.concatenate([rows, jnp.sqrt(damping) * jnp.eye(n, dtype=dtype)])
    upper = _looped_triangle(stacked)[0]
    longest = jnp.where(longest == 0, 1, longest)
    # Without lengths of their own all columns are as the longest.
    invert = _looped_inverse_root if equilibrate else _looped_inverse_root_of_equal
    known = (lengths > cut(n, dtype) * longest) if equilibrate else jnp.zeros((n,), jnp.bool_)
    lengths = jnp.where(known, lengths, longest)
    scaled = upper / lengths[None]
    inverse = jax.scipy.linalg.solve_triangular(scaled, jnp.eye(n, dtype=dtype))
    condition = jnp.linalg.norm(scaled) * jnp.linalg.norm(inverse)
    # True for NaN and infinity, too.
    needed = (damping <= 0) & ~(condition * cut(n, dtype) < 1)

    def run(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(False), invert(scaled, lengths)[0]

    start = (needed, inverse.T / lengths[None])
    _, root = jax.lax.while_loop(lambda c: c[0], run, start)
    return Factor(lambda g: matvec(root.T, matvec(root, g)), needed, damping, shifted)


_looped_triangle = lane_by_lane(lambda rows: (jnp.linalg.qr(rows, mode="r"),))


def outside(basis: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q^T g and g - Q Q^T g for orthonormal or zero columns Q, in two passes.

    What one pass leaves inside by rounding would be divided by the damping ("twice is enough":
    Kahan, in Parlett, 1980, The symmetric eigenvalue problem).
    """
    modes = matvec(basis.T, g)
    left = g - matvec(basis, modes)
    more = matvec(basis.T, left)
    return modes + more, left - matvec(basis, more)


def _inverse_values(triangle: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inverse singular values, 0 for null ones, which of them are kept, and right vectors."""
    n, dtype = triangle.shape[0], triangle.dtype
    _, s, right = jnp.linalg.svd(triangle)
    kept = s > cut(n, dtype) * jnp.max(s, initial=0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return inverse, kept, right


def _inverse_root(scaled: jax.Array, lengths: jax.Array) -> tuple[jax.Array]:
    """H with (L^T L)^+ = H^T H, by the singular values of `scaled`, S = L diag(lengths)^-1.

    With S = U diag(s) W^T the range of L^T is that of B = diag(lengths) W over the modes kept, and
    with orthogonal factors B = Q T the pseudo-inverse of L^T L is Q T^-T diag(s)^-2 T^-1 Q^T.
    """
    inverse, kept, right = _inverse_values(scaled)
    span = jnp.where(kept[None], right.T * lengths[:, None], 0)
    basis, triangle = jnp.linalg.qr(span)
    basis = jnp.where(kept[None], basis, 0)
    triangle = triangle + jnp.diag(jnp.where(kept, jnp.zeros((), span.dtype), 1))
    root = inverse[:, None] * jax.scipy.linalg.solve_triangular(triangle, basis.T)
    # With all modes kept B is square, and its inverse known.
    direct = inverse[:, None] * right / lengths[None]
    return (jnp.where(jnp.all(kept), direct, root),)


def _inverse_root_of_equal(scaled: jax.Array, lengths: jax.Array) -> tuple[jax.Array]:
    """The same where all lengths are one number: no second factorisation, to run or compile."""
    inverse, _, right = _inverse_values(scaled)
    return (inverse[:, None] * right / lengths[None],)


_looped_inverse_root = lane_by_lane(_inverse_root)
_looped_inverse_root_of_equal = lane_by_lane(_inverse_root_of_equal)


def reduced(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R (M, P), M < P, as S Q^T: the square S (M, M), and orthonormal columns Q (P, M)."""
    basis, upper = _looped_factors(rows.T)
    return upper.T, basis


_looped_factors = lane_by_lane(lambda rows: tuple(jnp.linalg.qr(rows)))


def fisher_product(rows: jax.Array, v: jax.Array) -> jax.Array:
    """R^T R v."""
    product = functools.partial(jnp.dot, precision=_HIGHEST)
    return product(rows.T, product(rows, v))

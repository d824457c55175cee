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
    """

    solve: Callable[[jax.Array], jax.Array]
    used_svd: jax.Array


class _Range(NamedTuple):
    """(R^T R + damping I)^-1 on the range, root^T root, and the basis (n, n) of the range."""

    root: jax.Array
    basis: jax.Array


def cut(n: int, dtype: jnp.dtype) -> float:
    """Singular values of n unit columns count as null below this share of the largest.

    Rounding makes null ones as large as some eps sqrt(n).
    """
    return 10 * float(jnp.finfo(dtype).eps) * n**0.5


def factorize(rows: jax.Array, damping: jax.Array, *, equilibrate: bool) -> Factor:
    """Prepares solves with R^T R + damping I.

    By triangular factors where these are well conditioned, by singular values, of which those of
    null modes are cut, where they are not: seldom with damping, unless that is tiny.

    Args:
      rows: R (M, n), M >= n, entries of order one at most.
      damping: scalar of the dtype of R, of order one at most.
      equilibrate: whether null modes are those of R with columns of unit length, so that units do
        not decide. Columns below `cut` of the longest are null, whatever their unit.

    Returns:
      A :class:`Factor`.
    """
    n, dtype = rows.shape[1], rows.dtype
    stacked = jnp.concatenate([rows, jnp.sqrt(damping) * jnp.eye(n, dtype=dtype)])
    upper = jnp.linalg.qr(stacked, mode="r")
    lengths = jnp.linalg.norm(upper, axis=0)
    longest = jnp.max(lengths, initial=0)
    longest = jnp.where(longest == 0, 1, longest)
    known = (lengths > cut(n, dtype) * longest) if equilibrate else jnp.zeros((n,), jnp.bool_)
    lengths = jnp.where(known, lengths, longest)
    scaled = upper / lengths[None]
    inverse = jax.scipy.linalg.solve_triangular(scaled, jnp.eye(n, dtype=dtype))
    condition = jnp.linalg.norm(scaled) * jnp.linalg.norm(inverse)
    # True for NaN and infinity, too.
    needed = ~(condition * cut(n, dtype) < 1) & (n > 0)

    def run(carry: tuple[jax.Array, _Range]) -> tuple[jax.Array, _Range]:
        return jnp.asarray(False), _looped_range(scaled, lengths)

    start = _Range(upper, jnp.zeros_like(upper))
    _, (kept, basis) = jax.lax.while_loop(lambda c: c[0], run, (needed, start))
    null_gain = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)

    def by_range(g: jax.Array) -> jax.Array:
        inside = matvec(kept.T, matvec(kept, g))
        return inside + null_gain * outside(basis, g)[1]

    def by_triangles(g: jax.Array) -> jax.Array:
        half = jax.scipy.linalg.solve_triangular(kept, g, trans="T")
        return jax.scipy.linalg.solve_triangular(kept, half)

    return Factor(lambda g: jax.lax.cond(needed, by_range, by_triangles, g), needed)


def outside(basis: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q^T g and g - Q Q^T g for orthonormal or zero columns Q, in two passes.

    What one pass leaves inside by rounding would be divided by the damping ("twice is enough":
    Kahan, in Parlett, 1980, The symmetric eigenvalue problem).
    """
    modes = matvec(basis.T, g)
    left = g - matvec(basis, modes)
    more = matvec(basis.T, left)
    return modes + more, left - matvec(basis, more)


def _range(scaled: jax.Array, lengths: jax.Array) -> _Range:
    """Of L = `scaled` diag(lengths), by the singular values of `scaled`.

    With scaled = U S W^T the range of L^T is that of B = diag(lengths) W over the modes kept, and
    with orthogonal factors B = Q T the pseudo-inverse of L^T L is Q T^-T S^-2 T^-1 Q^T.
    """
    n, dtype = scaled.shape[0], scaled.dtype
    _, s, right = jnp.linalg.svd(scaled)
    kept = s > cut(n, dtype) * jnp.max(s, initial=0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    span = jnp.where(kept[None], right.T * lengths[:, None], 0)
    basis, upper = jnp.linalg.qr(span)
    basis = jnp.where(kept[None], basis, 0)
    upper = upper + jnp.diag(jnp.where(kept, jnp.zeros((), dtype), 1))
    root = inverse[:, None] * jax.scipy.linalg.solve_triangular(upper, basis.T)
    # With all modes kept B is square, and its inverse known.
    direct = inverse[:, None] * right / lengths[None]
    return _Range(jnp.where(jnp.all(kept), direct, root), basis)


_looped_range = lane_by_lane(_range)


def reduced(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R (M, P), M < P, as S Q^T: the square S (M, M), and orthonormal columns Q (P, M)."""
    basis, upper = jnp.linalg.qr(rows.T)
    return upper.T, basis


def fisher_product(rows: jax.Array, v: jax.Array) -> jax.Array:
    """R^T R v."""
    product = functools.partial(jnp.dot, precision=_HIGHEST)
    return product(rows.T, product(rows, v))

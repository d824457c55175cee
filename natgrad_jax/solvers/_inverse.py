"""Damped inverses of positive semi-definite matrices of many orders, by one compiled program.

A matrix is inverted by Schur complements of one half, again and again down to tiles, so that nearly
all of the work is matrix products: they run on all cores, and several times as fast as triangular
solves. The halves are met in a loop over tiles, not by recursion: the program has each size once,
and a matrix that is smaller than the largest runs fewer trips of the same loop.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from natgrad_jax import _symmetric

_HIGHEST = jax.lax.Precision.HIGHEST

#: Tiles up to this order are inverted by a triangular solve.
_LARGEST_TILE = 128

#: Orders of tiles are multiples of this.
_MULTIPLE = 32


def padded(order: int) -> int:
    """The order to which matrices up to `order` are padded: a power of two of tiles."""
    tile, levels = _tiles(order)
    return tile * 2**levels


def _tiles(order: int) -> tuple[int, int]:
    levels = 0
    while order > _LARGEST_TILE * 2**levels:
        levels += 1
    tile = -(-order // 2**levels)
    return -(-tile // _MULTIPLE) * _MULTIPLE, levels


def inverse(matrix: jax.Array, damping: jax.Array, order: jax.Array) -> jax.Array:
    """(A + damping I)^-1 of a positive semi-definite A, its pseudo-inverse for damping 0.

    Cholesky for damping > 0, the eigendecomposition elsewhere, as in `_symmetric.factorize`.

    Args:
      matrix: (n, n), A in its upper left corner and zeros elsewhere; n is such as `padded` gives.
        What stands below the diagonal does not count.
      damping: scalar.
      order: the order of A, at most n.

    Returns:
      (n, n), the inverse in its upper left corner.
    """
    n, dtype = matrix.shape[0], matrix.dtype
    # Past the corner the first pivot once more, which leaves the smallest and the largest alone.
    diagonal = jnp.where(jnp.arange(n) < order, damping, matrix[0, 0] + damping)
    found, (smallest, minus_largest) = _by_halves(matrix, diagonal.astype(dtype), order)
    # False for NaN and infinity, too.
    sound = smallest > -jnp.finfo(dtype).eps * minus_largest

    def by_eigen(_: jax.Array) -> jax.Array:
        values, vectors = _symmetric.eigen(matrix, definite=True, looped=True)
        # Roots on both sides: one array of eigenvectors less to hold.
        roots = vectors * jnp.sqrt(_symmetric.damped_inverse(values, damping))[None, :]
        return _times(roots, roots.T)

    return _if(((damping <= 0) | ~sound) & (order > 0), by_eigen, found)


def _by_halves(
    matrix: jax.Array, diagonal: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The inverse of matrix + diag(diagonal); of its squared pivots p the least p and -p, (2,).

    [[A, B], [B^T, D]]^-1 with X = A^-1 B and S = (D - B^T X)^-1 is
    [[A^-1 + X S X^T, -X S], [-S X^T, S]]. A half that is done stands inverted in its place, and X
    in that of B.
    """
    n, dtype = matrix.shape[0], matrix.dtype
    tile, levels = _tiles(n)
    halves = [tile * 2**level for level in range(levels)]
    # The halvings that a matrix of this order needs.
    needed = sum((jnp.where(order > half, 1, 0) for half in halves), jnp.asarray(0))
    eye = jnp.eye(tile, dtype=dtype)

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix, least = carry
        begin = j * tile
        # A tile's own diagonal: added to the whole matrix it would take a pass over all of it.
        own = jnp.diag(jax.lax.dynamic_slice(diagonal, (begin,), (tile,)))
        own = own + _corner(matrix, begin, begin, tile)
        lower = jax.lax.linalg.cholesky(own.T, symmetrize_input=False)
        root = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
        matrix = _put(matrix, _times(root.T, root), begin, begin)
        done = j + 1
        for level, half in enumerate(halves):
            whole = (done % 2 ** (level + 1) == 0) & (level < needed)
            matrix = _if(whole, functools.partial(_join, done * tile - 2 * half, half), matrix)
        for level, half in enumerate(halves):
            first = (done % 2 ** (level + 1) == 2**level) & (level < needed)
            matrix = _if(first, functools.partial(_eliminate, done * tile - half, half), matrix)
        pivots = jnp.diagonal(lower) ** 2
        return matrix, jnp.minimum(least, jnp.min(jnp.stack([pivots, -pivots]), axis=1))

    # Without a sign, indices need no code for those that count from the end.
    zero, tiles = jnp.zeros((), jnp.uint32), (2**needed).astype(jnp.uint32)
    return jax.lax.fori_loop(zero, tiles, step, (matrix, jnp.full((2,), jnp.inf, dtype)))


def _eliminate(begin: jax.Array, half: int, matrix: jax.Array) -> jax.Array:
    """D - B^T X and X = A^-1 B, where A^-1 stands already."""
    middle = begin + half
    above = _corner(matrix, begin, middle, half)
    across = _times(_corner(matrix, begin, begin, half), above)
    rest = _corner(matrix, middle, middle, half) - _times(above.T, across)
    return _put(_put(matrix, rest, middle, middle), across, begin, middle)


def _join(begin: jax.Array, half: int, matrix: jax.Array) -> jax.Array:
    """The inverse of both halves, where A^-1, X and S stand already."""
    middle = begin + half
    across = _corner(matrix, begin, middle, half)
    corner = _times(across, _corner(matrix, middle, middle, half))
    first = _corner(matrix, begin, begin, half) + _times(corner, across.T)
    matrix = _put(_put(matrix, first, begin, begin), -corner, begin, middle)
    return _put(matrix, -corner.T, middle, begin)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=_HIGHEST)


def _corner(matrix: jax.Array, row: jax.Array, column: jax.Array, order: int) -> jax.Array:
    return jax.lax.dynamic_slice(matrix, (row, column), (order, order))


def _put(matrix: jax.Array, block: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(matrix, block, (row, column))


def _if(
    condition: jax.Array, function: Callable[[jax.Array], jax.Array], matrix: jax.Array
) -> jax.Array:
    """function(matrix) or the matrix itself. Not `cond`, which runs both branches under vmap."""
    run = lambda carry: (jnp.asarray(False), function(carry[1]))
    return jax.lax.while_loop(lambda carry: carry[0], run, (condition, matrix))[1]

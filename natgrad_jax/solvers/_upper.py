"""Large symmetric matrices by what stands on and above the diagonal.

Of a second moment the block below the diagonal is the transpose of that above. Large ones are kept
as block rows that begin at the diagonal: fewer products, less to average, less memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.jacobian import factored

#: The least order that is cut in two; more cuts cost as much in copies and compile time.
_LARGE = 768


class Upper(NamedTuple):
    """A symmetric matrix (1, n, n) as block rows: rows[i] (1, k_i, n - k_0 - ... - k_(i-1))."""

    rows: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the whole."""
        n = self.rows[0].shape[2]
        return 1, n, n

    @property
    def ndim(self) -> int:
        """That of the whole."""
        return 3


Symmetric = jax.Array | Upper


def zeros(copies: int, order: int) -> Symmetric:
    """Zeros in the form that moments of this order have."""
    cuts = _cuts(order)
    if copies != 1 or len(cuts) == 1:
        return jnp.zeros((copies, order, order))
    return Upper(tuple(jnp.zeros((1, end - begin, order - begin)) for begin, end in cuts))


def _cuts(order: int) -> list[tuple[int, int]]:
    """Where block rows begin and end."""
    return [(0, order)] if order < _LARGE else [(0, order // 2), (order // 2, order)]


def second_moment(x: jax.Array, roots: jax.Array | None = None) -> Symmetric:
    """The sum of r^2 x x^T over leading axes, x (..., n) and roots r (..., 1): (1, n, n)."""
    order = x.shape[-1]

    def columns(begin: int, end: int) -> jax.Array:
        own = x[..., begin:end]
        return factored.as_matrix(own if roots is None else own * roots)

    rows = tuple(
        factored.matmul(columns(begin, end).T, columns(begin, order))[None]
        for begin, end in _cuts(order)
    )
    return Upper(rows) if len(rows) > 1 else rows[0]


def diagonal(matrix: Symmetric) -> list[jax.Array]:
    """In pieces, (B, k) each."""
    rows = matrix.rows if isinstance(matrix, Upper) else (matrix,)
    # A strided slice where `jnp.diagonal` gathers, which takes a kernel for each matrix.
    flat = lambda row: row.reshape(row.shape[0], row.shape[1] * row.shape[2])
    return [flat(row)[:, :: row.shape[2] + 1] for row in rows]


def padded(matrix: Symmetric, order: int) -> jax.Array:
    """The matrix on and above the diagonal, with zeros up to an order: (B, order, order).

    What stands below the diagonal is not said.
    """
    rows = matrix.rows if isinstance(matrix, Upper) else (matrix,)
    found = jnp.zeros((matrix.shape[0], order, order), rows[0].dtype)
    for row in rows:
        begin = matrix.shape[1] - row.shape[2]
        # Not `pad` and `concatenate`: fused, they ask at every entry where it comes from.
        found = jax.lax.dynamic_update_slice(found, row, (0, begin, begin))
    return found


def whole(matrix: Symmetric) -> jax.Array:
    """(B, n, n)."""
    if not isinstance(matrix, Upper):
        return matrix
    found = padded(matrix, matrix.shape[1])
    return jnp.triu(found) + jnp.swapaxes(jnp.triu(found, 1), 1, 2)

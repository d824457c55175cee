"""What solvers may ask of the rows R (M, P) of a metric F = R^T R."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Tree = Any


class Jacobian(NamedTuple):
    """Rows R (M, P) of F = R^T R, behind the products that solvers need.

    Rows are ordered leaf after leaf of the output coefficients, row-major within a leaf; columns
    are parameters raveled in tree order. Results are in the working dtype.

    Attributes:
      product: params-like tree v to R v, (M,).
      transposed_product: u (M,) to R^T u, params-like.
      gram: () -> R R^T (M, M); given units c, a params-like tree of scalars or of arrays like the
        leaves, R diag(c^2) R^T.
      diagonal: () -> the diagonal of F, params-like.
      blocks: () -> for each leaf of P_l parameters its block of F, (P_l, P_l).
      matrix: () -> R itself, (M, P).
      squared_norms: () -> the squared norm of every row, (M,); of a centered metric before
        centering. It takes units as `gram` does.
    """

    product: Callable[[Tree], jax.Array]
    transposed_product: Callable[[jax.Array], Tree]
    gram: Callable[..., jax.Array]
    diagonal: Callable[[], Tree]
    blocks: Callable[[], Tree]
    matrix: Callable[[], jax.Array]
    squared_norms: Callable[..., jax.Array]

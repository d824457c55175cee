"""Rows of the table: decompositions and solves. Of these the condition widens the tolerance."""

import jax.numpy as jnp
from jax import lax

from tests.fuzz.case import case
from tests.fuzz.case import either
from tests.fuzz.case import joined
from tests.fuzz.operands import definite
from tests.fuzz.operands import dominated
from tests.fuzz.operands import positive
from tests.fuzz.operands import real

_SOLVES = {"loose": 1e2}
# Their derivatives divide by gaps between eigenvalues or singular values.
_GAPS = {"loose": 1e3}


def _half_of_eigh(a):
    """A function of a matrix: no vector's sign or phase is left in it."""
    w, v = jnp.linalg.eigh(a)
    return (v * jnp.sqrt(w)[None, :].astype(a.dtype)) @ v.conj().T


def _half_of_svd(a):
    u, s, vh = jnp.linalg.svd(a, full_matrices=False)
    return (u * jnp.sqrt(s)[None, :].astype(a.dtype)) @ vh


def _by_hand(a, b):
    """A solve given by its product, as iterative solvers are."""
    solve = lambda matvec, b: jnp.linalg.inv(lax.stop_gradient(a)) @ b
    product = lambda x: a @ x
    return lax.custom_linear_solve(product, b, solve, solve, symmetric=True)


def _tridiagonal(d, b):
    off = d[:, 0] / 8
    return lax.linalg.tridiagonal_solve(
        off.at[0].set(0), jnp.diagonal(d), off.at[-1].set(0), b[:, None]
    )


ROWS = {
    "cholesky": [either(jnp.linalg.cholesky, definite(3), **_SOLVES)],
    "custom_linear_solve": [
        either(jnp.linalg.solve, dominated(3), real(3), **_SOLVES),
        case(_by_hand, definite(2), real(2), **_SOLVES),
    ],
    "eig": [case(lambda a: jnp.linalg.eigvals(a), dominated(2), **_GAPS)],
    "eigh": [
        either(jnp.linalg.eigvalsh, definite(2), **_GAPS),
        either(_half_of_eigh, definite(2), **_GAPS),
    ],
    "lu": [
        either(lambda a: lax.linalg.lu(a)[0], dominated(3), **_SOLVES),
        case(lambda a: jnp.linalg.slogdet(a)[1][None], dominated(3), **_SOLVES),
    ],
    "qr": [either(lambda a: joined(*jnp.linalg.qr(a)), dominated(2), **_SOLVES)],
    "svd": [
        either(lambda a: jnp.linalg.svd(a, compute_uv=False), dominated(2), **_GAPS),
        either(_half_of_svd, dominated(2), **_GAPS),
    ],
    "triangular_solve": [
        either(
            lambda a, b: lax.linalg.triangular_solve(a, b[:, None], left_side=True, lower=True),
            dominated(3),
            real(3),
            **_SOLVES,
        ),
    ],
    "tridiagonal_solve": [case(_tridiagonal, dominated(3), positive(3), **_SOLVES)],
}

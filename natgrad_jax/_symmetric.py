"""Solving with one symmetric matrix: Cholesky, and the eigendecomposition where that fails.

Everything runs inside jit. The eigendecomposition costs many Cholesky factorisations, so it sits in
a `while_loop` of at most one trip: unlike `cond`, which runs both branches under vmap, that runs
only if some lane needs it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


class Eigen(NamedTuple):
    """Eigenvalues (n,) in ascending order, null ones exactly 0, and vectors (n, n) in columns."""

    values: jax.Array
    vectors: jax.Array


class Factor(NamedTuple):
    """A damped symmetric matrix, ready to be solved with.

    Attributes:
      solve: b (n,) -> (A + damping I)^-1 b, the pseudo-inverse for damping 0.
      eigen_taken: whether the eigendecomposition was needed.
      damping: that of `solve`, which is more than was asked for where `shifted`.
      shifted: whether it is.
    """

    solve: Callable[[jax.Array], jax.Array]
    eigen_taken: jax.Array
    damping: jax.Array
    shifted: jax.Array


def matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """A matrix-vector product at full precision."""
    return jnp.dot(matrix, vector, precision=_HIGHEST)


def eigen(matrix: jax.Array, *, definite: bool, looped: bool = False) -> Eigen:
    """Eigendecomposition whose spectrum is cut at eps * n * (largest |eigenvalue|).

    Of the matrix the entries on and above the diagonal are read.

    `looped`: whether it stands in the body of a loop.
    """
    values, vectors = (_looped_eigh if looped else _eigh)(matrix)
    cut = jnp.finfo(matrix.dtype).eps * matrix.shape[0] * _largest(values)
    kept = (values if definite else jnp.abs(values)) > cut
    return Eigen(jnp.where(kept, values, 0), vectors)


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix.T, symmetrize_input=False)
    return values, vectors


def lane_by_lane(decompose: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., Any]:
    """A decomposition that may stand in the body of a loop under vmap.

    There a batch of them can leave the runtime of CPUs before JAX 0.12 waiting for ever (jaxlib
    0.10.2, two cores, a vmap over training loops with `cholesky`): they go one by one.
    """
    looped = jax.custom_batching.custom_vmap(decompose)

    @looped.def_vmap
    def lanes(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> tuple[Any, Any]:
        operands = tuple(
            x if batched else jnp.broadcast_to(x, (axis_size, *jnp.shape(x)))
            for x, batched in zip(operands, in_batched, strict=True)
        )
        together = jax.vmap(decompose)
        if jax.__version_info__ >= (0, 12):
            results = together(*operands)
        else:
            one_by_one = functools.partial(jax.lax.map, lambda lane: looped(*lane))
            results = jax.lax.platform_dependent(
                operands, cpu=one_by_one, default=lambda all_lanes: together(*all_lanes)
            )
        return results, jax.tree.map(lambda _: True, results)

    return looped


_looped_eigh = lane_by_lane(_eigh)


def damped_inverse(values: jax.Array, damping: jax.Array) -> jax.Array:
    """1 / (eigenvalue + damping), 0 where that is 1 / 0 up to rounding.

    An exactly null eigenvalue counts as the damping, however small; one that the damping cancels
    (an indefinite matrix) is cut like a null eigenvalue of the sum. Values in ascending order.
    """
    shifted = values + damping
    cut = jnp.finfo(values.dtype).eps * values.shape[0] * _largest(values)
    null = (shifted == 0) | ((values != 0) & (jnp.abs(shifted) <= cut))
    return jnp.where(null, 0, 1 / jnp.where(null, 1, shifted))


def _largest(values: jax.Array) -> jax.Array:
    """The largest size of values in ascending order: that of the first or of the last."""
    if values.shape[0] == 0:
        return jnp.zeros((), values.dtype)
    return jnp.maximum(jnp.abs(values[0]), jnp.abs(values[-1]))


def factorize(
    matrix: jax.Array,
    damping: jax.Array,
    *,
    definite: bool = True,
    floor: jax.Array | float = 0.0,
    in_range: bool = False,
    shift: jax.Array | None = None,
    decompose: bool = True,
    unit: jax.Array | float = 1.0,
) -> Factor:
    """Prepares solves with A / unit + damping I.

    Cholesky for damping > 0; the eigendecomposition for damping 0, and where the Cholesky factor is
    not finite or its smallest squared pivot is <= eps times the largest: a singular factor often
    comes out finite and wrong.

    Args:
      matrix: A, symmetric (n, n).
      damping: scalar of A's dtype.
      definite: whether A is positive semi-definite, so that negative eigenvalues are rounding.
      floor: a squared pivot at or below it asks for the eigendecomposition, too.
      in_range: whether solutions by eigendecomposition leave out the null space of A.
      shift: more damping, with which Cholesky tries again before an eigendecomposition is taken;
        for those who iterate with the factor as a preconditioner.
      decompose: False where the caller has another way than the eigendecomposition, and takes it
        where `eigen_taken` tells that this were needed.
      unit: a power of two, divided by where A is read: no array of that size is made for it. All
        else is in units of it.

    Returns:
      A :class:`Factor`.
    """
    n, dtype = matrix.shape[0], matrix.dtype
    upper = _upper_factor(matrix, damping, unit)
    unsound = ~_is_sound(upper, floor)
    shifted = jnp.asarray(False)
    if shift is not None:
        tried = unsound & (damping > 0)

        def once_more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return jnp.asarray(False), _looped_upper_factor(matrix, damping + shift, unit)[0]

        _, upper = jax.lax.while_loop(lambda c: c[0], once_more, (tried, upper))
        shifted = tried & _is_sound(upper, 0.0)
        unsound = unsound & ~shifted
    needed = (damping <= 0) | unsound

    more = 0.0 if shift is None else jnp.where(shifted, shift, 0)
    if not decompose:
        solve = lambda b: jax.scipy.linalg.cho_solve((upper.T, True), b)
        return Factor(solve, needed, damping + more, shifted)

    def run(carry: tuple[jax.Array, Eigen]) -> tuple[jax.Array, Eigen]:
        return jnp.asarray(False), eigen(matrix / unit, definite=definite, looped=True)

    # One matrix to keep: the triangular factor, or the eigenvectors that take its place.
    start = Eigen(jnp.zeros((n,), dtype), upper)
    _, (values, kept) = jax.lax.while_loop(lambda c: c[0], run, (needed, start))

    gains = damped_inverse(values, damping)
    gains = jnp.where(values == 0, 0, gains) if in_range else gains

    def by_eigen(b: jax.Array) -> jax.Array:
        return matvec(kept, gains * matvec(kept.T, b))

    def by_cholesky(b: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((kept.T, True), b)

    solve = lambda b: jax.lax.cond(needed, by_eigen, by_cholesky, b)
    return Factor(solve, needed, damping + more, shifted)


def _upper_factor(matrix: jax.Array, damping: jax.Array, unit: jax.typing.ArrayLike) -> jax.Array:
    damped = matrix / unit + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    # LAPACK's order is column-major: of a symmetric matrix it can have the transpose as it is, and
    # the transpose of its factor crosses loops and branches, all row-major, without a copy.
    return jax.lax.linalg.cholesky(damped.T, symmetrize_input=False).T


_looped_upper_factor = lane_by_lane(lambda *operands: (_upper_factor(*operands),))


def _is_sound(upper: jax.Array, floor: jax.Array | float) -> jax.Array:
    """Whether a Cholesky factor holds more than rounding: no for NaN and infinity, too."""
    pivots = jnp.diagonal(upper) ** 2
    smallest, largest = jnp.min(pivots, initial=jnp.inf), jnp.max(pivots, initial=0)
    sound = (smallest > jnp.finfo(upper.dtype).eps * largest) & (smallest > floor)
    return sound | (upper.shape[0] == 0)


def solve_in_range(
    size: jax.Array,
    damping: jax.Array,
    solve: Callable[[jax.Array], jax.Array],
    b: jax.Array,
    *,
    iterations: int = 64,
) -> jax.Array:
    """A^+ b for b in the range of A, by conjugate gradients preconditioned with (A + damping I)^-1.

    The preconditioned eigenvalues h / (h + damping) cluster at 1, so a few solves suffice; modes
    far below the damping come last and are the first to be given up. Of the preconditioned
    residual z it is known that A z = r - damping z: there are no products with A.

    Args:
      size: a norm of A, positive semi-definite (n, n).
      damping: scalar.
      solve: b -> (A + damping I)^-1 b.
      b: (n,).
      iterations: at most so many.

    Returns:
      A^+ b, (n,).
    """
    eps = jnp.finfo(b.dtype).eps
    rounding = 4 * b.shape[0] * eps * size
    dot = functools.partial(jnp.dot, precision=_HIGHEST)

    class State(NamedTuple):
        x: jax.Array
        r: jax.Array
        p: jax.Array
        ap: jax.Array
        rho: jax.Array
        first: jax.Array
        count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count
        going: jax.Array

    def step(s: State) -> State:
        z = solve(s.r)
        rho = dot(s.r, z)
        beta = jnp.where(s.count > 0, rho / s.rho, 0)
        p, ap = z + beta * s.p, s.r - damping * z + beta * s.ap
        curvature = dot(p, ap)
        # A direction whose curvature is rounding lies in the null space: what is left is noise.
        null = curvature <= rounding * dot(p, p)
        alpha = jnp.where(null, 0, rho / jnp.where(null, 1, curvature))
        first = jnp.where(s.count > 0, s.first, rho)
        going = ~null & (rho > 10 * eps * first)
        return State(s.x + alpha * p, s.r - alpha * ap, p, ap, rho, first, s.count + 1, going)

    def unfinished(s: State) -> jax.Array:
        return s.going & (s.count < iterations)

    zero = jnp.zeros_like(b)
    one = jnp.ones((), b.dtype)
    start = State(zero, b, zero, zero, one, one, jnp.zeros((), jnp.int32), jnp.asarray(True))
    return jax.lax.while_loop(unfinished, step, start).x

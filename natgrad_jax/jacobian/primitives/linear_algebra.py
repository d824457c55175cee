"""Factorisations, solves and Fourier transforms: batched over the leading dimensions."""

from typing import Any

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.primitives.registry import Rule
from natgrad_jax.jacobian.primitives.registry import axis
from natgrad_jax.jacobian.primitives.registry import leading
from natgrad_jax.jacobian.primitives.registry import one
from natgrad_jax.jacobian.primitives.registry import propagate_through
from natgrad_jax.jacobian.primitives.registry import register
from natgrad_jax.jacobian.primitives.registry import require

_matrices = leading(2)


def _triangular(equation: Any, labels: list[Label]) -> Label:
    """Right-hand sides are solved for one by one; so are batches of matrices."""
    label = axis(labels)
    rank = len(_jaxpr.shapes_in(equation)[1])
    side = rank - 1 if _jaxpr.parameter(equation, "left_side") else rank - 2
    if labels[0] is None and label.dim == side:
        return label
    return _matrices(equation, labels, [])[0]


def _fft(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    return leading(len(_jaxpr.parameter(equation, "fft_lengths")))(equation, labels, known)


def _linear_solve(equation: Any, labels: list[Label], known: list[Any]) -> list[Label]:
    """As its solver does, if its operator, which derivatives apply, keeps examples in place."""
    lengths, programs = _jaxpr.linear_solve_parts(equation)
    right, start, parts = labels[sum(lengths) :], 0, []
    for count, program in zip(lengths, programs, strict=True):
        parts.append((labels[start : start + count], program))
        start += count
    operator, transposed, solver, back = parts
    solved = propagate_through(solver[1], solver[0] + right)
    solved = [join("custom_linear_solve", list(pair)) for pair in zip(solved, right, strict=True)]
    for constants, program in (operator, transposed, solver, back):
        if program is not None:
            ends = propagate_through(program, constants + solved)
            pairs = zip(ends, solved, strict=True)
            require(all(join("", list(pair)) == pair[1] for pair in pairs))
    return solved


register("fft", Rule(examples=_fft))
register("triangular_solve", Rule(examples=one(_triangular)))
register("custom_linear_solve", Rule(examples=_linear_solve))
register("tridiagonal_solve", Rule(examples=_matrices))
register(
    """
    cholesky lu eig eigh qr geqrf geqp3 householder_product svd schur hessenberg tridiagonal
    symmetric_product cholesky_update
    """,
    Rule(examples=_matrices),
)
register("lu_pivots_to_permutation", Rule(examples=leading(1)))

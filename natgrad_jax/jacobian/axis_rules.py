"""How each primitive moves the example axis; one without a rule counts as mixing."""

from collections.abc import Callable
from typing import Any

import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.labels import Axis
from natgrad_jax.jacobian.labels import Label
from natgrad_jax.jacobian.labels import Shape
from natgrad_jax.jacobian.labels import join
from natgrad_jax.jacobian.labels import move
from natgrad_jax.jacobian.labels import reshaped


class BlendError(Exception):
    """Raised by a rule when an equation mixes examples."""


def require(condition: bool) -> None:
    """Mixes unless the condition holds."""
    if not condition:
        raise BlendError


def _axis(labels: list[Label]) -> Axis:
    """The one label among operands that must agree on it."""
    label = join("", labels)
    require(isinstance(label, Axis))
    return label  # type: ignore[return-value]


def elementwise(equation: Any, labels: list[Label]) -> Label:
    """Operands of one rank, or scalars."""
    label = _axis(labels)
    for shape, own in zip(_jaxpr.shapes_in(equation), labels, strict=True):
        require(own is None or len(shape) == len(_jaxpr.shapes_out(equation)[0]))
    return label


def _over(key: str) -> Callable[[Any, list[Label]], Label]:
    """Works along the dimensions in a parameter, and leaves the others alone."""

    def rule(equation: Any, labels: list[Label]) -> Label:
        label, over = _axis(labels), _jaxpr.parameter(equation, key)
        over = over if isinstance(over, tuple | list) else (over,)
        require(label.dim not in [int(d) % len(_shape(equation, labels)) for d in over])
        return label

    return rule


def _shape(equation: Any, labels: list[Label]) -> Shape:
    """The shape of the first operand that holds examples."""
    return next(
        s for s, label in zip(_jaxpr.shapes_in(equation), labels, strict=True) if label is not None
    )


def _removing(key: str) -> Callable[[Any, list[Label]], Label]:
    """As `_over`, for dimensions that disappear."""
    over = _over(key)

    def rule(equation: Any, labels: list[Label]) -> Label:
        label = over(equation, labels)
        assert isinstance(label, Axis)
        gone = [int(d) for d in _jaxpr.parameter(equation, key)]
        return move(label, label.dim - sum(d < label.dim for d in gone))

    return rule


def _broadcast(equation: Any, labels: list[Label]) -> Label:
    label = _axis(labels[:1])
    target = int(_jaxpr.parameter(equation, "broadcast_dimensions")[label.dim])
    require(_jaxpr.shapes_out(equation)[0][target] == _jaxpr.shapes_in(equation)[0][label.dim])
    return move(label, target)


def _reshape(equation: Any, labels: list[Label]) -> Label:
    require(_jaxpr.parameter(equation, "dimensions") is None)
    shapes = _jaxpr.shapes_in(equation)[0], _jaxpr.shapes_out(equation)[0]
    return reshaped(_axis(labels[:1]), *shapes)


def _stack(equation: Any, labels: list[Label]) -> Label:
    label, axis = _axis(labels), _jaxpr.parameter(equation, "axis")
    return move(label, label.dim + (axis <= label.dim))


def _transpose(equation: Any, labels: list[Label]) -> Label:
    label = _axis(labels)
    return move(label, list(_jaxpr.parameter(equation, "permutation")).index(label.dim))


def _same_size(equation: Any, labels: list[Label]) -> Label:
    """Slices and updates that leave the example axis whole."""
    label = _axis(labels)
    sizes = {s[label.dim] for s in _jaxpr.shapes_in(equation) if len(s) > label.dim}
    require(sizes == {_jaxpr.shapes_out(equation)[0][label.dim]})
    return label


def _slice(equation: Any, labels: list[Label]) -> Label:
    label = _axis(labels)
    require(_jaxpr.shapes_out(equation)[0][label.dim] == _jaxpr.shapes_in(equation)[0][label.dim])
    return label


def _update(equation: Any, labels: list[Label]) -> Label:
    require(all(label is None for label in labels[2:]))
    return _same_size(equation, labels)


def _dynamic_slice(equation: Any, labels: list[Label]) -> Label:
    require(all(label is None for label in labels[1:]))
    return _slice(equation, labels)


def _pad(equation: Any, labels: list[Label]) -> Label:
    label = _axis(labels)
    require(tuple(_jaxpr.parameter(equation, "padding_config")[label.dim]) == (0, 0, 0))
    return label


def _window(equation: Any, labels: list[Label]) -> Label:
    label = _axis(labels)
    for key in ("window_dimensions", "window_strides"):
        require(_jaxpr.parameter(equation, key)[label.dim] == 1)
    require(tuple(_jaxpr.parameter(equation, "padding")[label.dim]) == (0, 0))
    for key in ("base_dilation", "window_dilation"):
        dilation = equation.params.get(key)
        require(dilation is None or dilation[label.dim] == 1)
    return label


def _leading(trailing: int) -> Callable[[Any, list[Label]], Label]:
    """Works on the last dimensions of every operand, batched over the others."""

    def rule(equation: Any, labels: list[Label]) -> Label:
        label = _axis(labels)
        for shape, own in zip(_jaxpr.shapes_in(equation), labels, strict=True):
            require(own is None or label.dim < len(shape) - trailing)
        return label

    return rule


def _triangular(equation: Any, labels: list[Label]) -> Label:
    """Right-hand sides are solved for one by one; so are batches of matrices."""
    label = _axis(labels)
    rank = len(_jaxpr.shapes_in(equation)[1])
    side = rank - 1 if _jaxpr.parameter(equation, "left_side") else rank - 2
    if labels[0] is None and label.dim == side:
        return label
    return _leading(2)(equation, labels)


def _fft(equation: Any, labels: list[Label]) -> Label:
    return _leading(len(_jaxpr.parameter(equation, "fft_lengths")))(equation, labels)


def _dot(equation: Any, labels: list[Label]) -> Label:
    contract, batch = _jaxpr.parameter(equation, "dimension_numbers")
    ranks = [len(shape) for shape in _jaxpr.shapes_in(equation)[:2]]
    found: list[Label] = []
    for side, label in enumerate(labels[:2]):
        if label is None:
            continue
        assert isinstance(label, Axis)
        require(label.dim not in contract[side])
        if label.dim in batch[side]:
            found.append(move(label, list(batch[side]).index(label.dim)))
            continue
        require(labels[1 - side] is None)
        free = [d for d in range(ranks[side]) if d not in (*contract[side], *batch[side])]
        first = len(batch[0])
        if side == 1:
            first += ranks[0] - len(contract[0]) - len(batch[0])
        found.append(move(label, first + free.index(label.dim)))
    return _axis(found)


def _convolution(equation: Any, labels: list[Label]) -> Label:
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    require(labels[1] is None and _jaxpr.parameter(equation, "batch_group_count") == 1)
    label = _axis(labels)
    require(label.dim == numbers.lhs_spec[0])
    return move(label, numbers.out_spec[0])


def gather(equation: Any, labels: list[Label], known: list[Any] | None) -> Label:
    """Slices that hold whole examples, or one choice for each example."""
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    sizes = _jaxpr.parameter(equation, "slice_sizes")
    operand, out_rank = _jaxpr.shapes_in(equation)[0], len(_jaxpr.shapes_out(equation)[0])
    batched = [d for d in range(out_rank) if d not in numbers.offset_dims]
    window = [
        d
        for d in range(len(operand))
        if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    found: list[Label] = []
    if isinstance(labels[1], Axis):
        found.append(move(labels[1], batched[labels[1].dim]))
    label = labels[0]
    if isinstance(label, Axis):
        if label.dim in numbers.operand_batching_dims:
            place = list(numbers.operand_batching_dims).index(label.dim)
            found.append(move(label, batched[numbers.start_indices_batching_dims[place]]))
        elif label.dim in window and sizes[label.dim] == operand[label.dim]:
            found.append(move(label, numbers.offset_dims[window.index(label.dim)]))
        else:
            counted = _counted_dim(numbers.start_index_map, label, operand, known)
            found.append(move(label, batched[counted]))
    return _axis(found)


def _counted_dim(index_map: Any, label: Axis, operand: Shape, known: list[Any] | None) -> int:
    """The dimension of the indices along which the index into the example axis counts 0, 1, ...

    That is how `x[jnp.arange(N), y]` picks one entry of each example.
    """
    values = None if known is None else known[1]
    require(values is not None and label.dim in index_map)
    column = values[..., list(index_map).index(label.dim)]
    require(not np.ma.is_masked(column) and label.outer == label.inner == 1)
    for dim, size in enumerate(column.shape):
        shape = [size if d == dim else 1 for d in range(column.ndim)]
        if size == operand[label.dim] and np.all(column == np.arange(size).reshape(shape)):
            return dim
    raise BlendError


def _scatter(equation: Any, labels: list[Label]) -> Label:
    numbers = _jaxpr.parameter(equation, "dimension_numbers")
    operand, _, updates = _jaxpr.shapes_in(equation)
    window = [
        d
        for d in range(len(operand))
        if d not in (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    ]
    scattered = [d for d in range(len(updates)) if d not in numbers.update_window_dims]
    pairs = [
        (d, updated)
        for d, updated in zip(window, numbers.update_window_dims, strict=True)
        if operand[d] == updates[updated]
    ]
    batching = list(
        zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    )
    choices = [
        ((labels[0], d), (labels[1], index_dim), (labels[2], scattered[index_dim]))
        for d, index_dim in batching
    ]
    choices += [((labels[0], d), (labels[1], -2), (labels[2], u)) for d, u in pairs]
    for choice in choices:
        if all(label is None or label == move(label, dim) for label, dim in choice):
            return _axis([move(label, choice[0][1]) for label, _ in choice])
    raise BlendError


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp
exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le lgamma log
log1p logistic lt max min mul ne neg nextafter not or polygamma population_count pow
random_gamma_grad real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
sub tan tanh xor zeta name sharding_constraint pvary pcast mesh_cast threefry2x32 random_fold_in
random_clone
"""

#: Work entry by entry.
ELEMENTWISE = frozenset(_ELEMENTWISE.split())

RULES: dict[str, Callable[[Any, list[Label]], Label]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _removing("dimensions"),
    "rev": _over("dimensions"),
    "concatenate": _over("dimension"),
    "split": _over("axis"),
    "stack": _stack,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "sort": _over("dimension"),
    "top_k": _leading(1),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scatter": _scatter,
    "fft": _fft,
    "triangular_solve": _triangular,
    "random_wrap": _leading(1),
    **dict.fromkeys(["random_bits", "random_unwrap", "random_split", "random_seed"], _leading(0)),
    **{f"scatter{kind}": _scatter for kind in ("-add", "_add", "_mul", "-mul", "_min", "_max")},
    **{
        f"reduce_{kind}": _removing("axes")
        for kind in ["sum", "max", "min", "prod", "and", "or", "xor"]
    },
    **{f"arg{kind}": _removing("axes") for kind in ("max", "min")},
    **{f"cum{kind}": _over("axis") for kind in ("sum", "prod", "max", "min", "logsumexp")},
    **{f"reduce_window_{kind}": _window for kind in ("sum", "max", "min")},
    **{
        kind: _leading(2)
        for kind in ["cholesky", "lu", "eigh", "qr", "geqrf", "householder_product", "svd"]
    },
}

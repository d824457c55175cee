"""Whether a model does to one example what it does to it within a batch.

Labels show that examples do not mix. A model may still know the size of its batch (a loss divided
by N) or hold something for each position in it (a dropout mask, a counter): on one example alone it
would be another function. Traces of one example and of the batch show it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.jacobian import _jaxpr
from natgrad_jax.jacobian.primitives.registry import rule_of


def is_free(model: Any, rows: list[int]) -> bool:
    """Whether the model neither knows the size of its batch nor positions within it.

    Args:
      model: the model.
      rows: of each output leaf the rows that an example gives.
    """
    if len(model.groups) > 1 or model.groups[0].size is None:
        return False
    size = model.groups[0].size
    try:
        one, batch = _traced(model, 1), _traced(model, size)
    except Exception:  # a model that accepts batches of its own size alone may raise anything
        return False
    n = len(model.params)
    fixed = [False] * n + [axis is not None for axis in model.groups[0].axes]
    return (
        _has_rows(one, rows)
        and _has_rows(batch, [size * k for k in rows])
        and _alike(one, batch, fixed) is not None
    )


def _has_rows(program: _jaxpr.Program, rows: list[int]) -> bool:
    """Whether outputs have so many rows: some models give all rows whatever batch they get."""
    return [v.aval.shape[0] for v in program.outputs] == rows


def _traced(model: Any, size: int) -> _jaxpr.Program:
    axes = model.groups[0].axes
    batch = []
    for x, axis in zip(model.batch, axes, strict=True):
        shape = list(x.shape)
        if axis is not None:
            shape[axis] = size
        batch.append(jax.ShapeDtypeStruct(tuple(shape), x.dtype))
    return _jaxpr.trace(model.function, model.params, batch)[0]


def _alike(one: _jaxpr.Program, two: _jaxpr.Program, depends: list[bool]) -> list[bool] | None:
    """Which outputs depend on the batch, where two programs differ in sizes alone; else None."""
    if len(one.equations) != len(two.equations):
        return None
    state: dict[Any, bool] = dict(zip(one.inputs, depends, strict=True))
    for (_, a), (_, b) in zip(one.constants, two.constants, strict=True):
        if not _same(a, b):
            return None
    read = lambda v: False if _jaxpr.is_literal(v) else state.get(v, False)
    for first, second in zip(one.equations, two.equations, strict=True):
        results = _equations_alike(first, second, [read(v) for v in first.invars])
        if results is None:
            return None
        state.update(zip(first.outvars, results, strict=True))
    for a, b in zip(one.outputs, two.outputs, strict=True):
        if _jaxpr.is_literal(a) != _jaxpr.is_literal(b):
            return None
    return [read(v) for v in one.outputs]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return jnp.shape(a) == jnp.shape(b)
    return np.shape(a) == np.shape(b) and bool(np.all(np.asarray(a) == np.asarray(b)))


def _equations_alike(first: Any, second: Any, depends: list[bool]) -> list[bool] | None:
    name = _jaxpr.name(first)
    if name != _jaxpr.name(second) or len(first.invars) != len(second.invars):
        return None
    for a, b in zip(first.invars, second.invars, strict=True):
        if _jaxpr.is_literal(a) != _jaxpr.is_literal(b):
            return None
        if _jaxpr.is_literal(a) and not _same(a.val, b.val):
            return None
    inline = rule_of(first).body
    if inline is not None:
        return _alike(inline(first), inline(second), depends)
    if not _same_settings(first, second):
        return None
    for a, b in zip(_jaxpr.inner_programs(first), _jaxpr.inner_programs(second), strict=True):
        if _alike(a, b, [True] * len(a.inputs)) is None:
            return None
    result = any(depends)
    # Something with an entry for each position in the batch; the same everywhere is harmless, until
    # it is reduced to a number that knows how many there are.
    spreads = name == "broadcast_in_dim" or rule_of(first).entrywise
    if not result and _jaxpr.shapes_in(first) != _jaxpr.shapes_in(second) and not spreads:
        return None
    if not (result or spreads) and _jaxpr.shapes_out(first) != _jaxpr.shapes_out(second):
        return None
    return [result] * len(first.outvars)


#: Settings that give sizes of results; all others are the same for every size of the batch.
_SIZES = {"shape", "new_sizes", "slice_sizes", "limit_indices", "sizes"}
_PLAIN = (int, float, complex, str, tuple, type(None))


def _same_settings(first: Any, second: Any) -> bool:
    """Whether two equations differ in sizes alone."""
    if _jaxpr.name(first) == "scan":
        one, two = _jaxpr.loop(first), _jaxpr.loop(second)
        return one.length == two.length or one.num_carries == 0  # a carry knows its position
    for key, a in first.params.items():
        b = second.params.get(key)
        both = isinstance(a, _PLAIN) and isinstance(b, _PLAIN)
        if both and key not in _SIZES and not _jaxpr.inner_programs_of(a) and a != b:
            return False
    return True

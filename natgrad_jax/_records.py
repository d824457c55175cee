"""How records of diagnostics print: one line for each, with words for what was not measured."""

from typing import Any

import jax
import numpy as np

#: Stands in a record for "not measured". It is no NaN, so that `jax_debug_nans` and finiteness
#: checks of states keep working.
NOT_MEASURED = -1.0

#: Fields that are not negative, and what they read where they hold -1 (or 0 for iterations).
_WORDS: dict[str, tuple[float, str]] = {
    "relative_residual": (NOT_MEASURED, "not measured"),
    "outside_row_space": (NOT_MEASURED, "not measured"),
    "acceleration": (NOT_MEASURED, "none"),
    "foretold": (NOT_MEASURED, "none"),
    "iterations": (0, "none"),
}


def line(record: Any) -> str:
    """A record in one line, as its `repr`."""
    parts = (f"{name}={text}" for name, text in texts(record).items())
    return f"{type(record).__name__}({', '.join(parts)})"


def texts(record: Any) -> dict[str, str]:
    """Every field of a record in words."""
    return {name: _text(name, value) for name, value in record._asdict().items()}


def _text(name: str, value: Any) -> str:
    if isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct) or not hasattr(value, "dtype"):
        return str(value)
    entries = np.asarray(value)
    if entries.ndim == 0:
        return _word(name, entries)
    return "[" + ", ".join(_text(name, entry) for entry in entries) + "]"


def _word(name: str, value: np.ndarray) -> str:
    number, word = _WORDS.get(name, (None, ""))
    if value == number:
        return word
    if value.dtype.kind == "b":
        return "yes" if value else "no"
    if name == "predicted" and value < 0:
        return f"{float(value):.4g} (an increase: does the step point uphill?)"
    return str(value) if value.dtype.kind in "iu" else f"{float(value):.4g}"

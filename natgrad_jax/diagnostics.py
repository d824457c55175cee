"""One way to the diagnostics, wherever they stand in a state."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from natgrad_jax import _records
from natgrad_jax.direction import NaturalGradientInfo
from natgrad_jax.transforms._controlled import LevenbergMarquardtInfo
from natgrad_jax.transforms._distance import KLInfo
from natgrad_jax.transforms.scale_by_kl_line_search import KLLineSearchInfo
from natgrad_jax.transforms.scale_by_quadratic_model import QuadraticModelInfo

Tree = Any

#: Records of ours; a field that several have is that of the first.
_KINDS = (
    NaturalGradientInfo,
    LevenbergMarquardtInfo,
    QuadraticModelInfo,
    KLLineSearchInfo,
    KLInfo,
)


@jax.tree_util.register_pytree_node_class
class Diagnostics(Mapping[str, Any]):
    """What :func:`info` found: records by their path in the state, and their fields by name.

    ``diagnostics["[0].info"]`` is the record there, ``diagnostics.damping`` a field: that of the
    natural gradient itself where several kinds of records have it, then of `levenberg_marquardt`,
    of the quadratic model, of the line search and of what is scaled by its KL divergence. It is a
    pytree, so that a compiled step may return it, and prints as a table.
    """

    def __init__(self, records: Mapping[str, Any]) -> None:
        self._records = dict(records)

    def __getitem__(self, path: str) -> Any:
        return self._records[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        for kind in _KINDS:
            found = {p: r for p, r in self.items() if isinstance(r, kind) and name in kind._fields}
            if len(found) > 1:
                raise AttributeError(
                    f"info: {len(found)} records have the field {name!r}; take one by its path:"
                    f" {list(found)}"
                )
            if found:
                return getattr(next(iter(found.values())), name)
        fields = dict.fromkeys(field for record in self.values() for field in record._fields)
        raise AttributeError(f"info: no record has the field {name!r}; there are {list(fields)}")

    def __repr__(self) -> str:
        return "\n".join(_table(path, record) for path, record in self.items())

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """As a pytree: the records, beside their paths."""
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], records: tuple[Any, ...]) -> "Diagnostics":
        """From records and their paths."""
        return cls(dict(zip(paths, records, strict=True)))


def _table(path: str, record: Any) -> str:
    if type(record) not in _KINDS:
        return f"state{path}: {record}"
    texts = _records.texts(record)
    width = max(map(len, texts))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in texts.items()]
    return "\n".join([f"{type(record).__name__} at state{path}", *lines])


def info(state: Tree) -> Diagnostics:
    r"""Finds the diagnostics of this package in any optax state.

    .. math::
        \text{state} \mapsto \{\text{path} \mapsto \text{record}\}

    for every record of ours: :class:`NaturalGradientInfo` of a solve, and those of
    :func:`levenberg_marquardt`, :func:`scale_by_quadratic_model`, :func:`scale_by_kl_line_search`,
    :func:`scale_to_kl` and :func:`clip_by_kl`.

    Args:
      state: a state, or anything that holds one: inside ``optax.chain``, ``masked``, ``partition``,
        ``inject_hyperparams``, ``MultiSteps`` and other wrappers, a flax ``TrainState`` or
        ``nnx.Optimizer``, a state of numpyro or optimistix. Records that became mappings of the
        same names (``nnx.state``, checkpoints) are found too.

    Returns:
      A :class:`Diagnostics`: records by path, fields by name, such as ``info(state).damping``.
      Numbers that a solver does not measure are -1, and print as "not measured". Within `jax.jit`
      fields are traced arrays.

    Raises:
      ValueError: there are none.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: x @ p)
      >>> x, p = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones((2,))
      >>> tx = optax.chain(optax.clip(1.0), ng.natural_gradient(0.1, metric, max_kl=0.5))
      >>> _, state = tx.update(p, tx.init(p), p, batch=x)
      >>> diagnostics = ng.info(state)
      >>> list(diagnostics), round(float(diagnostics.damping), 6)
      (['[1][0].info', '[1][2].info'], 0.001)
      >>> bool(diagnostics.relative_residual < 1e-5), bool(diagnostics.factor == 1)
      (True, True)
    """
    found = {
        jax.tree_util.keystr(path): _record(x)
        for path, x in jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda x: _kind(x) is not None
        )
        if _kind(x) is not None
    }
    if not found:
        raise ValueError(
            f"info: no diagnostics of natgrad_jax in this state, a {type(state).__name__} of"
            f" {jax.tree.structure(state)}; pass the state that `init` or `update` of a"
            " transformation returned, or what holds it"
        )
    return Diagnostics(found)


def _kind(x: Any) -> Any:
    """The kind of record that something is, None for anything else.

    Frameworks and checkpoints may turn named tuples into mappings with the same names.
    """
    if isinstance(x, Mapping):
        return next((kind for kind in _KINDS if set(x) == set(kind._fields)), None)
    return type(x) if isinstance(x, _KINDS) else None


def _record(x: Any) -> Any:
    """A record whose fields may be held in variables of a framework."""
    fields = x if isinstance(x, Mapping) else x._asdict()
    return _kind(x)(**{name: jax.tree.leaves(field)[0] for name, field in fields.items()})

"""A report on how the rows of every parameter are held, and what their Gram matrix costs."""

import html
import math
from typing import Any, NamedTuple

import jax

from natgrad_jax import _boundary
from natgrad_jax import _trees
from natgrad_jax import _unseen
from natgrad_jax.curvature import curvature
from natgrad_jax.jacobian import assemble
from natgrad_jax.jacobian import gram
from natgrad_jax.jacobian import parts as rows_found
from natgrad_jax.jacobian import plan
from natgrad_jax.jacobian.blocks import Block
from natgrad_jax.jacobian.factored import Factor
from natgrad_jax.jacobian.joined import leaves_behind
from natgrad_jax.jacobian.kronecker import Kronecker
from natgrad_jax.jacobian.plan import Plan
from natgrad_jax.metrics import Metric
from natgrad_jax.solvers import Solver
from natgrad_jax.solvers._kronecker import MAX_ROWS

Tree = Any


class LeafReport(NamedTuple):
    """How the rows of one parameter are held.

    Attributes:
      path: of the parameter.
      shape: of the parameter.
      form: "factored", "look-up", "rows" (entered elementwise: rows are cotangents), "dense" or
        "none" (no output depends on it).
      uses: number of uses found.
      positions: positions T at which one example uses it.
      reason: why it is dense; empty otherwise.
      bytes: memory of what is held. What several parameters share (those joined into one array,
        real and imaginary parts) counts at the first of them.
      operations: multiplications of its share of the Gram matrix; likewise.
      block: its blocks in `kfac` or `ekfac`; empty for any other solver.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    uses: int
    positions: int
    reason: str
    bytes: int
    operations: int
    block: str = ""


class Explanation(NamedTuple):
    """What :func:`explain` returns; prints as a table.

    Attributes:
      leaves: one report for each parameter, in tree order.
      rows: M, the rows of R.
      parameters: P.
      mode: "examples": examples were shown to be independent; "vouched": `independent=True` at
        the metric claims it; "whole": rows come from the whole batch.
      reason: why the mode is "whole" although the batch holds examples; empty otherwise.
    """

    leaves: tuple[LeafReport, ...]
    rows: int
    parameters: int
    mode: str
    reason: str

    @property
    def bytes(self) -> int:
        """Memory of all that is held."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def operations(self) -> int:
        """Multiplications of the Gram matrix."""
        return sum(leaf.operations for leaf in self.leaves)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Parameters that F does not see: outputs do not depend on them but by `stop_gradient`."""
        return tuple(leaf.path for leaf in self.leaves if leaf.form == "none")

    def _table(self) -> list[list[str]]:
        head = ["parameter", "shape", "form", "uses", "positions", "memory", "Gram", "why dense"]
        lines = [
            [
                leaf.path,
                "x".join(map(str, leaf.shape)) or "scalar",
                leaf.form,
                str(leaf.uses),
                str(leaf.positions),
                _short(leaf.bytes, "B"),
                _short(leaf.operations, ""),
                leaf.reason,
            ]
            for leaf in self.leaves
        ]
        total = ["total", str(self.parameters), "", "", "", _short(self.bytes, "B")]
        table = [head, *lines, [*total, _short(self.operations, ""), ""]]
        blocks = ["block", *(leaf.block for leaf in self.leaves), ""]
        if not any(blocks[1:]):
            return table
        return [[*line, block] for line, block in zip(table, blocks, strict=True)]

    def _summary(self) -> str:
        how = {
            "examples": "examples are independent (shown): one pass over the batch gives all rows",
            "vouched": "examples are independent (claimed by `independent=True`)",
            "whole": "rows come from the whole batch, a backward pass for each",
        }[self.mode]
        why = f": {self.reason}" if self.reason else ""
        summary = f"{self.rows} rows, {self.parameters} parameters; {how}{why}"
        if not self.unseen:
            return summary
        return (
            f"{summary}\nno output depends on {', '.join(self.unseen)}: F is zero there, and their"
            " gradient is only divided by the damping"
        )

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        return "\n".join([self._summary(), *(line.rstrip() for line in lines)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        cell = lambda tag, text: f"<{tag} style='text-align:left'>{html.escape(text)}</{tag}>"
        head, *lines = self._table()
        rows = ["".join(cell("th", c) for c in head)]
        rows += ["".join(cell("td", c) for c in line) for line in lines]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<p>{html.escape(self._summary())}</p><table>{body}</table>"


def explain(metric: Metric, params: Tree, batch: Tree, solver: Solver | None = None) -> Explanation:
    r"""Tells how the rows of every parameter are held, and why where they are dense.

    A parameter that enters linearly has rows in factored form,
    :math:`\sum_t a_{nt} \otimes g_{nt}`, from one forward pass and one backward pass for each
    output column; of one that enters elementwise the rows are the cotangents themselves. What the
    reader has no rule for (a branch that a parameter enters, mutable references) is held as M x P_l
    dense rows. All of them are exact; :func:`verify` measures it.

    Args:
      metric: a metric that has rows.
      params: parameters, a pytree of real arrays with P numbers.
      batch: pytree of arrays, as the metric's model takes it. Only shapes are used.
      solver: `kfac(...)` or `ekfac(...)` adds a column with the blocks that it makes; others add
        nothing.

    Returns:
      An :class:`Explanation`: one line for each parameter, and a total; it prints as a table.

    Raises:
      ValueError: the metric has no rows, or ``solver`` is none.

    Examples:
      >>> import jax.numpy as jnp, natgrad_jax as ng
      >>> metric = ng.gauss_newton(lambda p, x: jnp.tanh(x @ p["w"]) + jnp.outer(x[:, 0], p["b"]))
      >>> params = {"b": jnp.ones(3), "w": jnp.ones((2, 3))}
      >>> report = ng.explain(metric, params, jnp.ones((5, 2)))
      >>> [(leaf.path, leaf.form, leaf.positions) for leaf in report.leaves]
      [("['b']", 'rows', 1), ("['w']", 'factored', 1)]
      >>> report.mode
      'examples'
    """
    _boundary.check_metric("explain", metric)
    _boundary.check_params("explain", params)
    _boundary.check_batch("explain", batch)
    if solver is not None and not isinstance(solver, Solver):
        raise ValueError(f"explain: unknown solver {solver!r}; take kfac(batch) or ekfac(batch)")
    if metric.output_metric is None or metric.outputs is None or metric.groups is None:
        raise ValueError(f"explain: the metric {metric.name} has no rows")
    groups, dtype = metric.groups(batch), _trees.work_dtype(params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unused = _unseen.unused(metric, params, batch)
    found: list[Explanation] = []

    def explained(params: Tree, batch: Tree) -> None:
        key = jax.random.key(0) if metric.needs_key else None
        outputs = metric.output_metric(metric.outputs(params, batch), batch, key)
        model = plan.flatten(metric.name, metric.outputs, params, batch, groups)
        made = plan.plan(model, outputs.coefficients, metric.independent)
        made, factors = rows_found.factors_of(model, made, outputs, dtype)
        leaves = enumerate(zip(paths, model.params, strict=True))
        reports = [_leaf(path, i, leaf.shape, factors, made) for i, (path, leaf) in leaves]
        reports = [r._replace(form="none") if r.path in unused else r for r in reports]
        count = sum(group.examples * group.columns for group in made.rows)
        size = _trees.size(params)
        found.append(Explanation(tuple(reports), count, size, made.mode, made.reason or ""))

    jax.eval_shape(explained, params, batch)
    if solver is None or solver.name not in ("kfac", "ekfac"):
        return found[0]
    blocks = _blocks_of(metric, params, batch, paths)
    pairs = zip(found[0].leaves, blocks, strict=True)
    return found[0]._replace(leaves=tuple(leaf._replace(block=block) for leaf, block in pairs))


def _blocks_of(metric: Metric, params: Tree, batch: Tree, paths: list[str]) -> list[str]:
    """For each parameter the blocks that Kronecker-factored solvers put it in."""
    found: list[list[str]] = []

    def read(params: Tree, batch: Tree) -> None:
        key = jax.random.key(0) if metric.needs_key else None
        found.append(_block_texts(curvature(metric, params, batch, key).kronecker(), paths))

    jax.eval_shape(read, params, batch)
    return found[0]


def _block_texts(kronecker: Kronecker, paths: list[str]) -> list[str]:
    texts: list[list[str]] = [[] for _ in paths]
    for block, leaves in zip(kronecker.blocks, kronecker.leaves, strict=True):
        for leaf in leaves:
            others = ", ".join(paths[i] for i in leaves if i != leaf)
            text = _block_text(block) + (f" with {others}" if others else "")
            if kronecker.positions_apart and block.kind != "rows":
                text += ", one backward pass for all rows"
            if text not in texts[leaf]:
                texts[leaf].append(text)
    return ["; ".join(own) or "none" for own in texts]


def _block_text(block: Block) -> str:
    b, p, q = block.shape
    copies = f"{b} x " if b > 1 else ""
    if block.kind == "rows":
        return f"exact block {q}" if q <= MAX_ROWS else f"exact diagonal {q}"
    inputs = f"diagonal {p}" if block.kind == "look-up" else str(p)
    return f"{copies}kronecker {inputs} (x) {q}"


def _leaf(
    path: str, index: int, shape: tuple[int, ...], factors: list[Factor], made: Plan
) -> LeafReport:
    joined = {root: j for r in made.readings for root, j in r.joined.items()}
    behind = lambda factor: leaves_behind(factor.place.leaf, joined)
    everything = [factor for factor in factors if index in behind(factor)]
    # What several parameters share is put down to the first of them.
    own = [factor for factor in everything if behind(factor)[0] == index]
    parts = [part for factor in own for part in factor.parts if part is not None]
    sites = [
        site
        for reading in made.readings
        for site in reading.sites
        if index in reading.sources[site.view.root]
    ]
    operations = sum(_gram_operations(factor) for factor in own)
    held = sum(_bytes(x) for part in parts for x in part if x is not None)
    positions = max((p.positions for f in everything for p in f.parts if p is not None), default=0)
    form, reason = _form(index, everything, made)
    return LeafReport(path, shape, form, len(sites), positions, reason, held, operations)


def _form(index: int, own: list[Factor], made: Plan) -> tuple[str, str]:
    if not own:
        return "none", ""
    for reading in made.readings:
        if index in reading.opaque:
            return "dense", reading.opaque[index]
        sites = [s for s in reading.sites if index in reading.sources[s.view.root]]
        if any(site.view.root in reading.derived for site in sites):
            return "dense", "something computed from it is used"
        shapes = {i: leaf.shape for i, leaf in enumerate(reading.leaves)}
        if any(site.view.root in reading.joined for site in sites):
            continue
        places = [assemble.place_of(site, shapes[site.view.root]) for site in sites]
        if assemble.groups_of_places(places) is None:
            return "dense", "its uses overlap in part"
    parts = [part for factor in own for part in factor.parts if part is not None]
    if any(part.looks_up for part in parts):
        return "look-up", ""
    return ("rows", "") if all(part.left is None for part in parts) else ("factored", "")


def _gram_operations(factor: Factor) -> int:
    parts = [part for part in factor.parts if part is not None]
    return sum(
        min(gram.cost(factor.place, one, two)) for i, one in enumerate(parts) for two in parts[i:]
    )


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _short(number: int, unit: str) -> str:
    value = float(number)
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} T{unit}"

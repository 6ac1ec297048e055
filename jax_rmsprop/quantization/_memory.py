"""Count the bytes that a training stores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from jax_rmsprop import _markdown
from jax_rmsprop.quantization._quantize import is_field, path_leaves


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The bytes that a training stores; prints as a table.

    Attributes:
      rows: the bytes by column, for each leaf of the parameters and for the rest:
        "parameters", "gradients" (in the parameters' dtypes), and the fields of the
        optimizer's state.
    """

    rows: Mapping[str, Mapping[str, int]]

    @property
    def total(self) -> dict[str, int]:
        """The bytes of each column."""
        columns = dict.fromkeys(c for row in self.rows.values() for c in row)
        return {c: sum(row.get(c, 0) for row in self.rows.values()) for c in columns}

    def __str__(self) -> str:
        """The table, in Markdown."""
        total = self.total
        lines = [["bytes", *total]]
        for name, row in [*self.rows.items(), ("total", total)]:
            lines.append([name, *(f"{row.get(c, 0):,}" for c in total)])
        return _markdown.table(lines, numbers=True)

    _repr_markdown_ = __str__


def memory_report(optimizer: optax.GradientTransformation, params: Any) -> MemoryReport:
    """Count the bytes of parameters, gradients and an optimizer's state.

    Nothing is allocated.

    Args:
      optimizer: any Optax transformation.
      params: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      A report with a row for each leaf of the parameters and one for the rest, such as
      a count.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import memory_report, quantize_state, uint8
      >>> params = {"w": jnp.ones((1000, 1000))}
      >>> optimizer = quantize_state(rmsprop(0.01), {"nu": uint8()})
      >>> print(memory_report(optimizer, params))
      | bytes | parameters | gradients |        nu | count | bases |
      | ----- | ---------- | --------- | --------- | ----- | ----- |
      | ['w'] |  4,000,000 | 4,000,000 | 1,000,000 |     0 |     0 |
      | other |          0 |         0 |         0 |     8 |     8 |
      | total |  4,000,000 | 4,000,000 | 1,000,000 |     8 |     8 |
    """
    rows: dict[str, dict[str, int]] = {}

    def add(row: str, column: str, x: Any) -> None:
        size = math.prod(x.shape) * x.dtype.itemsize
        cells = rows.setdefault(row, {})
        cells[column] = cells.get(column, 0) + size

    shapes: dict[Any, tuple[int, ...]] = {}
    for path, x in path_leaves(params):
        shapes[path] = x.shape
        for column in ("parameters", "gradients"):
            add(keystr(path) or "the root", column, x)
    for path, x in path_leaves(jax.eval_shape(optimizer.init, params)):
        row, last = None, "state"
        for i, key in enumerate(path):
            if not is_field(key):
                continue
            # The path of a parameter follows the name of a field that mirrors them.
            rest = path[i + 1 :]
            inside = [n for n in shapes if rest[: len(n)] == n]
            if inside and x.shape == shapes[inside[0]]:
                row = keystr(inside[0]) or "the root"
            last = key.name if row is None or inside else last
        add(row or "other", last, x)
    if "other" in rows:
        rows["other"] = rows.pop("other")
    return MemoryReport(rows)

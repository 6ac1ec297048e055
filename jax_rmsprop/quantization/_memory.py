"""Count the bytes that a training stores."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jax_rmsprop import _markdown
from jax_rmsprop.quantization._quantize import is_field, path_leaves


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The bytes that a training stores; prints as a table.

    Attributes:
      total: the bytes of "parameters", of "gradients" (in the parameters' dtypes), and
        of each field of the optimizer's state.
    """

    total: Mapping[str, int]

    def __str__(self) -> str:
        """The table, in Markdown."""
        rows = [*self.total.items(), ("all", sum(self.total.values()))]
        cells = [["", "bytes"], *([name, f"{size:,}"] for name, size in rows)]
        return _markdown.table(cells, numbers=True)

    _repr_markdown_ = __str__


def memory_report(optimizer: optax.GradientTransformation, params: Any) -> MemoryReport:
    """Count the bytes of parameters, gradients and an optimizer's state.

    Nothing is allocated.

    Args:
      optimizer: any Optax transformation.
      params: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      The bytes by field of the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import memory_report, quantize_state, uint8
      >>> params = {"w": jnp.ones((1000, 1000))}
      >>> optimizer = quantize_state(rmsprop(0.01), {"nu": uint8()})
      >>> print(memory_report(optimizer, params))
      |            |     bytes |
      | ---------- | --------- |
      | parameters | 4,000,000 |
      | gradients  | 4,000,000 |
      | count      |         8 |
      | nu         | 1,000,000 |
      | bases      |         8 |
      | all        | 9,000,016 |
    """
    total, parameters = collections.Counter[str](), dict(path_leaves(params))
    for x in parameters.values():
        for name in ("parameters", "gradients"):
            total[name] += math.prod(x.shape) * x.dtype.itemsize
    for path, x in path_leaves(jax.eval_shape(optimizer.init, params)):
        fields = [i for i, key in enumerate(path) if is_field(key)]
        # Parameters may have fields, too: theirs follow the state's.
        mirrors = [i for i in fields if path[i + 1 :] in parameters]
        place = mirrors[:1] or fields[-1:]
        name = path[place[0]].name if place else "state"
        total[name] += math.prod(x.shape) * x.dtype.itemsize
    return MemoryReport(dict(total))

"""The largest code of each array: the only reduction over a whole array."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The size of a GPU's warp, which reduces rows of at least this length.
_ROW = 32


def largest_codes(
    codes: Sequence[jax.Array], parameters: Sequence[Hashable]
) -> jax.Array:
    """Find the largest magnitude of each array of codes.

    Args:
      codes: arrays of integers, one or more.
      parameters: the parameter of each array.

    Returns:
      int32 of shape (arrays,).

    Each platform has the form that its compiler turns into the fewest kernels and bytes
    moved; the numbers are the same.
    """
    # Without the barriers a GPU's compiler splits the loop of the step, which reads the
    # codes, too.
    kept = [lax.optimization_barrier(x) for x in codes]
    return lax.platform_dependent(
        *kept,
        cpu=_as_they_are,
        tpu=functools.partial(_as_int32, parameters),
        default=functools.partial(_by_rows, parameters),
    )


def _as_they_are(*codes: jax.Array) -> jax.Array:
    """For a CPU, which would copy the codes to compare them as int32."""

    def largest(x: jax.Array) -> jax.Array:
        most = x.max().astype(jnp.int32)
        if not jnp.issubdtype(x.dtype, jnp.signedinteger):
            return most
        return jnp.maximum(most, -x.min().astype(jnp.int32))

    return jnp.stack([largest(x) for x in codes])


def _as_int32(parameters: Sequence[Hashable], *codes: jax.Array) -> jax.Array:
    """For a TPU, which would copy two-dimensional int8 arrays to compare them.

    The arrays of a parameter are read in one pass.
    """
    sizes = [jnp.abs(x.astype(jnp.int32)) for x in codes]
    largest: list[Any] = [None] * len(sizes)
    for same in _groups(zip(parameters, map(jax.typeof, sizes), strict=True)):
        zeros = [jnp.int32(0)] * len(same)
        found = lax.reduce(
            [sizes[i] for i in same],
            zeros,
            lambda a, b: [lax.max(x, y) for x, y in zip(a, b, strict=True)],
            range(sizes[same[0]].ndim),
        )
        for i, value in zip(same, found, strict=True):
            largest[i] = value
    return jnp.stack(largest)


def _by_rows(parameters: Sequence[Hashable], *codes: jax.Array) -> jax.Array:
    """For a GPU: one kernel for all arrays of a parameter, and one for all of a shape.

    A full reduction takes two kernels for each array: over its parts, and over these.
    So the parts are rows, and their maxima are stacked. Arrays of one parameter are
    read together; those of another may be on other devices, and would be moved.
    """
    sizes = [jnp.abs(x.astype(jnp.int32)) for x in codes]
    rows: list[Any] = [None] * len(sizes)
    for same in _groups(zip(parameters, map(jax.typeof, sizes), strict=True)):
        for i, part in zip(same, _max_of_rows([sizes[i] for i in same]), strict=True):
            rows[i] = part
    largest: list[Any] = [None] * len(sizes)
    for same in _groups(map(jax.typeof, rows)):
        stacked = jnp.stack([rows[i] for i in same])
        found = stacked.max(axis=tuple(range(1, stacked.ndim)))
        for place, i in enumerate(same):
            largest[i] = found[place]
    return jnp.stack(largest)


def _max_of_rows(xs: list[jax.Array]) -> jax.Array:
    """The maxima of the rows of arrays of one shape; full maxima if rows are short."""
    x = jnp.stack(xs)
    long = x.ndim > 2 and x.shape[-1] >= _ROW
    return x.max(axis=-1 if long else tuple(range(1, x.ndim)))


def _groups(keys: Any) -> list[list[int]]:
    """The positions of equal keys."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())

"""The largest code of each array: the one thing that is computed of a whole array."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# A GPU's warp, which reduces a row of this many or more.
_ROW = 32


def largest_codes(
    codes: Sequence[jax.Array], parameters: Sequence[Hashable]
) -> jax.Array:
    """Find the largest magnitude of each array of codes.

    Args:
      codes: arrays of integers, one or more.
      parameters: for each array which parameter it belongs to.

    Returns:
      int32 of shape (arrays,).

    Each platform gets what its compiler makes the fewest kernels of, and moves the
    fewest bytes for; the numbers are the same.
    """
    # Without the barriers a GPU's compiler splits the loop of the step, which reads the
    # codes too.
    kept = [lax.optimization_barrier(x) for x in codes]
    return lax.platform_dependent(
        *kept,
        cpu=_as_they_are,
        tpu=functools.partial(_as_int32, parameters),
        default=functools.partial(_by_rows, parameters),
    )


def _as_they_are(*codes: jax.Array) -> jax.Array:
    """For a CPU, which copies what it compares as integers of 32 bits."""

    def largest(x: jax.Array) -> jax.Array:
        most = x.max().astype(jnp.int32)
        if not jnp.issubdtype(x.dtype, jnp.signedinteger):
            return most
        return jnp.maximum(most, -x.min().astype(jnp.int32))

    return jnp.stack([largest(x) for x in codes])


def _as_int32(parameters: Sequence[Hashable], *codes: jax.Array) -> jax.Array:
    """For a TPU, which copies bytes of two dimensions to compare them.

    Arrays of one parameter are read in one pass.
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

    A maximum of everything is two kernels for each array: of its parts, and of these.
    So rows are the parts, whose maxima are stacked. Arrays of one parameter are read
    at once; those of others may be on other devices, and would be moved to these.
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
    """The maxima of the rows of arrays of one shape; of all, where rows are short."""
    x = jnp.stack(xs)
    long = x.ndim > 2 and x.shape[-1] >= _ROW
    return x.max(axis=-1 if long else tuple(range(1, x.ndim)))


def _groups(keys: Any) -> list[list[int]]:
    """The positions of equal keys."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())

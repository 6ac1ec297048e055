"""The random numbers by which codes are rounded."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

# The hashes change after this number of steps.
_DITHER_PERIOD = np.uint32(32)


def dither_starts(leaves: int, count: ArrayLike, seed: ArrayLike) -> jax.Array:
    """Hash the number of each leaf at a step.

    Args:
      leaves: how many.
      count: the step.
      seed: as for `quantize_state`.

    Returns:
      For each leaf what its `dither` starts from, uint32 of shape (leaves,).

    Example:
      >>> dither_starts(2, 0, 0).shape
      (2,)
    """
    shared = jnp.asarray(seed).astype(jnp.uint32)
    for number in (
        jnp.arange(leaves, dtype=jnp.uint32),
        _step(count) // _DITHER_PERIOD,
    ):
        shared = _hash(shared) + number
    return _hash(shared)


def dither(
    shape: tuple[int, ...],
    start: jax.Array,
    count: ArrayLike,
    *,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Make the random numbers by which an array's elements are rounded at a step.

    Args:
      shape: the array's.
      start: that of its leaf, of `dither_starts`, uint32 of shape ().
      count: the step.
      out_sharding: the array's, on a mesh with explicit axes.

    Returns:
      uint32 numbers of that shape, all equally likely, in units of 2^-32.

    Example:
      >>> dither((3,), dither_starts(1, 0, 0)[0], 0).dtype
      dtype('uint32')
    """
    # The element's position is added axis by axis: summed up by itself, it is an array
    # that two leaves share, and a TPU's compiler does not merge their loops then.
    position = start
    for axis in range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out_sharding)
        position += index * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    # 2^32 divided by the golden ratio.
    return _hash(position) + _step(count) * jnp.uint32(0x9E3779B9)


def _step(count: ArrayLike) -> jax.Array:
    return jnp.asarray(count).astype(jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """Mix the bits; the constants are those of Wellons' "lowbias32"."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

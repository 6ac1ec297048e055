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


def dither(
    shape: tuple[int, ...],
    leaf: int,
    count: ArrayLike,
    seed: ArrayLike,
    *,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Make the random numbers by which an array's elements are rounded at a step.

    Args:
      shape: the array's.
      leaf: its number in the state.
      count: the step.
      seed: as for `quantize_state`.
      out_sharding: the array's, on a mesh with explicit axes.

    Returns:
      uint32 numbers of that shape, all equally likely, in units of 2^-32.

    Example:
      >>> dither((3,), 0, 0, 0).dtype
      dtype('uint32')
    """
    step = jnp.asarray(count).astype(jnp.uint32)
    shared = jnp.asarray(seed).astype(jnp.uint32)
    for number in (jnp.uint32(leaf), step // _DITHER_PERIOD):
        shared = _hash(shared) + number
    # The element's position is added axis by axis: summed up by itself, it is an array
    # that two leaves share, and a TPU's compiler does not merge their loops then.
    position = _hash(shared)
    for axis in range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out_sharding)
        position += index * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    # 2^32 divided by the golden ratio.
    return _hash(position) + step * jnp.uint32(0x9E3779B9)


def _hash(x: jax.Array) -> jax.Array:
    """Mix the bits; the constants are those of Wellons' "lowbias32"."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

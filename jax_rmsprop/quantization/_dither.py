"""The random numbers by which codes are rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# The hashes change after this number of steps.
_DITHER_PERIOD = np.uint32(32)


def dither(
    shape: tuple[int, ...], leaf: int, count: ArrayLike, seed: ArrayLike
) -> jax.Array:
    """Make the random numbers by which an array's elements are rounded at a step.

    Args:
      shape: the array's.
      leaf: its number in the state.
      count: the step.
      seed: as for `quantize_state`.

    Returns:
      uint32 numbers of that shape, all equally likely, in units of 2^-32.

    Example:
      >>> dither((3,), 0, 0, 0).dtype
      dtype('uint32')
    """
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    step = jnp.asarray(count).astype(jnp.uint32)
    shared = jnp.asarray(seed).astype(jnp.uint32)
    for number in (jnp.uint32(leaf), step // _DITHER_PERIOD):
        shared = _hash(shared) + number
    # 2^32 divided by the golden ratio.
    return _hash(position + _hash(shared)) + step * jnp.uint32(0x9E3779B9)


def _hash(x: jax.Array) -> jax.Array:
    """Mix the bits; the constants are those of Wellons' "lowbias32"."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

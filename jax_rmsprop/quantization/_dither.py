"""The random numbers of the rounding."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

# The hashes change after this many steps.
_DITHER_PERIOD = np.uint32(32)

# The fields of an element with the hash h use h, h * m, h * m^2, ... modulo 2^32. Each
# is as uniform as h. So are pairs and triples of them: like the points of a linear
# congruential generator they lie on a lattice, which for this multiplier is fine in
# every direction (lines are at most 2^-15 apart, planes at most 2^-10).
_MULTIPLIER = 0x8649A765


def dither_starts(leaves: int, count: ArrayLike, seed: ArrayLike) -> jax.Array:
    """Hash the number of each parameter at a step.

    Args:
      leaves: the number of parameters.
      count: the step.
      seed: as in `quantize_state`.

    Returns:
      The `start` of each parameter's `dither`, uint32 of shape (leaves,).

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
    field: int = 0,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Generate the random numbers that round an array's elements at a step.

    Args:
      shape: the array's shape.
      start: its parameter's element of `dither_starts`, uint32 of shape ().
      count: the step.
      field: the number of the array among its parameter's, >= 0. All fields derive
        their numbers from one hash of the element, and are independent of each other.
      out_sharding: the array's sharding, on a mesh with explicit axes.

    Returns:
      Uniform uint32 numbers of that shape, in units of 2^-32.

    Example:
      >>> dither((3,), dither_starts(1, 0, 0)[0], 0).dtype
      dtype('uint32')
    """
    return field_dither(element_hashes(shape, start, out_sharding), count, field)


def element_hashes(
    shape: tuple[int, ...], start: jax.Array, out_sharding: NamedSharding | None
) -> jax.Array:
    """Hash the position of each element; the costly part of a dither."""
    # Add the element's position axis by axis: its sum would be an array that two leaves
    # share, and a TPU's compiler would not fuse their loops.
    position = start
    for axis in range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out_sharding)
        position += index * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return _hash(position)


def field_dither(hashes: jax.Array, count: ArrayLike, field: int) -> jax.Array:
    """The dither of one field, from the hashes that its parameter's fields share."""
    # 2^32 / golden ratio.
    golden = _step(count) * jnp.uint32(0x9E3779B9)
    return hashes * jnp.uint32(pow(_MULTIPLIER, field, 2**32)) + golden


def _step(count: ArrayLike) -> jax.Array:
    return jnp.asarray(count).astype(jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """Mix the bits, with the constants of Wellons' "lowbias32"."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

"""The ways to keep an array in fewer bits: each two functions, to codes and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_rmsprop import _validate


class Codes(NamedTuple):
    """An array as a storage keeps it.

    Attributes:
      codes: of the array's shape, in fewer bits; of one dtype, which is not float32.
      base: what the whole array shares, int32 of shape (); None if nothing.
    """

    codes: Any
    base: Any


@dataclasses.dataclass(frozen=True)
class Storage:
    """A way to keep an array between steps: two pure functions, and a least size.

    Attributes:
      encode: (x, threshold, old) -> Codes. `x` is a float32 array; `threshold` are
        uint32 numbers of its shape, all equally likely, by which to round; `old` are
        the `Codes` that the new ones replace, None at first.
      decode: Codes -> x.
      min_size: an array with fewer elements is kept as it is. So is one that is not
        float32, such as the mean of complex gradients.
    """

    encode: Callable[[jax.Array, jax.Array, Codes | None], Codes]
    decode: Callable[[Codes], jax.Array]
    min_size: float = 0


# By the names of a state's fields.
Storages = Mapping[str, Storage]


def full() -> Storage:
    """Every array as it is: what a field gets that is not named.

    Example:
      >>> full().min_size
      inf
    """
    return Storage(_encode_full, _decode_full, math.inf)


def _encode_full(x: jax.Array, threshold: jax.Array, old: Codes | None) -> Codes:
    del threshold, old
    return Codes(x, None)


def _decode_full(stored: Codes) -> jax.Array:
    return stored.codes


def bfloat16(min_size: int = 0) -> Storage:
    """Two bytes a number, of either sign: float32's range with 8 bits of precision.

    Args:
      min_size: an array with fewer elements is kept as it is, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is no such integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop, storage
      >>> optimizer = storage.stored(rmsprop(0.01), {"nu": storage.bfloat16()})
      >>> state = optimizer.init(jnp.ones(3))
      >>> state.inner_state[1].nu.dtype
      dtype(bfloat16)
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Storage(_encode_bfloat16, _decode_bfloat16, size)


def _encode_bfloat16(x: jax.Array, threshold: jax.Array, old: Codes | None) -> Codes:
    del old
    # To add a fraction of the last bit kept, and to cut, is to round up with the right
    # probability, whatever the sign; a carry goes into the exponent, as it should.
    bits = (_bits(x) + _fraction(threshold, 16)) >> 16
    return Codes(lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.bfloat16), None)


def _decode_bfloat16(stored: Codes) -> jax.Array:
    return stored.codes.astype(jnp.float32)


# In one byte a code is the upper bits of a float32, its exponent and three bits of its
# mantissa, less a base that the leaf shares: no table, no logarithm, no division. Code
# 0 is 0. An octave is eight codes. On a number: 0.15625 is 1.25 * 2^-3, so as a float32
# it has a sign of 0, an exponent of 124 and a mantissa that begins with .010:
#
#     0 01111100 010 00000000000000000000
#
# Shifted by 20, what is left is 124 * 8 + 2 = 994. In a leaf with the base 800 its code
# is 194, and (194 + 800) << 20 are the bits of 0.15625 again. The next code, 195, is
# 0.171875; 0.16 lies 0.24 of the way there, and becomes 195 with that probability.
_SHIFT = 20

# While the leaf's size is unknown, after zeros, a code is (part of) the exponent alone,
# which has room for any float32.
_WIDE = -1


class _Byte(NamedTuple):
    """One of the two one-byte codes: its largest, and what its window leaves above."""

    signed: bool
    largest: int
    headroom: int
    wide_shift: int


_UNSIGNED = _Byte(signed=False, largest=255, headroom=64, wide_shift=23)
_SIGNED = _Byte(signed=True, largest=127, headroom=24, wide_shift=24)


def uint8(min_size: int = 4096) -> Storage:
    """One byte a number, for what is never negative, such as an average of squares.

    A code is a float with 5 bits of exponent and 3 of mantissa. The 32 octaves that it
    spans move with the leaf: at each step 24 of them, 7.2 decades, begin below the
    largest element as it was, and 8 lie above it. What is smaller, and not 0, counts as
    the smallest value. An element that grows by more than 256 times in one step counts
    as the largest value and grows on in the next, so that one huge gradient does not
    take the others' precision.

    Args:
      min_size: an array with fewer elements is kept as it is, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is no such integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop, storage
      >>> optimizer = storage.stored(rmsprop(0.01), {"nu": storage.uint8()})
      >>> state = optimizer.init(jnp.ones((64, 64)))
      >>> state.inner_state[1].nu.dtype
      dtype('uint8')
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Storage(_ENCODE_UNSIGNED, _DECODE_UNSIGNED, size)


def int8(min_size: int = 4096) -> Storage:
    """One byte a number of either sign, such as a mean or a momentum.

    A sign, 4 bits of exponent and 3 of mantissa: as `uint8` with 16 octaves, 13 of them
    below the largest element. What is smaller is rounded at random to 0 or to the
    smallest value.

    Args:
      min_size: an array with fewer elements is kept as it is, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is no such integer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_rmsprop import storage
      >>> optimizer = storage.stored(optax.trace(0.9), {"trace": storage.int8()})
      >>> state = optimizer.init(jnp.ones((64, 64)))
      >>> state.inner_state.trace.dtype
      dtype('int8')
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Storage(_ENCODE_SIGNED, _DECODE_SIGNED, size)


def _encode_byte(
    byte: _Byte, x: jax.Array, threshold: jax.Array, old: Codes | None
) -> Codes:
    base = _first_base(x) if old is None else _next_base(byte, old)
    shift = _shift(byte, base)
    size = jnp.abs(x) if byte.signed else x
    codes = ((_bits(size) + _fraction(threshold, shift)) >> shift) - _start(base)
    smallest = _value(byte, jnp.int32(1), base)
    if byte.signed:
        least = (size > smallest * _uniform(threshold)).astype(jnp.int32)
        codes = jnp.where(size < smallest, least, jnp.minimum(codes, byte.largest))
        codes = jnp.where(x < 0, -codes, codes)
    else:
        codes = jnp.where(size > 0, jnp.clip(codes, 1, byte.largest), 0)
    return Codes(codes.astype(jnp.int8 if byte.signed else jnp.uint8), base)


def _decode_byte(byte: _Byte, stored: Codes) -> jax.Array:
    codes = stored.codes.astype(jnp.int32)
    value = _value(byte, jnp.abs(codes), stored.base)
    return jnp.where(codes < 0, -value, value) if byte.signed else value


# Made once, so that two storages with the same settings are equal.
_ENCODE_UNSIGNED = functools.partial(_encode_byte, _UNSIGNED)
_DECODE_UNSIGNED = functools.partial(_decode_byte, _UNSIGNED)
_ENCODE_SIGNED = functools.partial(_encode_byte, _SIGNED)
_DECODE_SIGNED = functools.partial(_decode_byte, _SIGNED)


def _value(byte: _Byte, codes: jax.Array, base: Any) -> jax.Array:
    bits = (codes + _start(base)) << _shift(byte, base)
    return jnp.where(codes > 0, lax.bitcast_convert_type(bits, jnp.float32), 0)


def _first_base(x: jax.Array) -> jax.Array:
    """A constant, to which a sum of no elements gives the type of what varies with x.

    `shard_map` takes it for the carry of a scan, which later bases come from.
    """
    return _WIDE + jnp.sum(x[None][:0]).astype(jnp.int32)


def _next_base(byte: _Byte, old: Codes) -> jax.Array:
    """The start of the next codes' window, by the largest of these."""
    codes = old.codes
    largest = jnp.maximum(codes.max(), -codes.min()) if byte.signed else codes.max()
    largest = largest.astype(jnp.int32)
    wide = old.base < 0
    above = (largest + 1) << (byte.wide_shift - _SHIFT)
    top = jnp.where(wide, above, largest + old.base)
    base = jnp.maximum(top + byte.headroom - byte.largest, 0)
    return jnp.where(largest == 0, _WIDE, base)


def _start(base: Any) -> jax.Array:
    return jnp.maximum(base, 0)


def _shift(byte: _Byte, base: Any) -> jax.Array:
    return jnp.where(base < 0, byte.wide_shift, _SHIFT)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _fraction(threshold: jax.Array, shift: Any) -> jax.Array:
    """The threshold's upper `shift` bits."""
    return (threshold >> jnp.asarray(32 - shift, jnp.uint32)).astype(jnp.int32)


def _uniform(threshold: jax.Array) -> jax.Array:
    """The threshold in [0, 1)."""
    return (threshold >> 8).astype(jnp.float32) * jnp.float32(2**-24)

"""The ways to keep an array in fewer bits: each two functions, to codes and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_rmsprop import _validate


class Quantized(NamedTuple):
    """An array as a codec keeps it.

    Attributes:
      codes: of the array's shape, in fewer bits; of one dtype, which is not float32.
      base: what the whole array shares, int32 of shape (); None if nothing.
    """

    codes: Any
    base: Any


@dataclasses.dataclass(frozen=True)
class Codec:
    """A way to keep an array between steps: two pure functions, and a least size.

    Attributes:
      encode: (x, dither, previous) -> Quantized. `x` is a float32 array; `dither` are
        uint32 numbers of its shape, all equally likely, by which to round; `previous`
        is the `Quantized` that the new one replaces, None at first.
      decode: Quantized -> x.
      min_size: an array with fewer elements is kept as it is. So is one that is not
        float32, such as the mean of complex gradients.
    """

    encode: Callable[[jax.Array, jax.Array, Quantized | None], Quantized]
    decode: Callable[[Quantized], jax.Array]
    min_size: int = 0


# By the names of a state's fields.
StateCodecs = Mapping[str, Codec]


def bfloat16(min_size: int = 0) -> Codec:
    """Two bytes a number, of either sign: float32's range with 8 bits of precision.

    Args:
      min_size: an array with fewer elements is kept as it is, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is no such integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import bfloat16, quantize_state
      >>> optimizer = quantize_state(rmsprop(0.01), {"nu": bfloat16()})
      >>> state = optimizer.init(jnp.ones(3))
      >>> state.inner_state[1].nu.dtype
      dtype(bfloat16)
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Codec(_encode_bfloat16, _decode_bfloat16, size)


def _encode_bfloat16(
    x: jax.Array, dither: jax.Array, previous: Quantized | None
) -> Quantized:
    del previous
    # To add a fraction of the last bit kept, and to cut, is to round up with the right
    # probability, whatever the sign; a carry goes into the exponent, as it should.
    bits = (_bits(x) + _dither_bits(dither, 16)) & -(2**16)
    # A float32 that a bfloat16 holds: of a step that ends in a conversion of float32 a
    # TPU's compiler makes one loop, of one that ends in bits two.
    kept = lax.bitcast_convert_type(bits, jnp.float32)
    return Quantized(kept.astype(jnp.bfloat16), None)


def _decode_bfloat16(x: Quantized) -> jax.Array:
    return x.codes.astype(jnp.float32)


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
_SCALE_UNKNOWN = -1


class _ByteFormat(NamedTuple):
    """One of the two one-byte codes: its largest, and what its window leaves above."""

    signed: bool
    largest: int
    headroom: int
    wide_shift: int


_UNSIGNED = _ByteFormat(signed=False, largest=255, headroom=64, wide_shift=23)
_SIGNED = _ByteFormat(signed=True, largest=127, headroom=24, wide_shift=24)


def uint8(min_size: int = 4096) -> Codec:
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
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import uint8, quantize_state
      >>> optimizer = quantize_state(rmsprop(0.01), {"nu": uint8()})
      >>> state = optimizer.init(jnp.ones((64, 64)))
      >>> state.inner_state[1].nu.dtype
      dtype('uint8')
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Codec(_ENCODE_UNSIGNED, _DECODE_UNSIGNED, size)


def int8(min_size: int = 4096) -> Codec:
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
      >>> from jax_rmsprop.quantization import int8, quantize_state
      >>> optimizer = quantize_state(optax.trace(0.9), {"trace": int8()})
      >>> state = optimizer.init(jnp.ones((64, 64)))
      >>> state.inner_state.trace.dtype
      dtype('int8')
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Codec(_ENCODE_SIGNED, _DECODE_SIGNED, size)


def _encode_byte(
    fmt: _ByteFormat, x: jax.Array, dither: jax.Array, previous: Quantized | None
) -> Quantized:
    base = _first_base(x) if previous is None else _next_base(fmt, previous)
    shift = _mantissa_shift(fmt, base)
    size = jnp.abs(x) if fmt.signed else x
    codes = ((_bits(size) + _dither_bits(dither, shift)) >> shift) - _window_start(base)
    smallest = _decode_magnitude(fmt, jnp.int32(1), base)
    # Clipped as float32, for the reason that bfloat16 ends in one.
    codes = codes.astype(jnp.float32)
    if fmt.signed:
        least = (size > smallest * _unit_dither(dither)).astype(jnp.float32)
        codes = jnp.where(size < smallest, least, jnp.minimum(codes, fmt.largest))
        codes = jnp.where(x < 0, -codes, codes)
    else:
        codes = jnp.where(size > 0, jnp.clip(codes, 1, fmt.largest), 0)
    return Quantized(codes.astype(jnp.int8 if fmt.signed else jnp.uint8), base)


def _decode_byte(fmt: _ByteFormat, x: Quantized) -> jax.Array:
    codes = x.codes.astype(jnp.int32)
    value = _decode_magnitude(fmt, jnp.abs(codes), x.base)
    return jnp.where(codes < 0, -value, value) if fmt.signed else value


# Made once, so that two codecs with the same settings are equal.
_ENCODE_UNSIGNED = functools.partial(_encode_byte, _UNSIGNED)
_DECODE_UNSIGNED = functools.partial(_decode_byte, _UNSIGNED)
_ENCODE_SIGNED = functools.partial(_encode_byte, _SIGNED)
_DECODE_SIGNED = functools.partial(_decode_byte, _SIGNED)


def _decode_magnitude(fmt: _ByteFormat, codes: jax.Array, base: Any) -> jax.Array:
    bits = (codes + _window_start(base)) << _mantissa_shift(fmt, base)
    return jnp.where(codes > 0, lax.bitcast_convert_type(bits, jnp.float32), 0)


def _first_base(x: jax.Array) -> jax.Array:
    """A constant, to which a sum of no elements gives the type of what varies with x.

    `shard_map` takes it for the carry of a scan, which later bases come from.
    """
    return _SCALE_UNKNOWN + jnp.sum(x[None][:0]).astype(jnp.int32)


def _next_base(fmt: _ByteFormat, previous: Quantized) -> jax.Array:
    """The start of the next codes' window, by the largest of these."""
    # Without the barrier a GPU's compiler splits the loop of the step, which reads the
    # codes too. To compare them a TPU's copies bytes of two dimensions, and a CPU's
    # copies integers of 32 bits.
    codes = lax.optimization_barrier(previous.codes)
    largest = lax.platform_dependent(
        codes,
        cpu=functools.partial(_largest, fmt),
        default=lambda codes: _largest(fmt, codes.astype(jnp.int32)),
    )
    wide = previous.base < 0
    above = (largest + 1) << (fmt.wide_shift - _SHIFT)
    top = jnp.where(wide, above, largest + previous.base)
    base = jnp.maximum(top + fmt.headroom - fmt.largest, 0)
    return jnp.where(largest == 0, _SCALE_UNKNOWN, base)


def _largest(fmt: _ByteFormat, codes: jax.Array) -> jax.Array:
    largest = jnp.maximum(codes.max(), -codes.min()) if fmt.signed else codes.max()
    return largest.astype(jnp.int32)


def _window_start(base: Any) -> jax.Array:
    return jnp.maximum(base, 0)


def _mantissa_shift(fmt: _ByteFormat, base: Any) -> jax.Array:
    return jnp.where(base < 0, fmt.wide_shift, _SHIFT)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _dither_bits(dither: jax.Array, shift: Any) -> jax.Array:
    """The dither's upper `shift` bits."""
    return (dither >> jnp.asarray(32 - shift, jnp.uint32)).astype(jnp.int32)


def _unit_dither(dither: jax.Array) -> jax.Array:
    """The dither in [0, 1)."""
    return (dither >> 8).astype(jnp.float32) * jnp.float32(2**-24)

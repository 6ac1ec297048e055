"""Codecs: store an array in fewer bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_rmsprop import _validate


@dataclasses.dataclass(frozen=True)
class Codec:
    """A format to store an array in between steps: encoder, decoder and shared base.

    Attributes:
      encode: (x, dither, base) -> codes. `x` is a float32 array; `dither` are uniform
        uint32 numbers of its shape for the rounding; `base` is shared by the whole
        array, int32 of shape (). Codes have the array's shape, in fewer bits, and one
        dtype, which is not float32.
      decode: (codes, base) -> x, with the base of their encoding.
      next_base: (largest, base) -> base, elementwise: the base of an array's next
        codes, given the largest magnitude of its codes so far and their base. None if
        the base is always `first_base`.
      first_base: the base of an array's first codes.
      min_size: arrays with fewer elements are not encoded, nor are arrays that are not
        float32, such as the mean of complex gradients.
      signed: whether it can encode negative numbers.
    """

    encode: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array, jax.Array], jax.Array]
    next_base: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    first_base: int = 0
    min_size: int = 0
    signed: bool = True


# By the names of the state's fields.
StateCodecs = Mapping[str, Codec]


def bfloat16(min_size: int = 0) -> Codec:
    """Two bytes a number, of either sign: float32's range with 8 bits of precision.

    Args:
      min_size: arrays with fewer elements are not encoded, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is not an integer >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import bfloat16, quantize_state
      >>> optimizer = quantize_state(rmsprop(0.01), {"nu": bfloat16()})
      >>> state = optimizer.init(jnp.ones(3))
      >>> state.inner_state.nu.dtype
      dtype(bfloat16)
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return Codec(_encode_bfloat16, _decode_bfloat16, min_size=size)


def _encode_bfloat16(x: jax.Array, dither: jax.Array, base: jax.Array) -> jax.Array:
    # Convert a float32 that bfloat16 represents exactly: a TPU's compiler makes one
    # loop of a step that ends in a conversion of float32, and two if it ends in bits.
    return _to_bfloat16(x, dither, base).astype(jnp.bfloat16)


def _to_bfloat16(x: jax.Array, dither: jax.Array, base: jax.Array) -> jax.Array:
    del base
    # Adding a fraction of the last bit kept and truncating rounds up with the right
    # probability, for either sign; a carry goes into the exponent, as it should.
    bits = (_bits(x) + _dither_bits(dither, 16)) & -(2**16)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _decode_bfloat16(codes: jax.Array, base: jax.Array) -> jax.Array:
    # The base is 0. If all results of a leaf depend on the array of bases, a GPU's
    # compiler fuses the loops of many leaves; otherwise it splits some.
    return lax.bitcast_convert_type(
        _bits(codes.astype(jnp.float32)) + base, jnp.float32
    )


# A one-byte code is the upper bits of a float32, its exponent and three bits of its
# mantissa, minus a base that the leaf shares: no table, no logarithm, no division. Code
# 0 is 0. An octave is eight codes. For example, 0.15625 is 1.25 * 2^-3, so as a float32
# it has a sign of 0, an exponent of 124 and a mantissa that begins with .010:
#
#     0 01111100 010 00000000000000000000
#
# Shifted by 20 it is 124 * 8 + 2 = 994. In a leaf with the base 800 its code
# is 194, and (194 + 800) << 20 are the bits of 0.15625 again. The next code, 195, is
# 0.171875; 0.16 lies 0.24 of the way there, and becomes 195 with that probability.
_SHIFT = 20

# While the leaf's magnitude is unknown, after zeros, a code is (part of) the exponent
# alone, so any float32 fits.
_SCALE_UNKNOWN = -1


class _ByteFormat(NamedTuple):
    """One of the two one-byte formats: its largest code, its window's headroom."""

    signed: bool
    largest: int
    headroom: int
    wide_shift: int


_UNSIGNED = _ByteFormat(signed=False, largest=255, headroom=64, wide_shift=23)
_SIGNED = _ByteFormat(signed=True, largest=127, headroom=24, wide_shift=24)


def _to_float16(x: jax.Array, dither: jax.Array, base: jax.Array) -> jax.Array:
    del base
    size = jnp.abs(x)
    # Below 2^-14 float16 has the same spacing as just above it. Each operation here is
    # exact.
    octave = lax.bitcast_convert_type(_bits(size) & 0x7F800000, jnp.float32)
    spacing = jnp.maximum(octave, 2.0**-14) * 2.0**-10
    below = jnp.floor(size / spacing)
    rounded = (below + (size / spacing - below > _unit_dither(dither))) * spacing
    return jnp.where(x < 0, -rounded, rounded)


# The rounding of half-precision parameters, by dtype: to float32 numbers that the dtype
# represents exactly, since an update is the difference of two of them.
HALF_PRECISION: Mapping[Any, Codec] = {
    jnp.dtype(jnp.bfloat16): Codec(_to_bfloat16, lambda codes, base: codes),
    jnp.dtype(jnp.float16): Codec(_to_float16, lambda codes, base: codes),
}


def uint8(min_size: int = 4096) -> Codec:
    """One byte a number, for arrays without negative numbers, such as mean squares.

    A code is a float with 5 bits of exponent and 3 of mantissa. Its range of 32 octaves
    follows the leaf: at each step 24 of them, 7.2 decades, lie below the largest
    element of the step before, and 8 above it. Smaller nonzero elements become the
    smallest value. An element that grows by more than 256 times in one step becomes the
    largest value and keeps growing in the next, so one huge gradient does not reduce
    the others' precision.

    Args:
      min_size: arrays with fewer elements are not encoded, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is not an integer >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import uint8, quantize_state
      >>> optimizer = quantize_state(rmsprop(0.01), {"nu": uint8()})
      >>> state = optimizer.init(jnp.ones((64, 64)))
      >>> state.inner_state.nu.dtype
      dtype('uint8')
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return dataclasses.replace(_UINT8, min_size=size)


def int8(min_size: int = 4096) -> Codec:
    """One byte a number of either sign, such as a mean or a momentum.

    A sign, 4 bits of exponent and 3 of mantissa: as `uint8` with 16 octaves, 13 of them
    below the largest element. Smaller elements are rounded stochastically to 0 or to
    the smallest value.

    Args:
      min_size: arrays with fewer elements are not encoded, >= 0.

    Raises:
      TypeError, ValueError: `min_size` is not an integer >= 0.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_rmsprop.quantization import int8, quantize_state
      >>> optimizer = quantize_state(optax.trace(0.9), {"trace": int8()})
      >>> state = optimizer.init(jnp.ones((64, 64)))
      >>> state.inner_state.trace.dtype
      dtype('int8')
    """
    size = _validate.check_int("min_size", min_size, low=0)
    return dataclasses.replace(_INT8, min_size=size)


def _encode_byte(
    fmt: _ByteFormat, x: jax.Array, dither: jax.Array, base: jax.Array
) -> jax.Array:
    shift = _mantissa_shift(fmt, base)
    size = jnp.abs(x) if fmt.signed else x
    codes = ((_bits(size) + _dither_bits(dither, shift)) >> shift) - _window_start(base)
    smallest = _decode_magnitude(fmt, jnp.int32(1), base)
    # Clip in float32, for the reason given in `_encode_bfloat16`.
    codes = codes.astype(jnp.float32)
    if fmt.signed:
        least = (size > smallest * _unit_dither(dither)).astype(jnp.float32)
        codes = jnp.where(size < smallest, least, jnp.minimum(codes, fmt.largest))
        codes = jnp.where(x < 0, -codes, codes)
    else:
        codes = jnp.where(size > 0, jnp.clip(codes, 1, fmt.largest), 0)
    return codes.astype(jnp.int8 if fmt.signed else jnp.uint8)


def _decode_byte(fmt: _ByteFormat, codes: jax.Array, base: jax.Array) -> jax.Array:
    signed = codes.astype(jnp.int32)
    value = _decode_magnitude(fmt, jnp.abs(signed), base)
    return jnp.where(signed < 0, -value, value) if fmt.signed else value


def _decode_magnitude(fmt: _ByteFormat, codes: jax.Array, base: jax.Array) -> jax.Array:
    bits = (codes + _window_start(base)) << _mantissa_shift(fmt, base)
    return jnp.where(codes > 0, lax.bitcast_convert_type(bits, jnp.float32), 0)


def _next_base(fmt: _ByteFormat, largest: jax.Array, base: jax.Array) -> jax.Array:
    """The start of the next codes' window, from the largest of these codes."""
    above = (largest + 1) << (fmt.wide_shift - _SHIFT)
    top = jnp.where(base < 0, above, largest + base)
    start = jnp.maximum(top + fmt.headroom - fmt.largest, 0)
    return jnp.where(largest == 0, _SCALE_UNKNOWN, start)


def _byte_codec(fmt: _ByteFormat) -> Codec:
    encode, decode, next_base = (
        functools.partial(f, fmt) for f in (_encode_byte, _decode_byte, _next_base)
    )
    return Codec(
        encode, decode, next_base, first_base=_SCALE_UNKNOWN, signed=fmt.signed
    )


# Created once, so that two codecs with the same settings are equal.
_UINT8, _INT8 = _byte_codec(_UNSIGNED), _byte_codec(_SIGNED)


def _window_start(base: jax.Array) -> jax.Array:
    return jnp.maximum(base, 0)


def _mantissa_shift(fmt: _ByteFormat, base: jax.Array) -> jax.Array:
    return jnp.where(base < 0, fmt.wide_shift, _SHIFT)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _dither_bits(dither: jax.Array, shift: jax.typing.ArrayLike) -> jax.Array:
    """The dither's upper `shift` bits."""
    return (dither >> jnp.asarray(32 - shift, jnp.uint32)).astype(jnp.int32)


def _unit_dither(dither: jax.Array) -> jax.Array:
    """The dither in [0, 1)."""
    return (dither >> 8).astype(jnp.float32) * jnp.float32(2**-24)

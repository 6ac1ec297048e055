"""Optimizer state in two bytes a number, or in one.

    optimizer = stored(rmsprop(0.01), {"nu": uint8()})

keeps the named fields of any Optax transformation's state in fewer bits between steps.
A step itself is as precise as before: what is kept is decoded, the transformation runs
in full precision, and what comes back is encoded.

Encoding rounds at random, up with the probability that makes the mean exact. Otherwise
a slow average would stand still: at gamma = 0.999 it moves by a thousandth of itself a
step, where bfloat16 has steps of one 256th and less. The random numbers are

    threshold = hash(element, leaf, seed, step // 32) + step * (golden ratio)    mod 1

nothing that has to be carried along, and the same in every run and on any number of
devices. In time an element's thresholds are spread evenly (Weyl's sequence), so that
what one rounding takes another soon gives back: in uint8, averages of noisy squares at
gamma 0.9, 0.99 and 0.999 are off by 0.055, 0.116 and 0.156 of themselves on average,
with independent thresholds by 0.070, 0.145 and 0.160. A sequence that never began anew
would do better still where the gradients keep their size (0.054, 0.112, 0.133), but
where they shrink it leaves the averages too low, by 4% if they halve every 1,400 steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jax_rmsprop import _markdown, _validate


class Codes(NamedTuple):
    """An array as a storage keeps it.

    Attributes:
      codes: of the array's shape, in fewer bits; of one dtype, which is not float32.
      base: what the whole array shares, int32 of shape (); None if nothing.
    """

    codes: Any
    base: Any


class StoredState(NamedTuple):
    """The state of `stored`: arrays only, where and in the shapes that one expects.

    Attributes:
      count: the number of updates so far, int32 of shape ().
      inner_state: the state of the transformation, in the fields that are stored with
        codes for arrays.
      bases: what the codes of each array of the inner state share, in order; int32 of
        shape (arrays,), 0 where they share nothing.
    """

    count: Any
    inner_state: Any
    bases: Any


@dataclasses.dataclass(frozen=True)
class Storage:
    """How an array is kept between steps: two pure functions, and from what size on.

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
# 0 is 0. An octave is eight codes.
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
    """Where the window of the next codes begins, by the largest of these."""
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
    """The threshold in so many bits."""
    return (threshold >> jnp.asarray(32 - shift, jnp.uint32)).astype(jnp.int32)


def _uniform(threshold: jax.Array) -> jax.Array:
    """The threshold in [0, 1)."""
    return (threshold >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def stored(
    inner: optax.GradientTransformation,
    storage: Storages,
    *,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keep named fields of a transformation's state as their storages do.

    Args:
      inner: any Optax transformation.
      storage: by the names of the state's fields, wherever they are: "nu" and "mu" of
        `rmsprop` and of Optax's, "trace" of a momentum.
      seed: an integer, or an array or tracer of one: other seeds round by other
        thresholds. For the members of a sweep, which otherwise round alike.

    Returns:
      A transformation with a `StoredState`. Its codes have their arrays' shapes and are
      where they are; all steps are elementwise but the largest code of an array, in
      one byte. Use it in a compiled training step, where decoding, the transformation
      and encoding become one loop.

    Raises:
      TypeError: something in `storage` is no `Storage`.
      ValueError: the state has no array in a field of such a name (when `init` is
        called).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import rmsprop, storage
      >>> optimizer = storage.stored(
      ...     rmsprop(0.01, momentum=0.9),
      ...     {"nu": storage.uint8(), "trace": storage.bfloat16()},
      ... )
      >>> params = {"w": jnp.ones((64, 64))}
      >>> state = optimizer.init(params)
      >>> updates, state = jax.jit(optimizer.update)(params, state)
      >>> optax.tree_utils.tree_get(state, "trace")["w"].dtype
      dtype(bfloat16)

    References:
      Stochastic rounding: Gupta et al., Deep Learning with Limited Numerical Precision,
      2015, https://arxiv.org/abs/1502.02551; optimizer state in 8 bits: Dettmers et
      al., 8-bit Optimizers via Block-wise Quantization, 2022,
      https://arxiv.org/abs/2110.02861.
    """
    named: Any = storage
    if not isinstance(named, Mapping):
        raise TypeError(
            "`storage` must be a dict of storages by the names of fields, such as "
            f'{{"nu": storage.uint8()}}, got {_validate.short_repr(named)}'
        )
    for name, value in named.items():
        if not isinstance(value, Storage):
            raise TypeError(
                "`storage` must have a Storage, such as storage.uint8(), for "
                f"{name!r}, got {_validate.short_repr(value)}"
            )
    made = optax.with_extra_args_support(inner), dict(storage), seed
    # Partials of functions here, so that the result can be pickled.
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, *made), functools.partial(_update, *made)
    )


def _init(
    inner: optax.GradientTransformationExtraArgs,
    storages: Storages,
    seed: Any,
    params: Any,
) -> StoredState:
    state, count = inner.init(params), jnp.zeros([], jnp.int32)
    leaves, tree = jax.tree.flatten(state)
    if jax.tree.leaves(params):
        fields = {k.name for path, _ in _leaves(state) for k in path if _is_field(k)}
        for name in storages:
            if name not in fields:
                raise ValueError(
                    f"`storage` has {name!r}, of which the state has no array; it has "
                    f"{', '.join(sorted(fields))}"
                )
    new = _encoded(storages, state, [None] * len(leaves), count, seed)
    return _state(tree, new, [jnp.int32(0)] * len(leaves), count)


def _update(
    inner: optax.GradientTransformationExtraArgs,
    storages: Storages,
    seed: Any,
    updates: Any,
    state: Any,
    params: Any = None,
    **extra_args: Any,
) -> tuple[Any, StoredState]:
    old = _codes(storages, state)
    before = _decoded(storages, state, old)
    updates, after = inner.update(updates, before, params, **extra_args)
    count = optax.safe_increment(state.count)
    new = _encoded(storages, after, old, count, seed)
    return updates, _state(jax.tree.structure(after), new, list(state.bases), count)


def decoded(state: StoredState, storage: Storages) -> Any:
    """The inner state of a `StoredState`, every array in full.

    Args:
      state: as `stored` returns it.
      storage: what `stored` was given.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import scale_by_rmsprop
      >>> kept = {"nu": bfloat16()}
      >>> optimizer = scale_by_rmsprop(0.5, storage=kept)
      >>> x = jnp.ones(2)
      >>> _, state = optimizer.update(x, optimizer.init(x))
      >>> state.inner_state.nu.dtype, decoded(state, kept).nu
      (dtype(bfloat16), Array([0.5, 0.5], dtype=float32))
    """
    return _decoded(storage, state, _codes(storage, state))


def _codes(storages: Storages, state: StoredState) -> list[Codes | None]:
    """The codes among the arrays of the inner state, in order; None for the others."""
    codes: list[Codes | None] = []
    for i, (path, x) in enumerate(_leaves(state.inner_state)):
        storage = _storage(storages, path)
        kept = _keeps(storage, x, _dtype(storage))
        codes.append(Codes(x, state.bases[i]) if kept else None)
    return codes


def _decoded(storages: Storages, state: StoredState, codes: list[Codes | None]) -> Any:
    leaves = [
        x if kept is None else _storage(storages, path).decode(kept)
        for (path, x), kept in zip(_leaves(state.inner_state), codes, strict=True)
    ]
    return jax.tree.structure(state.inner_state).unflatten(leaves)


def _encoded(
    storages: Storages, state: Any, old: list[Codes | None], count: Any, seed: Any
) -> list[Codes]:
    """The arrays of the state as codes or as they are; `old` is what they replace."""
    new: list[Codes] = []
    for i, ((path, x), codes) in enumerate(zip(_leaves(state), old, strict=True)):
        storage = _storage(storages, path)
        if _keeps(storage, x, jnp.float32):
            new.append(storage.encode(x, thresholds(x.shape, i, count, seed), codes))
        else:
            new.append(Codes(x, None))
    return new


def _state(tree: Any, new: list[Codes], bases: list[Any], count: Any) -> StoredState:
    """The state; `bases` are what stays where codes share nothing."""
    shared = [
        base if x.base is None else x.base for x, base in zip(new, bases, strict=True)
    ]
    return StoredState(
        count,
        tree.unflatten([x.codes for x in new]),
        jnp.stack(shared) if shared else jnp.zeros(0, jnp.int32),
    )


def _keeps(storage: Storage, x: jax.Array, dtype: Any) -> bool:
    """Whether a storage keeps an array that has this dtype while it does.

    In a step float32, between two that of its codes: whoever rebuilds a state leaves
    the dtypes as they are.
    """
    return x.dtype == dtype and x.size >= max(1, storage.min_size)


@functools.cache
def _dtype(storage: Storage) -> Any:
    """The dtype of a storage's codes."""
    x, threshold = (jax.ShapeDtypeStruct((1,), t) for t in ("float32", "uint32"))
    return jax.eval_shape(
        lambda x, threshold: storage.encode(x, threshold, None).codes, x, threshold
    ).dtype


# After so many steps the thresholds begin anew.
_RENEWED = np.uint32(32)


def thresholds(shape: tuple[int, ...], leaf: int, count: Any, seed: Any) -> jax.Array:
    """What each element of an array is rounded by at a step, in units of 2^-32.

    Args:
      shape: the array's.
      leaf: its number in the state.
      count: the step.
      seed: as for `stored`.

    Returns:
      uint32 numbers of that shape, all equally likely.

    Example:
      >>> thresholds((3,), 0, 0, 0).dtype
      dtype('uint32')
    """
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    step = jnp.asarray(count).astype(jnp.uint32)
    shared = jnp.asarray(seed).astype(jnp.uint32)
    for number in (jnp.uint32(leaf), step // _RENEWED):
        shared = _hash(shared) + number
    # 2^32 divided by the golden ratio.
    return _hash(position + _hash(shared)) + step * jnp.uint32(0x9E3779B9)


def _hash(x: jax.Array) -> jax.Array:
    """Mix the bits; the constants are those of Wellons' "lowbias32"."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _storage(storages: Mapping[str, Storage], path: Any) -> Storage:
    for key in path:
        if _is_field(key) and key.name in storages:
            return storages[key.name]
    return full()


def _is_field(key: Any) -> bool:
    return isinstance(key, GetAttrKey)


def _leaves(state: Any) -> list[tuple[Any, Any]]:
    return tree_flatten_with_path(state)[0]


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What a training keeps, in bytes; printed, it is a table.

    Attributes:
      rows: for each leaf of the parameters, and for the rest, the bytes by column:
        "parameters" and the fields of the optimizer's state.
    """

    rows: Mapping[str, Mapping[str, int]]

    @property
    def total(self) -> dict[str, int]:
        """The bytes of each column."""
        columns = dict.fromkeys(c for row in self.rows.values() for c in row)
        return {c: sum(row.get(c, 0) for row in self.rows.values()) for c in columns}

    def __str__(self) -> str:
        """The table, in Markdown."""
        total = self.total
        lines = [["bytes", *total]]
        for name, row in [*self.rows.items(), ("total", total)]:
            lines.append([name, *(f"{row.get(c, 0):,}" for c in total)])
        return _markdown.table(lines, numbers=True)


def memory_report(optimizer: optax.GradientTransformation, params: Any) -> MemoryReport:
    """How many bytes the parameters and an optimizer's state take. Allocates nothing.

    Args:
      optimizer: any Optax transformation.
      params: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      A report with a row for each leaf of the parameters and one for what belongs to
      none of them, such as a count.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import rmsprop, storage
      >>> params = {"w": jnp.ones((1000, 1000))}
      >>> optimizer = storage.stored(rmsprop(0.01), {"nu": storage.uint8()})
      >>> print(storage.memory_report(optimizer, params))
      | bytes | parameters |        nu | count | bases |
      | ----- | ---------- | --------- | ----- | ----- |
      | ['w'] |  4,000,000 | 1,000,000 |     0 |     0 |
      | other |          0 |         0 |     8 |     8 |
      | total |  4,000,000 | 1,000,000 |     8 |     8 |
    """
    rows: dict[str, dict[str, int]] = {}

    def add(row: str, column: str, x: Any) -> None:
        size = math.prod(x.shape) * x.dtype.itemsize
        cells = rows.setdefault(row, {})
        cells[column] = cells.get(column, 0) + size

    shapes: dict[Any, tuple[int, ...]] = {}
    for path, x in _leaves(params):
        shapes[path] = x.shape
        add(keystr(path) or "the root", "parameters", x)
    for path, x in _leaves(jax.eval_shape(optimizer.init, params)):
        row, last = None, "state"
        for i, key in enumerate(path):
            if not _is_field(key):
                continue
            # After the name of a field like the parameters goes on the path of one.
            rest = path[i + 1 :]
            inside = [n for n in shapes if rest[: len(n)] == n]
            if inside and x.shape == shapes[inside[0]]:
                row = keystr(inside[0]) or "the root"
            last = key.name if row is None or inside else last
        add(row or "other", last, x)
    if "other" in rows:
        rows["other"] = rows.pop("other")
    return MemoryReport(rows)

"""The wrapper that keeps named fields of a state as codes between steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, tree_flatten_with_path
from jax.typing import ArrayLike

from jax_rmsprop import _validate
from jax_rmsprop._sharding import on_explicit_mesh
from jax_rmsprop.quantization._codecs import Codec, Quantized, StateCodecs
from jax_rmsprop.quantization._dither import dither


class QuantizedState(NamedTuple):
    """The state of `quantize_state`: arrays only, in the places that one expects.

    Attributes:
      count: the number of updates so far, int32 of shape ().
      inner_state: the state of the transformation, with codes for arrays in the fields
        that have a codec.
      bases: what the codes of each array of the inner state share, in order; int32 of
        shape (arrays,), 0 where they share nothing.
    """

    count: Any  # a tuple has a method of that name, with which an Array does not agree
    inner_state: optax.OptState
    bases: jax.Array


def quantize_state(
    inner: optax.GradientTransformation,
    codecs: StateCodecs,
    *,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keep named fields of a transformation's state in fewer bits between steps.

    Args:
      inner: any Optax transformation.
      codecs: by the names of the state's fields, wherever they are: "nu" and "mu" of
        `rmsprop` and of Optax's, "trace" of a momentum. Other fields stay as they are.
      seed: an integer, or an array or tracer of one: other seeds round by other
        random numbers. For the members of a sweep, which otherwise round alike.

    Returns:
      A transformation with a `QuantizedState`. Its codes have their arrays' shapes and
      are where they are; all steps are elementwise but the largest code of an array, in
      one byte. Use it in a compiled training step, where decoding, the transformation
      and encoding become one loop.

    Raises:
      TypeError: something in `codecs` is no `Codec`.
      ValueError: the state has no array in a field of such a name (when `init` is
        called).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import bfloat16, quantize_state, uint8
      >>> optimizer = quantize_state(
      ...     rmsprop(0.01, momentum=0.9), {"nu": uint8(), "trace": bfloat16()}
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
    named: Any = codecs
    if not isinstance(named, Mapping):
        raise TypeError(
            "`codecs` must be a dict of codecs by the names of fields, such as "
            f'{{"nu": uint8()}}, got {_validate.short_repr(named)}'
        )
    for name, value in named.items():
        if not isinstance(value, Codec):
            raise TypeError(
                "`codecs` must have a Codec, such as uint8(), for "
                f"{name!r}, got {_validate.short_repr(value)}"
            )
    settings = optax.with_extra_args_support(inner), dict(codecs), seed
    # Partials of functions here, so that the result can be pickled.
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, *settings), functools.partial(_update, *settings)
    )


def dequantize_state(state: QuantizedState, codecs: StateCodecs) -> optax.OptState:
    """The inner state of a `QuantizedState`, every array in full.

    Args:
      state: of the transformation that `quantize_state` returned.
      codecs: what `quantize_state` was given.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import quantization, scale_by_rmsprop
      >>> codecs = {"nu": quantization.bfloat16()}
      >>> optimizer = quantization.quantize_state(scale_by_rmsprop(0.5), codecs)
      >>> x = jnp.ones(2)
      >>> _, state = optimizer.update(x, optimizer.init(x))
      >>> state.inner_state.nu.dtype, dequantize_state(state, codecs).nu
      (dtype(bfloat16), Array([0.5, 0.5], dtype=float32))
    """
    return _decode_state(codecs, state, _quantized_leaves(codecs, state))


def _init(
    inner: optax.GradientTransformationExtraArgs,
    codecs: StateCodecs,
    seed: ArrayLike,
    params: optax.Params,
) -> QuantizedState:
    state, count = inner.init(params), jnp.zeros([], jnp.int32)
    leaves, tree = jax.tree.flatten(state)
    if jax.tree.leaves(params):
        fields = {k.name for path, _ in path_leaves(state) for k in path if is_field(k)}
        for name in codecs:
            if name not in fields:
                raise ValueError(
                    f"`codecs` has {name!r}, of which the state has no array; it has "
                    f"{', '.join(sorted(fields))}"
                )
    encoded = _encode_state(codecs, state, [None] * len(leaves), count, seed)
    return _rebuild(tree, encoded, [jnp.int32(0)] * len(leaves), count)


def _update(
    inner: optax.GradientTransformationExtraArgs,
    codecs: StateCodecs,
    seed: ArrayLike,
    updates: optax.Updates,
    state: QuantizedState,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, QuantizedState]:
    previous = _quantized_leaves(codecs, state)
    before = _decode_state(codecs, state, previous)
    updates, after = inner.update(updates, before, params, **extra_args)
    count = optax.safe_increment(state.count)
    encoded = _encode_state(codecs, after, previous, count, seed)
    tree = jax.tree.structure(after)
    return updates, _rebuild(tree, encoded, list(state.bases), count)


def _quantized_leaves(
    codecs: StateCodecs, state: QuantizedState
) -> list[Quantized | None]:
    """The inner state's leaves that are codes, in order; None for the others."""
    leaves: list[Quantized | None] = []
    for i, (path, x) in enumerate(path_leaves(state.inner_state)):
        codec = _codec_for(codecs, path)
        kept = codec is not None and _keeps(codec, x, _code_dtype(codec))
        leaves.append(Quantized(x, state.bases[i]) if kept else None)
    return leaves


def _decode_state(
    codecs: StateCodecs, state: QuantizedState, quantized: list[Quantized | None]
) -> optax.OptState:
    def decode(path: Any, x: jax.Array, codes: Quantized | None) -> jax.Array:
        codec = _codec_for(codecs, path)
        return x if codec is None or codes is None else codec.decode(codes)

    leaves = zip(path_leaves(state.inner_state), quantized, strict=True)
    full = [decode(path, x, codes) for (path, x), codes in leaves]
    return jax.tree.structure(state.inner_state).unflatten(full)


def _encode_state(
    codecs: StateCodecs,
    state: optax.OptState,
    previous: list[Quantized | None],
    count: ArrayLike,
    seed: ArrayLike,
) -> list[Quantized]:
    """The leaves of the state, as codes or as they are; `previous` they replace."""

    def encode(i: int, path: Any, x: jax.Array, codes: Quantized | None) -> Quantized:
        codec = _codec_for(codecs, path)
        if codec is None or not _keeps(codec, x, jnp.float32):
            return Quantized(x, None)
        # Else each device would make the numbers of all.
        where = jax.typeof(x).sharding if on_explicit_mesh(x) else None
        noise = dither(x.shape, i, count, seed, out_sharding=where)
        return codec.encode(x, noise, codes)

    leaves = enumerate(zip(path_leaves(state), previous, strict=True))
    return [encode(i, path, x, codes) for i, ((path, x), codes) in leaves]


def _rebuild(
    tree: Any, encoded: list[Quantized], bases: list[Any], count: ArrayLike
) -> QuantizedState:
    """The state; `bases` are what stays where codes share nothing."""
    shared = [
        base if x.base is None else x.base
        for x, base in zip(encoded, bases, strict=True)
    ]
    return QuantizedState(
        count,
        tree.unflatten([x.codes for x in encoded]),
        jnp.stack(shared) if shared else jnp.zeros(0, jnp.int32),
    )


def _keeps(codec: Codec, x: jax.Array, dtype: Any) -> bool:
    """Tell whether a codec keeps an array, which has this dtype while it does.

    In a step float32, between two that of its codes: whoever rebuilds a state leaves
    the dtypes as they are.
    """
    return x.dtype == dtype and x.size >= max(1, codec.min_size)


@functools.cache
def _code_dtype(codec: Codec) -> Any:
    """The dtype of a codec's codes."""
    x, noise = (jax.ShapeDtypeStruct((1,), t) for t in ("float32", "uint32"))
    return jax.eval_shape(
        lambda x, noise: codec.encode(x, noise, None).codes, x, noise
    ).dtype


def _codec_for(codecs: StateCodecs, path: Any) -> Codec | None:
    for key in path:
        if is_field(key) and key.name in codecs:
            return codecs[key.name]
    return None


def is_field(key: Any) -> bool:
    """Tell whether a part of a path is the name of a field."""
    return isinstance(key, GetAttrKey)


def path_leaves(state: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree, each with its path."""
    return tree_flatten_with_path(state)[0]

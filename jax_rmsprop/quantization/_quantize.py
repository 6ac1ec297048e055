"""The wrapper that stores fields of a state as codes, and rounds parameters."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import GetAttrKey, register_dataclass, tree_flatten_with_path
from jax.typing import ArrayLike

from jax_rmsprop import _validate
from jax_rmsprop._sharding import on_explicit_mesh
from jax_rmsprop.quantization._codecs import HALF_PRECISION, Codec, StateCodecs
from jax_rmsprop.quantization._dither import (
    dither_starts,
    element_hashes,
    field_dither,
)
from jax_rmsprop.quantization._largest import largest_codes
from jax_rmsprop.quantization._round import (
    bounded_sum,
    is_half,
    step_to,
    widen,
    widen_half,
)

# Fields in which Optax or `rmsprop` stores negative numbers.
_SIGNED = frozenset(
    "mu momentum trace ema acc_grads grad_acc prev_updates previous_gradient".split()
)


class QuantizedState(NamedTuple):
    """The state of `quantize_state` and `stochastic_rounding`: arrays only.

    Attributes:
      count: the number of updates so far, int32 of shape ().
      inner_state: the state of the transformation, with codes for arrays in the fields
        that have a codec.
      bases: the base that the codes of each array of the inner state share, in order;
        int32 of shape (arrays,), 0 if there is no shared base.
    """

    count: Any  # an Array conflicts with the type of `tuple.count`
    inner_state: optax.OptState
    bases: jax.Array


def quantize_state(
    inner: optax.GradientTransformation,
    codecs: StateCodecs,
    *,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Store named fields of a transformation's state in fewer bits between steps.

    Args:
      inner: any Optax transformation.
      codecs: codecs by the names of the state's fields, anywhere in its tree: "nu" and
        "mu" of `rmsprop` and Optax; "momentum" of `rmsprop`, or "trace", Optax's name
        of such a buffer, for both. Other fields are not encoded.
      seed: seed of the rounding: an integer, or an array or tracer of one. Members of a
        sweep need different seeds to round independently.

    Returns:
      A transformation with a `QuantizedState`. Its codes have their arrays' shapes and
      shardings; all operations are elementwise but the largest code of an array, for
      one-byte codecs. Use it in a compiled training step, which fuses decoding, the
      transformation and encoding into one loop; outside a jit each is a dispatch.

    Raises:
      TypeError: a value of `codecs` is not a `Codec`.
      ValueError: an unsigned codec is for a signed field, such as "mu"; or the state
        has no array in a field of that name (when `init` is called).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import bfloat16, quantize_state, uint8
      >>> optimizer = quantize_state(
      ...     rmsprop(0.01, momentum=0.9), {"nu": uint8(), "momentum": bfloat16()}
      ... )
      >>> params = {"w": jnp.ones((64, 64))}
      >>> state = optimizer.init(params)
      >>> updates, state = jax.jit(optimizer.update)(params, state)
      >>> optax.tree_utils.tree_get(state, "momentum")["w"].dtype
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
        if name in _SIGNED and not value.signed:
            raise ValueError(
                "`codecs` must have a codec that keeps negative numbers, such as "
                f"int8(), for {name!r}, got an unsigned one"
            )
    codecs = dict(codecs)
    if "trace" in codecs:  # Optax's name of a momentum buffer
        codecs.setdefault("momentum", codecs["trace"])
    return _build(_Settings(inner, codecs, seed, rounds=False))


def stochastic_rounding(
    inner: optax.GradientTransformation, *, seed: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    """Round half-precision parameters stochastically, so small steps are not lost.

    A parameter x in bfloat16 or float16 becomes, for the step u of `inner`,

        x + u rounded up or down, with probabilities that make the mean x + u

    Rounding to nearest would leave x unchanged while u is below half the spacing of the
    dtype, in bfloat16 a 512th to a 256th of x. Other parameters are untouched.

    Args:
      inner: any Optax transformation that returns the final step, including the
        learning rate. It gets gradients and parameters in float32.
      seed: as in `quantize_state`.

    Returns:
      A transformation with a `QuantizedState`, whose `update` needs the parameters. For
      a half-precision parameter the update is in float32, and `optax.apply_updates`
      gives the rounded number exactly, in the parameter's dtype, unless the step
      exceeds both the parameter and 2^127: then it may be off by one spacing. (If XLA
      flushes subnormal numbers to 0, an update below 1.2e-38 is lost.) A sum of finite
      numbers is clipped to the dtype's largest number, so it is finite. NaN and
      infinity pass.

      Directly around or inside `quantize_state`, with the same seed, the two are one
      transformation: one hash rounds the parameter and its fields.

    Raises:
      ValueError: `update` is called without the parameters.

    Note:
      Equinox's `apply_updates` promotes a parameter to the update's float32. With
      `trained = eqx.filter(model, eqx.is_inexact_array)` use
      `eqx.combine(optax.apply_updates(trained, updates), model)`. Put transformations
      that compare an update's dtype with its gradient's, such as
      `optax.apply_if_finite`, into `inner`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_rmsprop import rmsprop
      >>> from jax_rmsprop.quantization import stochastic_rounding
      >>> optimizer = stochastic_rounding(rmsprop(1e-4))
      >>> params = jnp.ones(1000, "bfloat16")
      >>> state = optimizer.init(params)
      >>> for _ in range(10):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool((params == 1).all()), params.dtype
      (False, dtype(bfloat16))

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, 2015,
      https://arxiv.org/abs/1502.02551; bfloat16 parameters: Zamirai et al.,
      Revisiting BFloat16 Training, 2020, https://arxiv.org/abs/2010.06192.
    """
    return _build(_Settings(inner, {}, seed, rounds=True))


class _Settings(NamedTuple):
    """The inner transformation, codecs by field, seed, and whether to round."""

    inner: optax.GradientTransformation
    codecs: StateCodecs
    seed: ArrayLike
    rounds: bool


def _build(outer: _Settings) -> optax.GradientTransformationExtraArgs:
    """Build the transformation; merge it with a directly nested one, to hash once."""
    inner: Any = outer.inner
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be a transformation of Optax, got "
            f"{_validate.short_repr(inner)}"
        )
    update = inner.update
    if isinstance(update, functools.partial) and update.func is _update:
        within: _Settings = update.args[0]
        seeds = outer.seed, within.seed
        same = seeds[0] is seeds[1] or (
            all(isinstance(n, int) for n in seeds) and seeds[0] == seeds[1]
        )
        if (
            same
            and outer.rounds != within.rounds
            and not (outer.codecs and within.codecs)
        ):
            codecs = {**outer.codecs, **within.codecs}
            outer = _Settings(within.inner, codecs, outer.seed, rounds=True)
    settings = outer._replace(inner=optax.with_extra_args_support(outer.inner))
    # Partials of module functions, so that the result can be pickled.
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, settings), functools.partial(_update, settings)
    )


def dequantize_state(state: QuantizedState, codecs: StateCodecs) -> optax.OptState:
    """Decode the inner state of a `QuantizedState`.

    Args:
      state: the state of the transformation that `quantize_state` returned.
      codecs: the codecs given to `quantize_state`.

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
    codecs = {"momentum": codecs["trace"], **codecs} if "trace" in codecs else codecs
    return _replace_leaves(
        state.inner_state, _decode(_stored_leaves(codecs, state), state.bases)
    )


@functools.partial(
    register_dataclass, data_fields=["x"], meta_fields=["codec", "parameter"]
)
@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of the inner state, decoded or as codes.

    `codec` encodes it. A leaf that is not encoded has no codec, and its x is None.
    `parameter` is its path within its field, which identifies its parameter.
    """

    x: Any
    codec: Codec | None
    parameter: Any


def _init(settings: _Settings, /, params: optax.Params) -> QuantizedState:
    codecs = settings.codecs
    if settings.rounds:
        params = widen_half(params)
    state, count = settings.inner.init(params), jnp.zeros([], jnp.int32)
    if jax.tree.leaves(params):
        fields = {f for f, _ in _fields(state, params) if f is not None}
        for name in codecs:
            either = {"trace", "momentum"} if name in ("trace", "momentum") else {name}
            if not either & fields:
                raise ValueError(
                    f"`codecs` names {name!r}, but the state's fields are "
                    f"{', '.join(sorted(fields))}"
                )
    leaves = _full_leaves(codecs, state, params)
    codes, bases = _encode_first(leaves, count, settings.seed)
    return QuantizedState(count, _replace_leaves(state, codes), bases)


def _update(
    settings: _Settings,
    /,
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, QuantizedState]:
    inner, codecs, seed, rounds = settings
    _validate.check_class(state, QuantizedState)
    stored, parameters = _stored_leaves(codecs, state), []
    if rounds:
        if params is None:
            raise ValueError(
                "`params` must be passed to `update` of `stochastic_rounding`, got None"
            )
        parameters = _half_parameters(updates, params)
        pairs = zip(jax.tree.leaves(updates), parameters, strict=True)
        wide = [None if leaf.codec is None else widen(g) for g, leaf in pairs]
        updates = _replace_leaves(updates, wide)
        params = widen_half(params)
    full, count, bases, starts = _decode_stored(
        stored, parameters, state.count, state.bases, seed
    )
    before = _replace_leaves(state.inner_state, full)
    steps, after = inner.update(updates, before, params, **extra_args)
    codes, rounded = _encode_next(
        _full_leaves(codecs, after, updates),
        parameters,
        jax.tree.leaves(steps) if rounds else [],
        bases,
        starts,
        count,
    )
    if rounds:
        steps = _replace_leaves(steps, rounded)
    return steps, QuantizedState(count, _replace_leaves(after, codes), bases)


# Outside a jit each function is one dispatch instead of a dozen for each leaf.


@functools.partial(jax.jit, inline=True)
def _encode_first(
    leaves: list[_Leaf], count: jax.Array, seed: ArrayLike
) -> tuple[list[Any], jax.Array]:
    bases = _first_bases(leaves)
    starts = dither_starts(len(leaves), count, seed)
    return _encode(leaves, bases, starts, count), bases


@functools.partial(jax.jit, inline=True)
def _encode_next(
    leaves: list[_Leaf],
    parameters: list[_Leaf],
    steps: list[Any],
    bases: jax.Array,
    starts: jax.Array,
    count: ArrayLike,
) -> tuple[list[Any], list[Any]]:
    """The codes of a state, and the steps to the rounded parameters."""
    pairs = list(zip(parameters, steps, strict=True))
    sums = [
        leaf
        if leaf.codec is None
        else dataclasses.replace(leaf, x=bounded_sum(leaf.x, step))
        for leaf, step in pairs
    ]
    codes = _encode([*leaves, *sums], bases, starts, count)
    rounded = [
        None if leaf.codec is None else step_to(code, leaf.x, step)
        for code, (leaf, step) in zip(codes[len(leaves) :], pairs, strict=True)
    ]
    return codes[: len(leaves)], rounded


@functools.partial(jax.jit, inline=True)
def _decode_stored(
    leaves: list[_Leaf],
    parameters: list[_Leaf],
    count: jax.Array,
    bases: jax.Array,
    seed: ArrayLike,
) -> tuple[list[Any], ArrayLike, jax.Array, jax.Array]:
    """The decoded arrays, and the count, bases and starts of the next codes."""
    next_count = optax.safe_increment(count)
    starts = dither_starts(len(leaves) + len(parameters), next_count, seed)
    # The scalars of all leaves in one array: otherwise a GPU's compiler makes at least
    # one kernel for each leaf's, and fuses fewer of the leaves' loops.
    scalars = [
        bases,
        _next_bases(leaves, bases),
        lax.bitcast_convert_type(starts, jnp.int32),
    ]
    n = len(leaves)
    bases, next_bases, starts = jnp.split(
        lax.optimization_barrier(jnp.concatenate(scalars)), [n, 2 * n]
    )
    starts = lax.bitcast_convert_type(starts, jnp.uint32)
    return _decode(leaves, bases), next_count, next_bases, starts


@functools.partial(jax.jit, inline=True)
def _decode(leaves: list[_Leaf], bases: jax.Array) -> list[Any]:
    return [
        None if leaf.codec is None else leaf.codec.decode(leaf.x, bases[i])
        for i, leaf in enumerate(leaves)
    ]


@functools.partial(jax.jit, inline=True)
def _encode(
    leaves: list[_Leaf], bases: jax.Array, starts: jax.Array, count: ArrayLike
) -> list[Any]:
    # By parameter: its number, and a counter of its arrays.
    numbers = collections.defaultdict[Any, int](itertools.count().__next__)
    fields = collections.defaultdict[Any, Any](itertools.count)

    @functools.cache
    def hashes(number: int, shape: Any, where: Any) -> jax.Array:
        return element_hashes(shape, starts[number], where)

    def encode(i: int, leaf: _Leaf) -> Any:
        x, codec = leaf.x, leaf.codec
        if codec is None:
            return None
        # Otherwise each device would generate the numbers of all.
        where = jax.typeof(x).sharding if on_explicit_mesh(x) else None
        shared = hashes(numbers[leaf.parameter], x.shape, where)
        noise = field_dither(shared, count, next(fields[leaf.parameter]))
        base = jnp.int32(codec.first_base) if codec.next_base is None else bases[i]
        return codec.encode(x, noise, base)

    return [encode(i, leaf) for i, leaf in enumerate(leaves)]


def _replace_leaves(state: Any, new: list[Any]) -> Any:
    """Replace the leaves of a state whose new leaf is not None."""
    leaves, structure = jax.tree.flatten(state)
    pairs = zip(leaves, new, strict=True)
    return structure.unflatten(old if x is None else x for old, x in pairs)


def _first_bases(leaves: list[_Leaf]) -> jax.Array:
    """The first bases: constants plus an empty sum, which makes them vary with x.

    `shard_map` requires that of the carry of a scan, since later bases vary.
    """

    def first(leaf: _Leaf) -> jax.Array:
        if leaf.codec is None:
            return jnp.int32(0)
        return leaf.codec.first_base + jnp.sum(leaf.x[None][:0]).astype(jnp.int32)

    if not leaves:
        return jnp.zeros(0, jnp.int32)
    return jnp.stack([first(leaf) for leaf in leaves])


def _next_bases(leaves: list[_Leaf], bases: jax.Array) -> jax.Array:
    """The next base of each leaf, from the largest of its codes."""
    functions = [leaf.codec.next_base if leaf.codec else None for leaf in leaves]
    sharing = [i for i, function in enumerate(functions) if function is not None]
    if not sharing:
        return bases
    found = largest_codes(
        [leaves[i].x for i in sharing], [leaves[i].parameter for i in sharing]
    )
    # The others' entries are unused, but must vary over the same axes of the mesh.
    every = list(bases)
    for place, i in enumerate(sharing):
        every[i] = found[place]
    largest, result = jnp.stack(every), bases
    for function in dict.fromkeys(f for f in functions if f is not None):
        its = np.array([f is function for f in functions])
        result = jnp.where(its, function(largest, bases), result)
    return result


def _full_leaves(
    codecs: StateCodecs, state: optax.OptState, params: optax.Params
) -> list[_Leaf]:
    """The decoded leaves of a state; those to encode are float32."""

    def leaf(field: str | None, parameter: Any, x: jax.Array) -> _Leaf:
        codec = codecs.get(field) if field is not None else None
        if codec and x.dtype == jnp.float32 and x.size >= max(1, codec.min_size):
            return _Leaf(x, codec, parameter)
        return _Leaf(None, None, None)

    places = _fields(state, params)
    return [leaf(*at, x) for at, x in zip(places, jax.tree.leaves(state), strict=True)]


def _half_parameters(updates: Any, params: Any) -> list[_Leaf]:
    """The parameter of each leaf of the updates, if it is in half precision."""
    xs = _validate.match_parameters(updates, params)
    return [
        _Leaf(x, HALF_PRECISION[x.dtype], path)
        if is_half(x)
        else _Leaf(None, None, None)
        for (path, _), x in zip(path_leaves(updates), xs, strict=True)
    ]


def _stored_leaves(codecs: StateCodecs, state: QuantizedState) -> list[_Leaf]:
    """The stored leaves of the inner state; encoded ones have their codec's dtype.

    Rebuilding a state, as from a checkpoint, preserves the dtypes.

    Raises:
      ValueError: a field has the codes of another codec.
    """

    def leaf(path: Any, x: jax.Array) -> _Leaf:
        for i, key in enumerate(path):
            if is_field(key) and key.name in codecs:
                codec = codecs[key.name]
                if x.dtype == _code_dtype(codec) and x.size >= max(1, codec.min_size):
                    return _Leaf(x, codec, path[i + 1 :])
                if jnp.issubdtype(x.dtype, jnp.integer):
                    raise ValueError(
                        f"`state` has {key.name} in {x.dtype}, but `codecs` keeps it "
                        f"in {_code_dtype(codec)}"
                    )
        return _Leaf(None, None, None)

    return [leaf(path, x) for path, x in path_leaves(state.inner_state)]


def _fields(
    state: optax.OptState, params: optax.Params
) -> list[tuple[str | None, Any]]:
    """The field of each leaf of a state, and the leaf's path within it.

    Parameters may have fields, too: if a parameter's whole path follows a field, the
    leaf is that parameter's entry of the field.
    """
    parameters = {path for path, _ in path_leaves(params)}

    def field(path: Any) -> tuple[str | None, Any]:
        ends = [i for i, key in enumerate(path) if is_field(key)]
        like = [i for i in ends if path[i + 1 :] in parameters]
        for i in like[:1] or ends[:1]:
            return path[i].name, path[i + 1 :]
        return None, path

    return [field(path) for path, _ in path_leaves(state)]


@functools.cache
def _code_dtype(codec: Codec) -> Any:
    """The dtype of a codec's codes."""
    x, noise, base = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1,), "float32"), ((1,), "uint32"), ((), "int32"))
    )
    return jax.eval_shape(codec.encode, x, noise, base).dtype


def is_field(key: Any) -> bool:
    """Whether a key of a path is the name of a field."""
    return isinstance(key, GetAttrKey)


def path_leaves(state: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree, each with its path."""
    return tree_flatten_with_path(state)[0]

"""The wrapper that keeps named fields of a state as codes between steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from jax_rmsprop import _validate
from jax_rmsprop.storage._codecs import Codes, Storage, Storages, full
from jax_rmsprop.storage._dither import thresholds


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
        fields = {k.name for path, _ in path_leaves(state) for k in path if is_field(k)}
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
      >>> from jax_rmsprop import scale_by_rmsprop, storage
      >>> kept = {"nu": storage.bfloat16()}
      >>> optimizer = scale_by_rmsprop(0.5, storage=kept)
      >>> x = jnp.ones(2)
      >>> _, state = optimizer.update(x, optimizer.init(x))
      >>> state.inner_state.nu.dtype, storage.decoded(state, kept).nu
      (dtype(bfloat16), Array([0.5, 0.5], dtype=float32))
    """
    return _decoded(storage, state, _codes(storage, state))


def _codes(storages: Storages, state: StoredState) -> list[Codes | None]:
    """The codes among the arrays of the inner state, in order; None for the others."""
    codes: list[Codes | None] = []
    for i, (path, x) in enumerate(path_leaves(state.inner_state)):
        storage = _storage(storages, path)
        kept = _keeps(storage, x, _dtype(storage))
        codes.append(Codes(x, state.bases[i]) if kept else None)
    return codes


def _decoded(storages: Storages, state: StoredState, codes: list[Codes | None]) -> Any:
    leaves = [
        x if kept is None else _storage(storages, path).decode(kept)
        for (path, x), kept in zip(path_leaves(state.inner_state), codes, strict=True)
    ]
    return jax.tree.structure(state.inner_state).unflatten(leaves)


def _encoded(
    storages: Storages, state: Any, old: list[Codes | None], count: Any, seed: Any
) -> list[Codes]:
    """The arrays of the state as codes or as they are; `old` is what they replace."""
    new: list[Codes] = []
    for i, ((path, x), codes) in enumerate(zip(path_leaves(state), old, strict=True)):
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
    """Tell whether a storage keeps an array, which has this dtype while it does.

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


def _storage(storages: Mapping[str, Storage], path: Any) -> Storage:
    for key in path:
        if is_field(key) and key.name in storages:
            return storages[key.name]
    return full()


def is_field(key: Any) -> bool:
    """Tell whether a part of a path is the name of a field."""
    return isinstance(key, GetAttrKey)


def path_leaves(state: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree, each with its path."""
    return tree_flatten_with_path(state)[0]

"""Half-precision parameters: their float32 values, and their rounded steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_rmsprop._arithmetic import clip
from jax_rmsprop._sharding import place_like
from jax_rmsprop.quantization._codecs import HALF_PRECISION


def is_half(x: Any) -> bool:
    """Whether an array is in half precision, and so is rounded."""
    return getattr(x, "dtype", None) in HALF_PRECISION


def widen(x: Any) -> Any:
    """Cast an array, or a `ShapeDtypeStruct`, to float32."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.dtype(jnp.float32))
    return jnp.asarray(x).astype(jnp.float32)


def widen_half(tree: Any) -> Any:
    """Cast the half-precision arrays of a tree to float32."""
    return jax.tree.map(lambda x: widen(x) if is_half(x) else x, tree)


def bounded_sum(x: jax.Array, step: jax.Array) -> jax.Array:
    """The parameter plus its step in float32, clipped to the range of x's dtype.

    The sum has the step's sharding: if the optimizer's state is sharded over devices
    that replicate the parameter, each rounds its own shard.
    """
    return clip(_sum(x, step), jnp.finfo(x.dtype).max)


def step_to(rounded: jax.Array, x: jax.Array, step: jax.Array) -> jax.Array:
    """The step that takes x to `rounded`; infinite or NaN if that is.

    In float32 the difference of two such numbers is exact, unless one is so much larger
    that the sum, rounded to x's dtype, equals it again.
    """
    finite = lax.is_finite(place_like(x, step)) & lax.is_finite(step)
    # Send half-precision numbers to the parameter's devices, not float32.
    rounded = jnp.where(finite, rounded, _sum(x, step)).astype(x.dtype)
    wide = widen(place_like(rounded, x))
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(lax.is_finite(wide), clip(wide - widen(x), largest), wide)


def _sum(x: jax.Array, step: jax.Array) -> jax.Array:
    return widen(place_like(x, step)) + widen(step)

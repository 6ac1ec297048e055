"""Parameters in half precision: what a transformation sees of them, and their steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_rmsprop._arithmetic import clip
from jax_rmsprop._sharding import place_like
from jax_rmsprop.quantization._codecs import HALF_PRECISION


def is_half(x: Any) -> bool:
    """Tell whether an array is in half precision, and so is rounded."""
    return getattr(x, "dtype", None) in HALF_PRECISION


def widen(x: Any) -> Any:
    """An array in float32; its shape and dtype where it is a shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.dtype(jnp.float32))
    return jnp.asarray(x).astype(jnp.float32)


def widen_half(tree: Any) -> Any:
    """A tree whose arrays in half precision are in float32."""
    return jax.tree.map(lambda x: widen(x) if is_half(x) else x, tree)


def moved(x: jax.Array, step: jax.Array) -> jax.Array:
    """The parameter after its step, in float32, no further than x's dtype goes."""
    return clip(widen(x) + place_like(widen(step), x), jnp.finfo(x.dtype).max)


def step_to(rounded: jax.Array, x: jax.Array, step: jax.Array) -> jax.Array:
    """The step whose sum with x is what was rounded; as it was, if it is not finite.

    It is in float32, where the difference of two such numbers is exact, unless one is
    so much larger that the sum, rounded to x's dtype, is it again.
    """
    step = place_like(widen(step), x)
    finite = lax.is_finite(widen(x)) & lax.is_finite(step)
    return jnp.where(finite, clip(rounded - widen(x), jnp.finfo("float32").max), step)

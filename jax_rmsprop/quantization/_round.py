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


def bounded_sum(x: jax.Array, step: jax.Array) -> jax.Array:
    """The parameter and its step in float32, no further than x's dtype goes.

    The sum is where the step is: if the optimizer's state is spread over devices that
    each have the parameter, each rounds its own part.
    """
    return clip(_sum(x, step), jnp.finfo(x.dtype).max)


def step_to(rounded: jax.Array, x: jax.Array, step: jax.Array) -> jax.Array:
    """The step whose sum with x is the bounded one, rounded; infinite or NaN if it is.

    It is in float32, where the difference of two such numbers is exact, unless one is
    so much larger that the sum, rounded to x's dtype, is it again.
    """
    finite = lax.is_finite(place_like(x, step)) & lax.is_finite(step)
    # What is sent where the parameter is has the parameter's few bits.
    rounded = jnp.where(finite, rounded, _sum(x, step)).astype(x.dtype)
    wide = widen(place_like(rounded, x))
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(lax.is_finite(wide), clip(wide - widen(x), largest), wide)


def _sum(x: jax.Array, step: jax.Array) -> jax.Array:
    return widen(place_like(x, step)) + widen(step)

"""Arithmetic for real and complex arrays, in the state's precision and placement.

A product of a complex and a real number would also multiply by an imaginary 0, which
turns infinity into NaN. So real operations act on the real and imaginary parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_rmsprop._sharding import place_like


def map_real_imag(f: Callable[..., jax.Array], *xs: jax.Array) -> jax.Array:
    """Apply f to the arrays or, if complex, to their real and imaginary parts."""
    if not jnp.iscomplexobj(xs[0]):
        return f(*xs)
    return lax.complex(f(*(x.real for x in xs)), f(*(x.imag for x in xs)))


def times(number: jax.Array, x: jax.Array) -> jax.Array:
    """The product of a real number and x."""
    return map_real_imag(lambda part: number * part, x)


def clip(x: jax.Array, bound: jax.typing.ArrayLike) -> jax.Array:
    """Clip each part of x to [-bound, bound]; NaN stays NaN."""
    limit = jnp.asarray(bound, x.real.dtype)
    return map_real_imag(lambda part: lax.clamp(-limit, part, limit), x)


def summable(x: jax.Array) -> jax.Array:
    """Clip x so that the sum of four such values is finite."""
    return clip(x, jnp.finfo(x.dtype).max / 4)


def positive(x: jax.Array) -> jax.Array:
    """Replace zeros of x >= 0 by the smallest normal number.

    Then the root is not zero, and its derivative is finite.
    """
    return lax.max(x, jnp.finfo(x.dtype).tiny)


def largest(dtype: Any) -> Any:
    """The bound of a gradient's parts: 2^62 in float32.

    Chosen so that 8 * largest^2 and largest / sqrt(tiny) are finite.
    """
    return dtype.type(2.0 ** (jnp.finfo(dtype).maxexp // 2 - 2))


def bounded(g: jax.Array) -> jax.Array:
    """Clip each part of g to `largest`, in (3) as in its square.

    Otherwise one huge gradient would take a huge step.
    """
    return clip(g, largest(g.real.dtype))


def abs_square(x: jax.Array) -> jax.Array:
    """|x|^2, also for complex x."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def bounded_square(g: jax.Array) -> jax.Array:
    """|g|^2 of the bounded g; the bound prevents contraction as in `no_fma`."""

    def square(x: jax.Array) -> jax.Array:
        return lax.min(x * x, largest(x.dtype) ** 2)

    return square(g.real) + square(g.imag) if jnp.iscomplexobj(g) else square(g)


def no_fma(x: jax.Array) -> jax.Array:
    """min(x, a bound that is never reached), which rounds x before it is added.

    Compilers contract a product and a sum into one operation with one rounding: always
    if the product is used once, in some programs if it is used twice. They do not
    contract through a minimum, so a member of a sweep has the bits of its single run.
    """
    return lax.min(x, 8 * largest(x.dtype) ** 2)


def least_eps(eps: jax.Array, rate: jax.Array | None, in_sqrt: bool) -> jax.Array:
    """An eps > 0 with which the learning rate times (3) is finite.

    For rates up to 4 it is the smallest normal number, in float32.
    """
    eps = positive(eps)
    if rate is None:
        return eps
    info = jnp.finfo(eps.dtype)
    # Without `no_fma` a compiler would square the small number alone, which gives 0.
    root = no_fma(rate * (2 * largest(eps.dtype) / info.max))
    least = root * root if in_sqrt else root - jnp.sqrt(info.tiny)
    return jnp.maximum(eps, least)


def as_array(x: Any) -> jax.Array:
    """Convert x to an array in an enabled dtype: lax rejects float64 without x64."""
    x = jnp.asarray(x)
    wide = x.dtype in (jnp.float64, jnp.complex128)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype)) if wide else x


def state_dtype(p: jax.Array) -> Any:
    """The dtype of a leaf's averages: its own, but at least float32."""
    return p.dtype if jnp.finfo(p.dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array, nu: jax.Array) -> jax.Array:
    """Cast x to nu's precision, complex if x is, and reshard it like nu."""
    wide = np.result_type(nu.dtype, np.complex64) if jnp.iscomplexobj(x) else nu.dtype
    return place_like(x, nu).astype(wide)


def narrow(u: jax.Array, g: jax.Array) -> jax.Array:
    """Cast u to g's dtype, and reshard it like g."""
    return place_like(u.astype(g.dtype), g)

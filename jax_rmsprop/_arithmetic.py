"""Arithmetic for real and complex arrays, in the precision and the place of the state.

A product of a complex and a real number would multiply by an imaginary 0 too, which
makes NaN of infinity. So whatever is real acts on the real and on the imaginary part.
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
    """Apply f to the arrays or, if complex, to their real and their imaginary parts."""
    if not jnp.iscomplexobj(xs[0]):
        return f(*xs)
    return lax.complex(f(*(x.real for x in xs)), f(*(x.imag for x in xs)))


def times(number: jax.Array, x: jax.Array) -> jax.Array:
    """The product of a real number and x."""
    return map_real_imag(lambda part: number * part, x)


def clip(x: jax.Array, bound: jax.typing.ArrayLike) -> jax.Array:
    """Hold each part of x between -bound and bound; a NaN stays."""
    limit = jnp.asarray(bound, x.real.dtype)
    return map_real_imag(lambda part: lax.clamp(-limit, part, limit), x)


def summable(x: jax.Array) -> jax.Array:
    """Clip x so that a sum of four such values is finite."""
    return clip(x, jnp.finfo(x.dtype).max / 4)


def positive(x: jax.Array) -> jax.Array:
    """Replace zeros of x >= 0 by the smallest normal number.

    So the root is not zero, and its derivative is finite.
    """
    return lax.max(x, jnp.finfo(x.dtype).tiny)


def largest(dtype: Any) -> Any:
    """The largest part of a gradient that counts: 2^62 in float32.

    Chosen so that 8 * largest^2 and largest / sqrt(tiny) are finite.
    """
    return dtype.type(2.0 ** (jnp.finfo(dtype).maxexp // 2 - 2))


def bounded(g: jax.Array) -> jax.Array:
    """Hold each part of g within `largest`, in (3) as in its square.

    Else one huge gradient takes a huge step.
    """
    return clip(g, largest(g.real.dtype))


def abs_square(x: jax.Array) -> jax.Array:
    """|x|^2, also of complex x."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def bounded_square(g: jax.Array) -> jax.Array:
    """|g|^2 of the bounded g; the bound fences the square as `no_fma` does."""

    def square(x: jax.Array) -> jax.Array:
        return lax.min(x * x, largest(x.dtype) ** 2)

    return square(g.real) + square(g.imag) if jnp.iscomplexobj(g) else square(g)


def no_fma(x: jax.Array) -> jax.Array:
    """min(x, a bound that is never reached), which rounds x before it is added.

    Compilers contract a product and a sum into one operation of one rounding: a product
    that is used once always, one that is used twice in some programs and not in others.
    They do not look through a minimum, so a row of a sweep has the bits of its single
    run.
    """
    return lax.min(x, 8 * largest(x.dtype) ** 2)


def least_eps(eps: jax.Array, rate: jax.Array | None, in_sqrt: bool) -> jax.Array:
    """An eps > 0, of which the learning rate times (3) is finite.

    Up to a rate of 4 it is the smallest normal number, in float32.
    """
    eps = positive(eps)
    if rate is None:
        return eps
    info = jnp.finfo(eps.dtype)
    # Fenced: a compiler would square the small number alone, which gives 0.
    root = no_fma(rate * (2 * largest(eps.dtype) / info.max))
    least = root * root if in_sqrt else root - jnp.sqrt(info.tiny)
    return jnp.maximum(eps, least)


def as_array(x: Any) -> jax.Array:
    """An array in a dtype that there is: outside x64 no float64, which lax refuses."""
    x = jnp.asarray(x)
    wide = x.dtype in (jnp.float64, jnp.complex128)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype)) if wide else x


def state_dtype(p: jax.Array) -> Any:
    """The dtype of a leaf's averages: its own, or float32 for what is narrower."""
    return p.dtype if jnp.finfo(p.dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array, nu: jax.Array) -> jax.Array:
    """Cast x to nu's precision, complex if x is, and move it to nu's place."""
    wide = np.result_type(nu.dtype, np.complex64) if jnp.iscomplexobj(x) else nu.dtype
    return place_like(x, nu).astype(wide)


def narrow(u: jax.Array, g: jax.Array) -> jax.Array:
    """Cast u to g's dtype, and move it to g's place."""
    return place_like(u.astype(g.dtype), g)

"""RMSProp's equations, on one array; everything is element by element.

With g the gradient, nu the moving average of its square, and gamma the average's decay:

    nu = gamma * nu + (1 - gamma) * |g|^2
    u  = g / sqrt(nu + eps)                  eps_in_sqrt=True, the textbook
    u  = g / (sqrt(nu) + eps)                eps_in_sqrt=False, PyTorch

and centered, with mu the average of the gradient and nu that of the squared distance:

    mu = gamma * mu + (1 - gamma) * g
    nu = gamma * nu + (1 - gamma) * gamma * |g - mu|^2       with the mu before

which is the average of |g|^2 less the square of the average of g, and never negative.

Source: Tieleman and Hinton, "Lecture 6.5 - rmsprop", Coursera: Neural Networks for
Machine Learning, 2012; the centered variant is equations 38 to 45 of Graves,
"Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850, 2013.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Decay(NamedTuple):
    """An average's decay: scalars of the average's dtype.

    Attributes:
      gamma: the weight of the old.
      slow: whether it is at least the weight of the new.
      step: the weight of the lighter of the two, 1 - gamma or -gamma, signed as the
        step toward it is.
    """

    gamma: jax.Array
    slow: jax.Array
    step: jax.Array


def decay(gamma: jax.Array, one_minus_gamma: jax.Array) -> Decay:
    """The decay from both weights: 1 - gamma of a float32 may be wrong in all digits.

    Made once for all arrays, since at a thousand leaves the scalars count.
    """
    slow = gamma >= 0.5
    return Decay(gamma, slow, lax.select(slow, one_minus_gamma, -gamma))


def average(old: jax.Array, new: jax.Array, decay: Decay) -> jax.Array:
    """Step from the one of old and new that weighs more toward the other.

        gamma * old + (1 - gamma) * new  =  old + (1 - gamma) * (new - old)
                                         =  new - gamma * (new - old)

    So written it has no bias, although gamma and 1 - gamma are rounded apart, and loses
    neither of the two beside the other.
    """
    return lax.select(decay.slow, old, new) + decay.step * (new - old)


def mean_square(nu: jax.Array, g: jax.Array, decay: Decay) -> jax.Array:
    """The new nu."""
    return average(nu, _bounded_square(g), decay)


def mean_and_variance(
    mu: jax.Array, nu: jax.Array, g: jax.Array, decay: Decay
) -> tuple[jax.Array, jax.Array]:
    """The new mu and the new nu of the centered variant."""
    g = bounded(g)
    square = _rounded(decay.gamma * _abs_square(g - mu))
    mu = map_real_imag(lambda old, new: average(old, new, decay), mu, g)
    return mu, average(nu, square, decay)


def scaled(
    g: jax.Array, nu: jax.Array, *, eps: jax.Array, eps_in_sqrt: bool
) -> jax.Array:
    """The step u, for an eps > 0; a gradient of zero gives zero."""
    root = jnp.sqrt(nu + eps) if eps_in_sqrt else jnp.sqrt(positive(nu)) + eps
    return map_real_imag(lambda x: x / root, bounded(g))


def bounded(g: jax.Array) -> jax.Array:
    """Hold each part of g within bounds, 2^62 in float32, whose squares are finite.

    The step's numerator is bounded as its square is, else one huge gradient takes a
    huge step.
    """
    bound = largest(g.real.dtype)
    return map_real_imag(lambda x: lax.clamp(-bound, x, bound), g)


def largest(dtype: Any) -> Any:
    """The bound of each part of a gradient.

    Its square is finite, eight times that, and it divided by the root of the smallest
    normal number.
    """
    return dtype.type(2.0 ** (jnp.finfo(dtype).maxexp // 2 - 2))


def positive(x: jax.Array) -> jax.Array:
    """Keep x >= 0 from zero, so that its root and the root's derivative are finite."""
    return lax.max(x, jnp.finfo(x.dtype).tiny)


def map_real_imag(f: Callable[..., jax.Array], *xs: jax.Array) -> jax.Array:
    """Apply f to the arrays or, if complex, to their real and their imaginary parts.

    A product of a complex and a real number would multiply by an imaginary 0 too,
    which makes NaN of infinity.
    """
    if not jnp.iscomplexobj(xs[0]):
        return f(*xs)
    return lax.complex(f(*(x.real for x in xs)), f(*(x.imag for x in xs)))


def _abs_square(x: jax.Array) -> jax.Array:
    """|x|^2, also of complex x."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _bounded_square(g: jax.Array) -> jax.Array:
    """|g|^2 of the bounded g: the same as to bound g first, and `_rounded` besides."""

    def square(x: jax.Array) -> jax.Array:
        return lax.min(x * x, largest(x.dtype) ** 2)

    return square(g.real) + square(g.imag) if jnp.iscomplexobj(g) else square(g)


def _rounded(x: jax.Array) -> jax.Array:
    """A product, rounded before it is added to anything.

    Compilers contract a product and a sum into one operation of one rounding: a product
    that is used once always, one that is used twice in some programs and not in others.
    They do not look through a minimum, so a row of a sweep has the bits of its single
    run. No square of what is bounded exceeds this one.
    """
    return lax.min(x, 8 * largest(x.dtype) ** 2)

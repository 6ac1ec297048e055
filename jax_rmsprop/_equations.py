"""RMSProp's equations on one array, element by element.

With g the gradient, x the parameter, eta the learning rate, gamma the decay of the
moving average nu of the gradient's square, and b the momentum's buffer:

    (1)  g  = g + weight_decay * x                  coupled decay
    (2)  nu = gamma * nu + (1 - gamma) * |g|^2
    (3)  u  = g / sqrt(nu + eps)                    eps_in_sqrt=True, the textbook
         u  = g / (sqrt(nu) + eps)                  eps_in_sqrt=False, PyTorch
    (4)  u  = eta * u                               lr_in_momentum=True
    (5)  b  = momentum * b + u,   u = b             Nesterov: u = momentum * b + u
    (6)  x  = x - u - eta * weight_decay * x        the last term: decoupled decay

Without momentum, or with lr_in_momentum=False, eta multiplies u in (6), not in (4).
Centered, with mu the average of the gradient and nu that of the squared distance, (2)
is

    (2') nu = gamma * nu + (1 - gamma) * gamma * |g - mu|^2
         mu = gamma * mu + (1 - gamma) * g

which is the average of |g|^2 minus the square of the average of g, and never negative.
This module has (2), (2') and (3); `_rmsprop.step` combines all of them.

Source: Tieleman and Hinton, "Lecture 6.5 - rmsprop", Coursera: Neural Networks for
Machine Learning, 2012; the centered variant is equations 38 to 45 of Graves,
"Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850, 2013.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_rmsprop._arithmetic import (
    abs_square,
    bounded,
    bounded_square,
    map_real_imag,
    no_fma,
    positive,
)


class Decay(NamedTuple):
    """An average's decay, as scalars of the average's dtype.

    Attributes:
      gamma: the weight of the old value.
      old_is_heavier: whether gamma is at least the weight of the new value.
      step: the weight of the lighter value: 1 - gamma, or -gamma for a step back toward
        the old value.
    """

    gamma: jax.Array
    old_is_heavier: jax.Array
    step: jax.Array


def decay(gamma: jax.Array, one_minus_gamma: jax.Array) -> Decay:
    """Build the decay from both weights, since 1 - gamma in float32 is inexact."""
    old_is_heavier = gamma >= 0.5
    step = lax.select(old_is_heavier, one_minus_gamma, -gamma)
    return Decay(gamma, old_is_heavier, step)


def average(old: jax.Array, new: jax.Array, decay: Decay) -> jax.Array:
    """The moving average, as a step from the heavier of the two toward the other.

        gamma * old + (1 - gamma) * new  =  old + (1 - gamma) * (new - old)
                                         =  new - gamma * (new - old)

    In this form it is unbiased, although gamma and 1 - gamma are rounded separately,
    and the lighter term is not lost beside the heavier one.
    """
    anchor = lax.select(decay.old_is_heavier, old, new)
    return anchor + decay.step * (new - old)


def mean_square(nu: jax.Array, g: jax.Array, decay: Decay) -> jax.Array:
    """The new nu, (2), of g clipped to `largest`."""
    return average(nu, bounded_square(g), decay)


def mean_and_variance(
    mu: jax.Array, nu: jax.Array, g: jax.Array, decay: Decay
) -> tuple[jax.Array, jax.Array]:
    """The new mu and the new nu of the centered variant, (2')."""
    g = bounded(g)
    square = no_fma(decay.gamma * abs_square(g - mu))
    mu = map_real_imag(lambda old, new: average(old, new, decay), mu, g)
    return mu, average(nu, square, decay)


def scaled(
    g: jax.Array, nu: jax.Array, *, eps: jax.Array, eps_in_sqrt: bool
) -> jax.Array:
    """The step u, (3), for an eps > 0; a gradient of zero gives zero."""
    root = jnp.sqrt(nu + eps) if eps_in_sqrt else jnp.sqrt(positive(nu)) + eps
    return map_real_imag(lambda x: x / root, bounded(g))

"""MXNet's two RMSProps."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jax_rmsprop import _validate
from jax_rmsprop._validate import Number, NumberOrSchedule, is_zero
from jax_rmsprop.conventions._wrap import (
    Part,
    Transformation,
    chain,
    clipping,
    decayed,
    named,
    unless_zero,
)


def mxnet1(
    learning_rate: NumberOrSchedule = 0.001,
    gamma1: NumberOrSchedule = 0.9,
    gamma2: Number = 0.9,
    epsilon: Number = 1e-8,
    centered: bool = False,
    clip_weights: Number | None = None,
    *,
    rescale_grad: Number = 1.0,
    wd: Number = 0.0,
    clip_gradient: Number | None = None,
    begin_num_update: int = 0,
) -> Transformation:
    """MXNet 1's `mx.optimizer.RMSProp`: momentum only if `centered`.

        g = clip(rescale_grad * g + wd * x, -clip_gradient, clip_gradient)
        x = x - learning_rate * g / sqrt(nu + epsilon)                   not `centered`

        b = gamma2 * b + learning_rate * g / sqrt(nu + epsilon)          `centered`
        x = x - b

    and then x is clipped to [-clip_weights, clip_weights].

    Args:
      learning_rate: as in `rmsprop`; a schedule gets 0 first, where MXNet's
        `lr_scheduler` gets 1.
      gamma1: the average's decay.
      gamma2: the momentum if `centered`; else ignored.
      epsilon: as `eps` in `rmsprop`.
      centered: as in `rmsprop`.
      clip_weights: bound of the parameters, None or 0 for none. `update` needs them.
      rescale_grad: a factor of the gradient, >= 0.
      wd: weight decay, as in `rmsprop`.
      clip_gradient: bound of the gradient's elements, None or 0 for none.
      begin_num_update: the step at which a schedule begins.

    Example:
      >>> optimizer = mxnet1(0.002, gamma1=0.95, centered=True, clip_gradient=1.0)

    References:
      https://github.com/apache/mxnet/blob/1.9.1/src/operator/optimizer_op-inl.h
    """
    return _around(
        named(
            {"gamma": "gamma1", "momentum": "gamma2", "eps": "epsilon"},
            learning_rate=_offset_schedule(learning_rate, begin_num_update),
            gamma=gamma1,
            eps=epsilon,
            centered=centered,
            momentum=gamma2 if _validate.check_bool("centered", centered) else 0.0,
        ),
        decay_first=True,
        rescale_grad=rescale_grad,
        wd=wd,
        clip_gradient=clip_gradient,
        clip_weights=clip_weights,
    )


def mxnet2(
    learning_rate: NumberOrSchedule = 0.001,
    rho: NumberOrSchedule = 0.9,
    momentum: Number = 0.9,
    epsilon: Number = 1e-8,
    centered: bool = False,
    clip_weights: Number | None = None,
    use_fused_step: bool = True,
    *,
    rescale_grad: Number = 1.0,
    wd: Number = 0.0,
    clip_gradient: Number | None = None,
    begin_num_update: int = 0,
) -> Transformation:
    """MXNet 2's `mx.optimizer.RMSProp`: eps moves into the root if `centered`.

        g = clip(rescale_grad * g, -clip_gradient, clip_gradient) + wd * x
        x = x - learning_rate * g / (sqrt(nu) + epsilon)                 not `centered`

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)        `centered`
        x = x - b

    and then x is clipped to [-clip_weights, clip_weights].

    Args:
      learning_rate: as in `rmsprop`; a schedule gets 0 first, where MXNet's
        `lr_scheduler` gets 1.
      rho: the average's decay.
      momentum: as in `rmsprop` if `centered`; else ignored.
      epsilon: as `eps` in `rmsprop`.
      centered: as in `rmsprop`.
      clip_weights: bound of the parameters, None or 0 for none. `update` needs them.
      use_fused_step: ignored.
      rescale_grad: a factor of the gradient, >= 0.
      wd: weight decay, as in `rmsprop`.
      clip_gradient: bound of the gradient's elements, None or 0 for none.
      begin_num_update: the step at which a schedule begins.

    Example:
      >>> optimizer = mxnet2(0.002, rho=0.95, wd=1e-4)

    References:
      https://github.com/apache/mxnet/blob/2.0.0.beta1/python/mxnet/optimizer/rmsprop.py
    """
    del use_fused_step
    centered = _validate.check_bool("centered", centered)
    return _around(
        named(
            {"gamma": "rho", "eps": "epsilon"},
            learning_rate=_offset_schedule(learning_rate, begin_num_update),
            gamma=rho,
            eps=epsilon,
            eps_in_sqrt=centered,
            centered=centered,
            momentum=momentum if centered else 0.0,
        ),
        decay_first=False,
        rescale_grad=rescale_grad,
        wd=wd,
        clip_gradient=clip_gradient,
        clip_weights=clip_weights,
    )


def _around(
    optimizer: Transformation,
    *,
    decay_first: bool,
    rescale_grad: Number,
    wd: Number,
    clip_gradient: Number | None,
    clip_weights: Number | None,
) -> Transformation:
    """Add MXNet's scaling, decay and clipping before a step, its box for x after."""
    factor = _validate.check_scalar("rescale_grad", rescale_grad)
    same = isinstance(factor, float) and factor == 1.0
    scaled = None if same else optax.scale(factor)
    gradient = decayed("wd", wd), clipping("clip_gradient", clip_gradient)
    return chain(
        scaled,
        *(gradient if decay_first else gradient[::-1]),
        optimizer,
        _project_to_box(clip_weights),
    )


def _offset_schedule(value: NumberOrSchedule, count: Any) -> NumberOrSchedule:
    """The schedule advanced by `count` steps."""
    if is_zero(count) or not callable(value):
        return value
    return lambda step: value(step + count)


def _project_to_box(bound: Number | None) -> Part:
    """Shorten steps so that parameters stay in [-bound, bound]: a projection."""
    if bound is None or is_zero(bound):
        return None
    limit = _validate.check_scalar("clip_weights", bound)

    def project(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError(
                "`params` must be passed to `update` when `clip_weights` is given, "
                "got None"
            )
        box = optax.projections.projection_box
        return jax.tree.map(lambda x, u: box(x + u, -limit, limit) - x, params, updates)

    return unless_zero(limit, optax.stateless(project))

"""PyTorch's RMSProp, and those with its interface."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._validate import Number, NumberOrSchedule, is_zero
from jax_rmsprop.conventions._wrap import (
    Transformation,
    around,
    chain,
    check_positive,
    decayed,
    named,
)

_NAMES = {"learning_rate": "lr", "gamma": "alpha"}


def pytorch(
    lr: NumberOrSchedule = 1e-2,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
) -> Transformation:
    """PyTorch's `torch.optim.RMSprop`: eps outside the root, the rate after b.

        g = g + weight_decay * x             -g + weight_decay * x if `maximize`
        b = momentum * b + g / (sqrt(nu) + eps)
        x = x - lr * b

    A complex parameter is two real ones, as in PyTorch: each part has its own average,
    where `rmsprop` has one of `|g|^2`. `capturable`, `foreach` and `differentiable` are
    ignored.

    Example:
      >>> optimizer = pytorch(lr=1e-2, momentum=0.9, weight_decay=1e-4)

    References:
      https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/rmsprop.py
    """
    del capturable, foreach, differentiable
    optimizer = named(
        _NAMES,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        eps_in_sqrt=False,
        centered=centered,
        momentum=momentum,
        lr_in_momentum=False,
        weight_decay=weight_decay,
        decoupled_weight_decay=False,
    )
    if _validate.check_bool("maximize", maximize):
        optimizer = chain(optax.scale(-1.0), optimizer)
    return around(optax.contrib.split_real_and_imaginary(optimizer))


def timm(
    lr: NumberOrSchedule = 1e-2,
    alpha: NumberOrSchedule = 0.9,
    eps: Number = 1e-10,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    foreach: bool | None = None,
    *,
    max_lr: Number | None = None,
) -> Transformation:
    """The `RMSpropTF` of timm: PyTorch's names, TensorFlow's eps and initial nu.

        g = g + weight_decay * x                 unless `decoupled_decay`
        x = x - lr * weight_decay * x            if `decoupled_decay`
        b = momentum * b + lr * g / sqrt(nu + eps)
        x = x - b

    without `lr_in_momentum` as `pytorch`. With `corrected_weight_decay` the decoupled
    decay is lr^2 / max_lr * weight_decay. With `caution`, and only with momentum, the
    elements of b whose sign is not the gradient's are 0 in this step, and the rest of
    the leaf is divided by the fraction that remains, or by 1e-3 if that is more.

    Args:
      lr: the learning rate, as in `rmsprop`.
      alpha: the average's decay.
      eps: as in `rmsprop`.
      weight_decay: as in `rmsprop`.
      momentum: as in `rmsprop`.
      centered: as in `rmsprop`.
      decoupled_decay: as `decoupled_weight_decay` in `rmsprop`.
      corrected_weight_decay: also scale the decoupled decay by lr / max_lr.
      lr_in_momentum: as in `rmsprop`.
      caution: see above.
      foreach: ignored.
      max_lr: for `corrected_weight_decay`. By default the initial `lr`, as in timm;
        required if `lr` is a schedule.

    Example:
      >>> optimizer = timm(lr=0.01, momentum=0.9, weight_decay=1e-5, caution=True)

    References:
      https://github.com/huggingface/pytorch-image-models/blob/v1.0.31/timm/optim/rmsprop_tf.py;
      caution: Liang et al., Cautious Optimizers, 2024,
      https://arxiv.org/abs/2411.16085; the corrected decay: Defazio, Why Gradients
      Rapidly Increase Near the End of Training, 2025,
      https://arxiv.org/abs/2506.02285.
    """
    del foreach
    decoupled = _validate.check_bool("decoupled_decay", decoupled_decay)
    corrected = _validate.check_bool("corrected_weight_decay", corrected_weight_decay)
    amount = _validate.check_scalar("weight_decay", weight_decay)
    careful = _validate.check_bool("caution", caution) and not is_zero(momentum)
    # By default a number is its own maximum.
    squared = decoupled and corrected and (callable(lr) or max_lr is not None)
    if squared and max_lr is None:
        raise ValueError(
            "`max_lr` must be the highest learning rate if `lr` is a schedule and "
            "`corrected_weight_decay` is True, got None"
        )
    # Caution compares the step alone with the gradient, coupled decay included.
    apart = (careful or squared) and not is_zero(amount)
    optimizer = named(
        _NAMES,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        initial_scale=1.0,
        centered=centered,
        momentum=momentum,
        lr_in_momentum=lr_in_momentum,
        weight_decay=0.0 if apart else amount,
        decoupled_weight_decay=decoupled,
    )
    if careful:
        optimizer = around(optimizer, functools.partial(_cautious, momentum))
    if not apart:
        return optimizer
    if not decoupled:
        return chain(decayed("weight_decay", amount), optimizer)
    highest = (
        check_positive("max_lr", max_lr) if squared and max_lr is not None else None
    )
    return chain(optimizer, _scheduled_decay(lr, amount, highest))


def stable_baselines3(
    lr: NumberOrSchedule = 1e-2,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
) -> Transformation:
    """Stable-Baselines3's `RMSpropTFLike`: PyTorch's with nu from 1 and eps inside.

        g = g + weight_decay * x
        b = momentum * b + g / sqrt(nu + eps)
        x = x - lr * b

    Example:
      >>> optimizer = stable_baselines3(lr=7e-4, eps=1e-5)

    References:
      https://github.com/DLR-RM/stable-baselines3/blob/v2.9.2/stable_baselines3/common/sb2_compat/rmsprop_tf_like.py
    """
    return named(
        _NAMES,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        initial_scale=1.0,
        centered=centered,
        momentum=momentum,
        lr_in_momentum=False,
        weight_decay=weight_decay,
        decoupled_weight_decay=False,
    )


def bitsandbytes(
    lr: NumberOrSchedule = 1e-2,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
) -> Transformation:
    """`bnb.optim.RMSprop` of bitsandbytes, with its state in full precision.

        g = g + weight_decay * x
        x = x - lr * g / (sqrt(nu) + eps)

    bitsandbytes accepts `momentum` and ignores it. Here a traced one is ignored too,
    and a concrete one raises an error: use `pytorch`.

    Example:
      >>> optimizer = bitsandbytes(lr=1e-3, weight_decay=1e-4)

    References:
      https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/rmsprop.py
    """
    if not (is_zero(momentum) or isinstance(momentum, jax.core.Tracer)):
        raise ValueError(
            f"`momentum` must be 0, got {_validate.short_repr(momentum)}; bitsandbytes "
            "takes a momentum and ignores it: pass 0 for the same steps, or use "
            "conventions.pytorch for the momentum"
        )
    return named(
        _NAMES,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        eps_in_sqrt=False,
        weight_decay=weight_decay,
        decoupled_weight_decay=False,
    )


def _cautious(momentum: Number, steps: optax.Updates, updates: optax.Updates) -> Any:
    """Mask elements of a step that do not oppose the gradient, and scale the rest.

    Without momentum the step is unchanged.
    """

    def mask(step: jax.Array, g: jax.Array) -> jax.Array:
        kept = (step * g < 0).astype(step.dtype)
        careful = step * kept / jnp.maximum(kept.mean(), 1e-3)
        return jnp.where(jnp.asarray(momentum) == 0, step, careful.astype(step.dtype))

    return jax.tree.map(mask, steps, updates)


def _scheduled_decay(
    rate: NumberOrSchedule, weight_decay: Number, max_rate: Number | None
) -> optax.GradientTransformation:
    """Subtract rate^2 / max_rate * weight_decay * x; without `max_rate` just rate."""

    def factor(step: jax.Array) -> Number:
        eta = rate(step) if callable(rate) else rate
        return -weight_decay * eta * (1.0 if max_rate is None else eta / max_rate)

    # Injected, since Optax before 0.2.7 takes no schedule for a decay.
    return optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=factor)

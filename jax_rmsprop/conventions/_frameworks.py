"""One function for each framework: its argument names, their order and defaults."""

from __future__ import annotations

from typing import Any

import optax as _optax

from jax_rmsprop import _validate
from jax_rmsprop._validate import Number, NumberOrSchedule
from jax_rmsprop.conventions._parts import (
    Transformation,
    accumulate,
    at_most_one,
    beginning_at,
    begun,
    cautious,
    chain,
    clipping,
    every,
    inverse_time,
    is_zero,
    mxnet,
    positive,
    refuse,
    renamed,
    rmsprop_of,
    shrink,
    unscale,
)
from jax_rmsprop.storage import Storages, stored


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
    *,
    storage: Storages | None = None,
) -> Transformation:
    """PyTorch's `torch.optim.RMSprop`: eps outside the root, the rate after b.

        g = g + weight_decay * x             -g + weight_decay * x if `maximize`
        b = momentum * b + g / (sqrt(nu) + eps)
        x = x - lr * b

    A complex parameter is two real ones, as in PyTorch: its parts have an average
    each, where `rmsprop` keeps one of |g|^2. `capturable`, `foreach` and
    `differentiable` have no meaning here.

    Example:
      >>> optimizer = pytorch(lr=1e-2, momentum=0.9, weight_decay=1e-4)

    References:
      https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/rmsprop.py
    """
    del capturable, foreach, differentiable
    optimizer = rmsprop_of(
        "pytorch",
        storage=storage,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        centered=centered,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    climbs = _validate.check_bool("maximize", maximize)
    optimizer = chain(_optax.scale(-1.0) if climbs else None, optimizer)
    both = _optax.contrib.split_real_and_imaginary(optimizer)
    return renamed(_optax.with_extra_args_support(both), {})


def keras(
    learning_rate: NumberOrSchedule = 0.001,
    rho: NumberOrSchedule = 0.9,
    momentum: Number = 0.0,
    epsilon: Number = 1e-7,
    centered: bool = False,
    weight_decay: Number | None = None,
    clipnorm: Number | None = None,
    clipvalue: Number | None = None,
    global_clipnorm: Number | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: Number | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """Keras 3's `keras.optimizers.RMSprop`: eps inside the root, decoupled decay.

        g = g / loss_scale_factor, averaged over gradient_accumulation_steps, clipped
        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - learning_rate * weight_decay * x - b

    With `gradient_accumulation_steps`, a schedule counts gradients, not steps.

    Args:
      learning_rate: as in `rmsprop`.
      rho: the average's decay.
      momentum: as in `rmsprop`.
      epsilon: as `eps` in `rmsprop`.
      centered: as in `rmsprop`.
      weight_decay: as in `rmsprop`; None for none.
      clipnorm: the largest norm of each leaf's gradient; None or 0 for any.
      clipvalue: the largest size of a gradient's element, likewise.
      global_clipnorm: the largest norm of all gradients together, likewise. Only one
        of the three may be given.
      use_ema: must be False: an average of the parameters is no part of a step.
      ema_momentum: of no meaning without `use_ema`.
      ema_overwrite_frequency: likewise.
      loss_scale_factor: what the loss was multiplied by, > 0.
      gradient_accumulation_steps: how many gradients make a step, 2 or more.
      name: of no meaning here.
      storage: as in `rmsprop`.

    Example:
      >>> optimizer = keras(learning_rate=1e-3, rho=0.95, global_clipnorm=1.0)

    References:
      https://github.com/keras-team/keras/blob/v3.15.1/keras/src/optimizers/rmsprop.py
    """
    del ema_momentum, ema_overwrite_frequency, name
    advice = "average the parameters after each step with optax.incremental_update"
    refuse("use_ema", use_ema, False, advice)
    clips = {
        "clipnorm": clipnorm,
        "clipvalue": clipvalue,
        "global_clipnorm": global_clipnorm,
    }
    at_most_one(clips)
    if gradient_accumulation_steps is not None:
        _validate.check_int(
            "gradient_accumulation_steps", gradient_accumulation_steps, low=2
        )
    steps = gradient_accumulation_steps or 1
    optimizer = chain(
        unscale(loss_scale_factor),
        *(clipping(n, bound) for n, bound in clips.items()),
        rmsprop_of(
            "keras",
            storage=storage,
            learning_rate=every(steps, learning_rate),
            gamma=every(steps, rho),
            eps=epsilon,
            centered=centered,
            momentum=momentum,
            weight_decay=0.0 if weight_decay is None else weight_decay,
        ),
    )
    return optimizer if steps == 1 else accumulate(optimizer, steps)


def tensorflow1(
    learning_rate: NumberOrSchedule,
    decay: NumberOrSchedule = 0.9,
    momentum: Number = 0.0,
    epsilon: Number = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
    *,
    storage: Storages | None = None,
) -> Transformation:
    """TensorFlow 1's `tf.train.RMSPropOptimizer`: nu starts at 1, eps inside the root.

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - b

    `use_locking` and `name` have no meaning here.

    Example:
      >>> optimizer = tensorflow1(0.016, momentum=0.9, epsilon=1e-3)

    References:
      https://github.com/tensorflow/tensorflow/blob/v2.21.0/tensorflow/python/training/rmsprop.py
    """
    del use_locking, name
    return rmsprop_of(
        "tensorflow1",
        storage=storage,
        learning_rate=learning_rate,
        gamma=decay,
        eps=epsilon,
        centered=centered,
        momentum=momentum,
    )


def tf_keras_v2(
    learning_rate: NumberOrSchedule = 0.001,
    rho: NumberOrSchedule = 0.9,
    momentum: Number = 0.0,
    epsilon: Number | None = 1e-7,
    centered: bool = False,
    name: str = "RMSprop",
    *,
    clipnorm: Number | None = None,
    clipvalue: Number | None = None,
    global_clipnorm: Number | None = None,
    lr: NumberOrSchedule | None = None,
    decay: Number = 0.0,
    storage: Storages | None = None,
) -> Transformation:
    """`tf.keras.optimizers.legacy.RMSprop`: eps moves into the root with momentum.

        x = x - learning_rate * g / (sqrt(nu) + epsilon)             momentum = 0

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)    momentum > 0
        x = x - b

    Args:
      learning_rate: as in `rmsprop`.
      rho: the average's decay.
      momentum: as in `rmsprop`.
      epsilon: as `eps` in `rmsprop`; None and 0 mean 1e-7, as they do there.
      centered: as in `rmsprop`.
      name: of no meaning here.
      clipnorm: the largest norm of each leaf's gradient, > 0, or None.
      clipvalue: the largest size of a gradient's element, > 0, or None; comes first.
      global_clipnorm: the largest norm of all gradients together, > 0, or None; not
        with `clipnorm`.
      lr: the old name of `learning_rate`, which it overrides.
      decay: divides the learning rate by 1 + decay * step, >= 0.
      storage: as in `rmsprop`.

    Example:
      >>> optimizer = tf_keras_v2(learning_rate=1e-3, momentum=0.9, clipvalue=1.0)

    References:
      https://github.com/keras-team/tf-keras/blob/v2.21.0/tf_keras/src/optimizers/legacy/rmsprop.py
    """
    del name
    at_most_one({"clipnorm": clipnorm, "global_clipnorm": global_clipnorm})
    rate = learning_rate if lr is None else lr
    return chain(
        clipping("clipvalue", clipvalue, zero_is_none=False),
        clipping("clipnorm", clipnorm, zero_is_none=False),
        clipping("global_clipnorm", global_clipnorm, zero_is_none=False),
        rmsprop_of(
            "tf_keras_v2",
            storage=storage,
            learning_rate=inverse_time(rate, _validate.check_scalar("decay", decay)),
            gamma=rho,
            eps=1e-7 if epsilon is None or is_zero(epsilon) else epsilon,
            eps_in_sqrt=not is_zero(momentum),
            centered=centered,
            momentum=momentum,
        ),
    )


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
    storage: Storages | None = None,
) -> Transformation:
    """The `RMSpropTF` of timm: PyTorch's names, TensorFlow's eps and initial nu.

        g = g + weight_decay * x                 unless `decoupled_decay`
        x = x - lr * weight_decay * x            if `decoupled_decay`
        b = momentum * b + lr * g / sqrt(nu + eps)
        x = x - b

    without `lr_in_momentum` as `pytorch`. With `corrected_weight_decay` the decoupled
    decay is lr^2 / max_lr * weight_decay. With `caution`, and only with momentum, the
    elements of b whose sign is not the gradient's are 0 in this step, and the rest of
    the leaf is divided by the fraction that is left, or by 1e-3 if that is more.

    Args:
      lr: the learning rate, as in `rmsprop`.
      alpha: the average's decay.
      eps: as in `rmsprop`.
      weight_decay: as in `rmsprop`.
      momentum: as in `rmsprop`.
      centered: as in `rmsprop`.
      decoupled_decay: as `decoupled_weight_decay` in `rmsprop`.
      corrected_weight_decay: scale the decoupled decay with lr / max_lr besides.
      lr_in_momentum: as in `rmsprop`.
      caution: see above.
      foreach: of no meaning here.
      max_lr: for `corrected_weight_decay`. timm takes the `lr` with which it was made,
        before any scheduler; so does this, but if `lr` is a schedule it must be given.
      storage: as in `rmsprop`.

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
    careful = _validate.check_bool("caution", caution) and not is_zero(momentum)
    # Unless told otherwise, a number is its own highest.
    squared = decoupled and corrected and (callable(lr) or max_lr is not None)
    if squared and max_lr is None:
        raise ValueError(
            "`max_lr` must be the highest learning rate if `lr` is a schedule and "
            "`corrected_weight_decay` is True, got None"
        )
    amount = _validate.check_scalar("weight_decay", weight_decay)
    # Caution is for the step alone, and for a gradient with its coupled decay.
    apart = (careful or squared) and not is_zero(amount)
    optimizer = rmsprop_of(
        "timm",
        storage=storage,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        centered=centered,
        momentum=momentum,
        lr_in_momentum=lr_in_momentum,
        weight_decay=0.0 if apart else amount,
        decoupled_weight_decay=decoupled,
    )
    if careful:
        optimizer = cautious(optimizer)
    if not apart:
        return optimizer
    if not decoupled:
        return chain(_optax.add_decayed_weights(amount), optimizer)
    highest = positive("max_lr", max_lr) if squared and max_lr is not None else None
    return chain(optimizer, shrink(lr, amount, highest))


def stable_baselines3(
    lr: NumberOrSchedule = 1e-2,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    *,
    storage: Storages | None = None,
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
    return rmsprop_of(
        "stable_baselines3",
        storage=storage,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        centered=centered,
        momentum=momentum,
        weight_decay=weight_decay,
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
    lr_scheduler: None = None,
    begin_num_update: int = 0,
    multi_precision: bool = False,
    param_idx2name: None = None,
    sym: None = None,
    param_dict: None = None,
    storage: Storages | None = None,
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
      gamma2: the momentum, if `centered`; else of no meaning.
      epsilon: as `eps` in `rmsprop`.
      centered: as in `rmsprop`.
      clip_weights: bound of the parameters, None or 0 for none. `update` needs them.
      rescale_grad: a factor of the gradient, >= 0.
      wd: weight decay, as in `rmsprop`.
      clip_gradient: bound of the gradient's elements, None or 0 for none.
      lr_scheduler: must be None: a schedule is a `learning_rate` here.
      begin_num_update: the step at which a schedule begins.
      multi_precision: must be False.
      param_idx2name: must be None, as must `sym` and `param_dict`: settings of their
        own for some parameters are an `optax.partition`.
      sym: see `param_idx2name`.
      param_dict: see `param_idx2name`.
      storage: as in `rmsprop`.

    Example:
      >>> optimizer = mxnet1(0.002, gamma1=0.95, centered=True, clip_gradient=1.0)

    References:
      https://github.com/apache/mxnet/blob/1.9.1/src/operator/optimizer_op-inl.h
    """
    return mxnet(
        rmsprop_of(
            "mxnet1",
            storage=storage,
            learning_rate=begun(learning_rate, begin_num_update),
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
        lr_scheduler=lr_scheduler,
        multi_precision=multi_precision,
        param_idx2name=param_idx2name,
        sym=sym,
        param_dict=param_dict,
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
    lr_scheduler: None = None,
    begin_num_update: int = 0,
    multi_precision: bool = False,
    param_idx2name: None = None,
    sym: None = None,
    param_dict: None = None,
    storage: Storages | None = None,
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
      momentum: as in `rmsprop`, if `centered`; else of no meaning.
      epsilon: as `eps` in `rmsprop`.
      centered: as in `rmsprop`.
      clip_weights: bound of the parameters, None or 0 for none. `update` needs them.
      use_fused_step: of no meaning here.
      rescale_grad: a factor of the gradient, >= 0.
      wd: weight decay, as in `rmsprop`.
      clip_gradient: bound of the gradient's elements, None or 0 for none.
      lr_scheduler: must be None: a schedule is a `learning_rate` here.
      begin_num_update: the step at which a schedule begins.
      multi_precision: must be False.
      param_idx2name: must be None, as must `sym` and `param_dict`: settings of their
        own for some parameters are an `optax.partition`.
      sym: see `param_idx2name`.
      param_dict: see `param_idx2name`.
      storage: as in `rmsprop`.

    Example:
      >>> optimizer = mxnet2(0.002, rho=0.95, wd=1e-4)

    References:
      https://github.com/apache/mxnet/blob/2.0.0.beta1/python/mxnet/optimizer/rmsprop.py
    """
    del use_fused_step
    centered = _validate.check_bool("centered", centered)
    return mxnet(
        rmsprop_of(
            "mxnet2",
            storage=storage,
            learning_rate=begun(learning_rate, begin_num_update),
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
        lr_scheduler=lr_scheduler,
        multi_precision=multi_precision,
        param_idx2name=param_idx2name,
        sym=sym,
        param_dict=param_dict,
    )


def optax(
    learning_rate: NumberOrSchedule,
    decay: NumberOrSchedule = 0.9,
    eps: Number = 1e-8,
    initial_scale: Number = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Number | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """Optax's `optax.rmsprop`.

        b = momentum * b + learning_rate * g / sqrt(nu + eps)
        x = x - b

    with `eps_in_sqrt` and `nesterov` as in `rmsprop`. With `bias_correction` nu is
    divided by 1 - decay^t, whatever its initial value; `centered` besides is refused.

    Example:
      >>> optimizer = optax(1e-3, decay=0.99, eps_in_sqrt=False)

    References:
      https://github.com/google-deepmind/optax/blob/v0.2.8/optax/_src/alias.py
    """
    scale = _validate.check_scalar("initial_scale", initial_scale)
    optimizer = rmsprop_of(
        "optax",
        learning_rate=learning_rate,
        gamma=decay,
        eps=eps,
        eps_in_sqrt=eps_in_sqrt,
        initial_scale=0.0 if bias_correction else scale,
        centered=centered,
        bias_correction=bias_correction,
        momentum=momentum,
        nesterov=_validate.check_bool("nesterov", nesterov)
        and momentum is not None
        and not is_zero(momentum),
    )
    if bias_correction and not is_zero(scale):
        optimizer = beginning_at(optimizer, scale)
    return optimizer if storage is None else stored(optimizer, storage)


def bitsandbytes(
    lr: NumberOrSchedule = 1e-2,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    optim_bits: int = 32,
    args: Any = None,
    min_8bit_size: int = 4096,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """`bnb.optim.RMSprop` of bitsandbytes, with its state in full precision.

        g = g + weight_decay * x
        x = x - lr * g / (sqrt(nu) + eps)

    bitsandbytes takes `momentum` and computes without it, and refuses `centered`: both
    are refused here, `pytorch` has them. `args` and `min_8bit_size` have no meaning
    here; `optim_bits` must be 32.

    Example:
      >>> optimizer = bitsandbytes(lr=1e-3, weight_decay=1e-4)

    References:
      https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/rmsprop.py
    """
    del args, min_8bit_size
    advice = (
        "bitsandbytes takes a momentum and ignores it: pass 0 for the same steps, or "
        "use conventions.pytorch for the momentum"
    )
    refuse("momentum", 0 if is_zero(momentum) else momentum, 0, advice)
    refuse(
        "centered", centered, False, "as in bitsandbytes; conventions.pytorch has it"
    )
    refuse("optim_bits", optim_bits, 32, "the state is in full precision here")
    return rmsprop_of(
        "bitsandbytes",
        storage=storage,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        weight_decay=weight_decay,
    )


def chainer(
    lr: NumberOrSchedule = 0.01,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    eps_inside_sqrt: bool = False,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """Chainer's `chainer.optimizers.RMSprop`.

        x = x - lr * g / (sqrt(nu) + eps)          or, if `eps_inside_sqrt`,
        x = x - lr * g / sqrt(nu + eps)

    Example:
      >>> optimizer = chainer(lr=1e-3, eps_inside_sqrt=True)

    References:
      https://github.com/chainer/chainer/blob/v7.8.1/chainer/optimizers/rmsprop.py
    """
    return rmsprop_of(
        "chainer",
        storage=storage,
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        eps_in_sqrt=_validate.check_bool("eps_inside_sqrt", eps_inside_sqrt),
    )


def paddle(
    learning_rate: NumberOrSchedule,
    rho: NumberOrSchedule = 0.95,
    epsilon: Number = 1e-6,
    momentum: Number = 0.0,
    centered: bool = False,
    parameters: None = None,
    weight_decay: Number | None = None,
    grad_clip: None = None,
    name: str | None = None,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """PaddlePaddle's `paddle.optimizer.RMSProp`.

        g = g + weight_decay * x
        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - b

    `parameters` must be None (they are passed to `init`), and so must `grad_clip`,
    an object of Paddle's; Paddle clips before the decay, so put Optax's clipping before
    this in a chain. `name` has no meaning here.

    Example:
      >>> optimizer = paddle(0.01, momentum=0.9, weight_decay=1e-4)

    References:
      https://github.com/PaddlePaddle/Paddle/blob/v3.3.1/python/paddle/optimizer/rmsprop.py
    """
    del name
    refuse("parameters", parameters, None, "pass them to `init`")
    advice = "put one of Optax's clippings before this in a chain"
    refuse("grad_clip", grad_clip, None, advice)
    return rmsprop_of(
        "paddle",
        storage=storage,
        learning_rate=learning_rate,
        gamma=rho,
        eps=epsilon,
        centered=centered,
        momentum=momentum,
        weight_decay=0.0 if weight_decay is None else weight_decay,
    )


def mlx(
    learning_rate: NumberOrSchedule,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """MLX's `mlx.optimizers.RMSprop`.

        x = x - learning_rate * g / (sqrt(nu) + eps)

    Example:
      >>> optimizer = mlx(1e-3)

    References:
      https://github.com/ml-explore/mlx/blob/v0.32.4/python/mlx/optimizers/optimizers.py
    """
    return rmsprop_of(
        "mlx", storage=storage, learning_rate=learning_rate, gamma=alpha, eps=eps
    )


def flax_legacy(
    learning_rate: NumberOrSchedule,
    beta2: NumberOrSchedule = 0.9,
    eps: Number = 1e-8,
    centered: bool = False,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """`flax.optim.RMSProp`, which Flax had before it took up Optax.

        x = x - learning_rate * g / (sqrt(nu) + eps)

    Example:
      >>> optimizer = flax_legacy(1e-3, centered=True)

    References:
      https://github.com/google/flax/blob/v0.3.4/flax/optim/rmsprop.py
    """
    return rmsprop_of(
        "flax_legacy",
        storage=storage,
        learning_rate=learning_rate,
        gamma=beta2,
        eps=eps,
        centered=centered,
    )


def jax_example_libraries(
    step_size: NumberOrSchedule,
    gamma: NumberOrSchedule = 0.9,
    eps: Number = 1e-8,
    momentum: Number = 0.0,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """`rmsprop` and, with momentum, `rmsprop_momentum` of `jax.example_libraries`.

        b = momentum * b + step_size * g / sqrt(nu + eps)
        x = x - b

    `rmsprop_momentum` has a default momentum of 0.9.

    Example:
      >>> optimizer = jax_example_libraries(1e-3, momentum=0.9)

    References:
      https://github.com/jax-ml/jax/blob/jax-v0.10.2/jax/example_libraries/optimizers.py
    """
    return rmsprop_of(
        "jax_example_libraries",
        storage=storage,
        learning_rate=step_size,
        gamma=gamma,
        eps=eps,
        momentum=momentum,
    )


def sonnet(
    learning_rate: NumberOrSchedule,
    decay: NumberOrSchedule = 0.9,
    momentum: Number = 0.0,
    epsilon: Number = 1e-10,
    centered: bool = False,
    name: str | None = None,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """Sonnet 2's `snt.optimizers.RMSProp`: TensorFlow 1's with nu from 0.

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - b

    `name` has no meaning here.

    Example:
      >>> optimizer = sonnet(1e-3, momentum=0.9)

    References:
      https://github.com/google-deepmind/sonnet/blob/v2.0.2/sonnet/src/optimizers/rmsprop.py
    """
    del name
    return rmsprop_of(
        "sonnet",
        storage=storage,
        learning_rate=learning_rate,
        gamma=decay,
        eps=epsilon,
        centered=centered,
        momentum=momentum,
    )


def d2l(
    lr: NumberOrSchedule,
    gamma: NumberOrSchedule = 0.9,
    *,
    storage: Storages | None = None,
) -> Transformation:
    """The textbook's RMSProp from scratch, with its eps of 1e-6.

        x = x - lr * g / sqrt(nu + 1e-6)

    Example:
      >>> optimizer = d2l(0.4, gamma=0.9)

    References:
      Zhang et al., Dive into Deep Learning, section 12.8,
      https://d2l.ai/chapter_optimization/rmsprop.html
    """
    return rmsprop_of("d2l", storage=storage, learning_rate=lr, gamma=gamma, eps=1e-6)

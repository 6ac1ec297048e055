"""The RMSProps of TensorFlow, Keras and Sonnet."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._validate import Number, NumberOrSchedule, is_zero
from jax_rmsprop.conventions._wrap import (
    Part,
    Transformation,
    around,
    chain,
    check_positive,
    clipping,
    named,
)

_RHO = {"gamma": "rho", "eps": "epsilon"}
_DECAY = {"gamma": "decay", "eps": "epsilon"}


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
    *,
    loss_scale_factor: Number | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
) -> Transformation:
    """Keras 3's `keras.optimizers.RMSprop`: eps inside the root, decoupled decay.

        g = g / loss_scale_factor, averaged over gradient_accumulation_steps, clipped
        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - learning_rate * weight_decay * x - b

    With `gradient_accumulation_steps`, a schedule counts gradients, not steps. Keras's
    `use_ema` averages the parameters, which is not part of a step: use
    `optax.incremental_update` after it.

    Args:
      learning_rate: as in `rmsprop`.
      rho: the average's decay.
      momentum: as in `rmsprop`.
      epsilon: as `eps` in `rmsprop`.
      centered: as in `rmsprop`.
      weight_decay: as in `rmsprop`; None for none.
      clipnorm: largest norm of the gradient of each leaf; None or 0 for no limit.
      clipvalue: largest magnitude of an element; None or 0 for no limit.
      global_clipnorm: largest norm of all gradients together; None or 0 for no limit.
        Only one of the three may be given.
      loss_scale_factor: the factor by which the loss was multiplied, > 0.
      gradient_accumulation_steps: the number of gradients per step, 2 or more.
      name: ignored.

    Example:
      >>> optimizer = keras(learning_rate=1e-3, rho=0.95, global_clipnorm=1.0)

    References:
      https://github.com/keras-team/keras/blob/v3.15.1/keras/src/optimizers/rmsprop.py
    """
    del name
    clips = {
        "clipnorm": clipnorm,
        "clipvalue": clipvalue,
        "global_clipnorm": global_clipnorm,
    }
    _check_at_most_one(clips)
    if gradient_accumulation_steps is not None:
        _validate.check_int(
            "gradient_accumulation_steps", gradient_accumulation_steps, low=2
        )
    steps = gradient_accumulation_steps or 1
    optimizer = chain(
        _unscale_gradient(loss_scale_factor),
        *(clipping(n, bound) for n, bound in clips.items()),
        named(
            _RHO,
            learning_rate=_per_microbatch(steps, learning_rate),
            gamma=_per_microbatch(steps, rho),
            eps=epsilon,
            centered=centered,
            momentum=momentum,
            weight_decay=0.0 if weight_decay is None else weight_decay,
        ),
    )
    return optimizer if steps == 1 else _accumulate(optimizer, steps)


def tensorflow1(
    learning_rate: NumberOrSchedule,
    decay: NumberOrSchedule = 0.9,
    momentum: Number = 0.0,
    epsilon: Number = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
) -> Transformation:
    """TensorFlow 1's `tf.train.RMSPropOptimizer`: nu starts at 1, eps inside the root.

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - b

    `use_locking` and `name` are ignored.

    Example:
      >>> optimizer = tensorflow1(0.016, momentum=0.9, epsilon=1e-3)

    References:
      https://github.com/tensorflow/tensorflow/blob/v2.21.0/tensorflow/python/training/rmsprop.py
    """
    del use_locking, name
    return named(
        _DECAY,
        initial_scale=1.0,
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
) -> Transformation:
    """`tf.keras.optimizers.legacy.RMSprop`: eps moves into the root with momentum.

        x = x - learning_rate * g / (sqrt(nu) + epsilon)             momentum = 0

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)    momentum > 0
        x = x - b

    Args:
      learning_rate: as in `rmsprop`.
      rho: the average's decay.
      momentum: as in `rmsprop`.
      epsilon: as `eps` in `rmsprop`; None and 0 mean 1e-7, as in tf.keras.
      centered: as in `rmsprop`.
      name: ignored.
      clipnorm: the largest norm of each leaf's gradient, > 0, or None.
      clipvalue: the largest magnitude of an element, > 0, or None; applied first.
      global_clipnorm: the largest norm of all gradients together, > 0, or None; not
        with `clipnorm`.
      lr: the old name of `learning_rate`, which it overrides.
      decay: divides the learning rate by 1 + decay * step, >= 0.

    Example:
      >>> optimizer = tf_keras_v2(learning_rate=1e-3, momentum=0.9, clipvalue=1.0)

    References:
      https://github.com/keras-team/tf-keras/blob/v2.21.0/tf_keras/src/optimizers/legacy/rmsprop.py
    """
    del name
    _check_at_most_one({"clipnorm": clipnorm, "global_clipnorm": global_clipnorm})
    rate = learning_rate if lr is None else lr
    inside, outside = (
        named(
            _RHO,
            learning_rate=_inverse_time(rate, _validate.check_scalar("decay", decay)),
            gamma=rho,
            eps=1e-7 if epsilon is None or is_zero(epsilon) else epsilon,
            eps_in_sqrt=eps_in_sqrt,
            centered=centered,
            momentum=momentum,
        )
        for eps_in_sqrt in (True, False)
    )
    optimizer = outside if is_zero(momentum) else inside
    if isinstance(momentum, jax.core.Tracer):
        optimizer = _either(momentum == 0, outside, inside)
    return chain(
        clipping("clipvalue", clipvalue, zero_is_none=False),
        clipping("clipnorm", clipnorm, zero_is_none=False),
        clipping("global_clipnorm", global_clipnorm, zero_is_none=False),
        optimizer,
    )


def _either(
    first: jax.Array, one: Transformation, other: Transformation
) -> Transformation:
    """Choose between two transformations with the same state by a traced bool."""

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        return jax.tree.map(
            lambda a, b: jnp.where(first, a, b),
            one.update(updates, state, params, **extra_args),
            other.update(updates, state, params, **extra_args),
        )

    return optax.GradientTransformationExtraArgs(one.init, update)


def sonnet(
    learning_rate: NumberOrSchedule,
    decay: NumberOrSchedule = 0.9,
    momentum: Number = 0.0,
    epsilon: Number = 1e-10,
    centered: bool = False,
    name: str | None = None,
) -> Transformation:
    """Sonnet 2's `snt.optimizers.RMSProp`: TensorFlow 1's with nu from 0.

        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - b

    `name` is ignored.

    Example:
      >>> optimizer = sonnet(1e-3, momentum=0.9)

    References:
      https://github.com/google-deepmind/sonnet/blob/v2.0.2/sonnet/src/optimizers/rmsprop.py
    """
    del name
    return named(
        _DECAY,
        learning_rate=learning_rate,
        gamma=decay,
        eps=epsilon,
        centered=centered,
        momentum=momentum,
    )


def _check_at_most_one(arguments: Mapping[str, Any]) -> None:
    """Check that at most one of the arguments is given."""
    given = [
        f"`{name}` {_validate.short_repr(value)}"
        for name, value in arguments.items()
        if value is not None
    ]
    if len(given) > 1:
        names = ", ".join(f"`{n}`" for n in arguments)
        raise ValueError(f"only one of {names} may be given, got {' and '.join(given)}")


def _unscale_gradient(factor: Number | None) -> Part:
    """Divide the gradient by the factor of the loss."""
    if factor is None:
        return None
    return optax.scale(1 / check_positive("loss_scale_factor", factor))


def _accumulate(optimizer: Transformation, steps: int) -> Transformation:
    """Step once for `steps` gradients, with their mean."""
    # Since Optax 0.2.8 the mean is float32 by default; before, it had the parameters'
    # dtype.
    dtype: dict[str, Any] = {"accumulator_dtype": float}
    known = inspect.signature(optax.MultiSteps).parameters
    wrapper = optax.MultiSteps(
        optimizer, steps, **{k: v for k, v in dtype.items() if k in known}
    )
    return around(wrapper.gradient_transformation())


def _per_microbatch(steps: int, value: NumberOrSchedule) -> NumberOrSchedule:
    """Turn a schedule over gradients into one over steps of `steps` gradients each."""
    if steps == 1 or not callable(value):
        return value
    return lambda count: value(steps * count + steps - 1)


def _inverse_time(rate: NumberOrSchedule, decay: Number) -> NumberOrSchedule:
    """The learning rate divided by 1 + decay * step, Keras's old schedule."""
    rate = _validate.check_scalar("learning_rate", rate, schedule=True)
    if is_zero(decay):
        return rate

    def schedule(step: Any) -> Any:
        eta = rate(step) if callable(rate) else rate
        return eta / (1 + decay * jnp.asarray(step, float))

    return schedule

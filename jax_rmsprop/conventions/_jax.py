"""RMSProps of JAX libraries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax as _optax

from jax_rmsprop import _validate
from jax_rmsprop._validate import Number, NumberOrSchedule, is_zero
from jax_rmsprop.conventions._wrap import Transformation, named


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
) -> Transformation:
    """Optax's `optax.rmsprop`.

        b = momentum * b + learning_rate * g / sqrt(nu + eps)
        x = x - b

    with `eps_in_sqrt` and `nesterov` as in `rmsprop`. With `bias_correction` nu is
    divided by 1 - decay^t for any initial value; it excludes `centered`.

    Example:
      >>> optimizer = optax(1e-3, decay=0.99, eps_in_sqrt=False)

    References:
      https://github.com/google-deepmind/optax/blob/v0.2.8/optax/_src/alias.py
    """
    scale = _validate.check_scalar("initial_scale", initial_scale)
    bias_correction = _validate.check_bool("bias_correction", bias_correction)
    optimizer = named(
        {"gamma": "decay"},
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
        optimizer = _with_initial_nu(optimizer, scale)
    return optimizer


def flax_legacy(
    learning_rate: NumberOrSchedule,
    beta2: NumberOrSchedule = 0.9,
    eps: Number = 1e-8,
    centered: bool = False,
) -> Transformation:
    """`flax.optim.RMSProp`, from before Flax adopted Optax.

        x = x - learning_rate * g / (sqrt(nu) + eps)

    Example:
      >>> optimizer = flax_legacy(1e-3, centered=True)

    References:
      https://github.com/google/flax/blob/v0.3.4/flax/optim/rmsprop.py
    """
    return named(
        {"gamma": "beta2"},
        learning_rate=learning_rate,
        gamma=beta2,
        eps=eps,
        eps_in_sqrt=False,
        centered=centered,
    )


def jax_example_libraries(
    step_size: NumberOrSchedule,
    gamma: NumberOrSchedule = 0.9,
    eps: Number = 1e-8,
    momentum: Number = 0.0,
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
    return named(
        {"learning_rate": "step_size"},
        learning_rate=step_size,
        gamma=gamma,
        eps=eps,
        momentum=momentum,
    )


def _with_initial_nu(optimizer: Transformation, scale: Any) -> Transformation:
    """Start nu at `scale`, with a weight of 0."""

    def init(params: _optax.Params) -> Any:
        state: Any = optimizer.init(params)
        nu = jax.tree.map(lambda n: n + jnp.asarray(scale, n.dtype), state.nu)
        return state._replace(nu=nu)

    return _optax.GradientTransformationExtraArgs(init, optimizer.update)

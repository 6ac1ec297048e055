"""LaProp, and DreamerV3's: RMSProp whose scaled gradients are averaged.

Adam averages the gradient and scales the average; here each gradient is scaled by its
own step's root, and what is averaged is bounded. Both averages are divided by the
weight that they have collected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jax_rmsprop import _validate
from jax_rmsprop._hyperparameters import check_hyperparameters
from jax_rmsprop._jit import jit_transformation
from jax_rmsprop._optimizer import get_count
from jax_rmsprop._precision import once_rounded
from jax_rmsprop._transform import uncompiled_scale_by_rmsprop
from jax_rmsprop._validate import Number, NumberOrSchedule, Schedule, is_zero
from jax_rmsprop.conventions._parts import (
    Transformation,
    check_only_value,
    with_clear_errors,
)
from jax_rmsprop.conventions._table import CONVENTIONS

_AVERAGE = {"eps_in_sqrt": False, "centered": False, "bias_correction": True}


def laprop(
    lr: NumberOrSchedule = 4e-4,
    betas: Sequence[Any] = (0.9, 0.999),
    eps: Number = 1e-15,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    centered: bool = False,
) -> Transformation:
    """LaProp as its authors publish it: the average of RMSProp's steps.

        u = g / (sqrt(nu / n) + eps)
        b = beta1 * b + (1 - beta1) * lr * u
        x = x - b / (c / lr)
        x = x - weight_decay * x

    n is the weight that nu has collected, 1 - beta2^t, and c the average of the rate,
    c = beta1 * c + (1 - beta1) * lr, which is (1 - beta1^t) * lr where the rate is
    constant. The decay is of the parameters after the step, and not multiplied by the
    rate.

    Args:
      lr: >= 0, a number, array, tracer or schedule.
      betas: the decay of the average of the steps, and of that of the squares; each in
        [0, 1], numbers or tracers.
      eps: >= 0, added outside the root.
      weight_decay: >= 0.
      amsgrad: must be False.
      centered: must be False; the published code begins it after ten steps.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = laprop(lr=0.01)
      >>> x = jnp.array([1e-3, -10.0])
      >>> updates, state = optimizer.update(x, optimizer.init(x))
      >>> print(updates)
      [-0.01  0.01]

    References:
      Ziyin, Wang and Ueda, LaProp: Separating Momentum and Adaptivity in Adam, 2020,
      https://arxiv.org/abs/2002.04839;
      https://github.com/Z-T-WANG/LaProp-Optimizer/blob/master/laprop.py
    """
    check_only_value(
        "amsgrad", amsgrad, False, "it is another optimizer: optax.amsgrad"
    )
    advice = "scale_by_rmsprop(centered=True) and optax.ema make one without bias"
    check_only_value("centered", centered, False, advice)
    pair: Any = betas
    if not isinstance(pair, Sequence) or len(betas) != 2:
        raise TypeError(
            "`betas` must be a pair of numbers in [0, 1], got "
            + _validate.short_repr(betas)
        )
    beta1, beta2 = (_validate.check_scalar("betas", beta, high=1) for beta in betas)
    numbers = {
        "learning_rate": _validate.check_scalar("lr", lr, schedule=True),
        "beta1": beta1,
    }
    if not is_zero(weight_decay):
        numbers["weight_decay"] = _validate.check_scalar("weight_decay", weight_decay)
    return _built("laprop", _laprop, beta2, eps, numbers, "weight_decay")


def _laprop(
    *,
    learning_rate: jax.Array,
    beta1: jax.Array,
    weight_decay: jax.Array | None = None,
    **average: Any,
) -> optax.GradientTransformation:
    def chain(fit: Callable[[Any], Any]) -> optax.GradientTransformation:
        decay = fit(weight_decay)
        return optax.chain(
            optax.identity(),
            uncompiled_scale_by_rmsprop(**average),
            _average_of_steps(fit(learning_rate), fit(beta1)),
            optax.identity() if decay is None else _shrink_after(decay),
        )

    return once_rounded(chain, None if weight_decay is None else "weight_decay")


def dreamer_v3(
    lr: NumberOrSchedule = 4e-5,
    agc: Number = 0.3,
    eps: Number = 1e-20,
    beta1: Number = 0.9,
    beta2: NumberOrSchedule = 0.999,
    warmup: int = 1000,
) -> Transformation:
    """DreamerV3's optimizer: clipped, scaled, averaged, with a warm-up.

        g = g / max(1, |g| / (agc * max(1e-3, |x|)))         norms of a whole leaf
        u = g / (sqrt(nu / n) + eps)
        b = beta1 * b + (1 - beta1) * u
        x = x - lr * min(1, t / warmup) * b / (1 - beta1^t)

    with n = 1 - beta2^t, and t steps before this one in the warm-up, so that the first
    step is zero.

    Args:
      lr: >= 0; a schedule begins when the warm-up, to its first value, has ended.
      agc: the largest norm of a leaf's gradient, as a part of its parameters', > 0; 0
        for any.
      eps: >= 0, added outside the root.
      beta1: the decay of the average of the steps, in [0, 1).
      beta2: the decay of the average of the squares; a schedule too.
      warmup: steps in which the rate rises from 0, >= 0.

    Raises:
      ValueError: also where `update` is called without the parameters, unless `agc`
        is 0.

    Example:
      >>> optimizer = dreamer_v3(warmup=0)

    References:
      Hafner et al., Mastering Diverse Domains through World Models, 2023,
      https://arxiv.org/abs/2301.04104;
      https://github.com/danijar/dreamerv3/blob/main/embodied/jax/opt.py
    """
    warmup = _validate.check_int("warmup", warmup, low=0)
    rate = _validate.check_scalar("lr", lr, schedule=True)
    numbers = {
        "learning_rate": functools.partial(_after, rate, warmup)
        if callable(rate)
        else rate,
        "beta1": _validate.check_scalar("beta1", beta1, high=1),
    }
    if not is_zero(agc):
        numbers["agc"] = _validate.check_scalar("agc", agc)
    return _built("dreamer_v3", _dreamer_v3, beta2, eps, numbers, "agc", warmup=warmup)


def _built(
    name: str,
    make: Callable[..., optax.GradientTransformation],
    gamma: NumberOrSchedule,
    eps: Number,
    numbers: Mapping[str, Any],
    needs_params: str,
    **options: Any,
) -> Transformation:
    """One compiled call of `make`, around a corrected average; of its row's words.

    `update` needs the parameters if the number of that name is there.
    """
    names = CONVENTIONS[name].argument_names
    with _validate.rename_arguments_in_errors(names):
        average = check_hyperparameters(gamma=gamma, eps=eps, initial_scale=0.0)
    optimizer = jit_transformation(
        make,
        {**_AVERAGE, **options},
        {**average, **numbers},
        get_count=get_count,
        uses_params=needs_params in numbers,
    )
    return with_clear_errors(optimizer, names)


def _after(schedule: Schedule, warmup: int, step: Any) -> Any:
    return schedule(jnp.maximum(step - warmup, 0))


def _dreamer_v3(
    *,
    learning_rate: jax.Array,
    beta1: jax.Array,
    agc: jax.Array | None = None,
    warmup: int,
    **average: Any,
) -> optax.GradientTransformation:
    def chain(fit: Callable[[Any], Any]) -> optax.GradientTransformation:
        def rate(step: Any) -> jax.Array:
            return -fit(learning_rate) * jnp.minimum(1, step.astype(float) / warmup)

        warm = optax.scale_by_schedule(rate)
        return optax.chain(
            optax.identity() if agc is None else _clip_by_leaf(fit(agc), 1e-3),
            uncompiled_scale_by_rmsprop(**average),
            optax.ema(fit(beta1)),
            warm if warmup else optax.scale_by_learning_rate(fit(learning_rate)),
        )

    return once_rounded(chain, None if agc is None else "agc")


def _clip_by_leaf(clipping: jax.Array, least: float) -> optax.GradientTransformation:
    """Bound a gradient's norm by a part of its parameters', a whole leaf's each.

    `optax.adaptive_grad_clip` does so for each of a leaf's output units.
    """

    def clip(g: jax.Array, x: jax.Array) -> jax.Array:
        largest = clipping * jnp.maximum(least, jnp.linalg.norm(x.ravel()))
        return g / jnp.maximum(1, jnp.linalg.norm(g.ravel()) / largest)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, params))


def _average_of_steps(rate: jax.Array, beta: Any) -> optax.GradientTransformation:
    """The average of what the rates have scaled, divided by that of the rates."""
    average = optax.ema(beta, debias=False)

    def init(params: optax.Params) -> Any:
        return average.init((params, jnp.zeros([], rate.dtype)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        steps = jax.tree.map(lambda u: rate * u, updates)
        new: Any = average.update((steps, rate), state)
        (steps, mean), state = new
        # Where the rate was 0 all along there is no step.
        factor = -rate / lax.select(mean > 0, mean, jnp.ones_like(mean))
        return jax.tree.map(lambda b: factor * b, steps), state

    return optax.GradientTransformation(init, update)


def _shrink_after(decay: jax.Array) -> optax.GradientTransformation:
    """Subtract decay * x of the parameters as they are after the step."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, x: u - decay * (x + u), updates, params
        )
    )

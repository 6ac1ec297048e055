"""LaProp and DreamerV3's optimizer: RMSProp whose scaled gradients are averaged.

Adam averages the gradient and scales the average; here each gradient is first scaled by
its own step's root, so the averaged values are bounded. Both averages are divided by
the weight that they have collected.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._hyperparameters import Options
from jax_rmsprop._rmsprop import build
from jax_rmsprop._validate import Number, NumberOrSchedule, is_zero
from jax_rmsprop.conventions._wrap import Transformation, chain, unless_zero


def laprop(
    lr: NumberOrSchedule = 4e-4,
    betas: Sequence[Any] = (0.9, 0.999),
    eps: Number = 1e-15,
    weight_decay: Number = 0.0,
) -> Transformation:
    """LaProp as published by its authors: the average of RMSProp's steps.

        u = g / (sqrt(nu / n) + eps)
        b = beta1 * b + (1 - beta1) * lr * u
        x = x - b / (c / lr)
        x = x - weight_decay * x

    n is the weight that nu has collected, 1 - beta2^t, and c the average of the rate,
    c = beta1 * c + (1 - beta1) * lr, which is (1 - beta1^t) * lr for a constant rate.
    The weight decay applies to the parameters after the step, without the rate.

    Args:
      lr: >= 0, a number, array, tracer or schedule.
      betas: the decay of the average of the steps and the decay of the average of the
        squares; each in [0, 1], numbers or tracers.
      eps: >= 0, added outside the root.
      weight_decay: >= 0.

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
    pair: Any = betas
    if not isinstance(pair, Sequence) or len(betas) != 2:
        allowed = "a pair of numbers in [0, 1]"
        raise TypeError(_validate.expected("betas", allowed, betas))
    beta1, beta2 = (_validate.check_scalar("betas", beta, high=1) for beta in betas)
    decay = _validate.check_scalar("weight_decay", weight_decay)
    rate = _validate.check_scalar("lr", lr, schedule=True)
    return chain(
        _scaled({"gamma": "betas"}, beta2, eps),
        _average_steps(beta1, rate, rate),
        None if is_zero(decay) else _shrink_after(decay),
    )


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

    with n = 1 - beta2^t; in the warm-up t does not count this step, so the first step
    is zero.

    Args:
      lr: >= 0; a schedule starts after the warm-up, which rises to its first value.
      agc: the largest norm of a leaf's gradient, as a fraction of its parameter's, > 0;
        0 for no limit.
      eps: >= 0, added outside the root.
      beta1: the decay of the average of the steps, in [0, 1).
      beta2: the decay of the average of the squares; number or schedule.
      warmup: the number of steps in which the rate rises from 0, >= 0.

    Raises:
      ValueError: also if `update` is called without the parameters and `agc` is not 0.

    Example:
      >>> optimizer = dreamer_v3(warmup=0)

    References:
      Hafner et al., Mastering Diverse Domains through World Models, 2023,
      https://arxiv.org/abs/2301.04104;
      https://github.com/danijar/dreamerv3/blob/main/embodied/jax/opt.py
    """
    if not isinstance(warmup, jax.core.Tracer):
        warmup = _validate.check_int("warmup", warmup, low=0)
    rate = _validate.check_scalar("lr", lr, schedule=True)
    agc = _validate.check_scalar("agc", agc)

    def warmed(count: Any) -> Any:
        eta: Any = rate(jnp.maximum(count - warmup, 0)) if callable(rate) else rate
        begun = jnp.asarray(count, float) / jnp.maximum(warmup, 1)
        return eta * jnp.where(jnp.asarray(warmup) > 0, jnp.minimum(1, begun), 1)

    return chain(
        None if is_zero(agc) else unless_zero(agc, _clip_by_leaf(agc, 1e-3)),
        _scaled({"gamma": "beta2"}, beta2, eps),
        _average_steps(_validate.check_scalar("beta1", beta1, high=1), 1.0, warmed),
    )


def _scaled(names: dict[str, str], gamma: NumberOrSchedule, eps: Number) -> Any:
    """`scale_by_rmsprop` with bias correction and eps outside the root."""
    options = Options(eps_in_sqrt=False, bias_correction=True)
    return build(names, None, options, gamma=gamma, eps=eps, initial_scale=0.0)


class AveragedSteps(NamedTuple):
    """The state of an average of scaled gradients.

    Attributes:
      count: the number of steps so far, int32 of shape ().
      average: the average, shaped like the parameters, in float32 or wider.
      weight: the sum of its weights, a float of shape ().
    """

    count: Any
    average: optax.Updates
    weight: jax.Array


def _average_steps(
    beta: Number, weight: NumberOrSchedule, rate: NumberOrSchedule
) -> optax.GradientTransformation:
    """Step by -rate times the weighted average of the updates."""

    def init(params: optax.Params) -> Any:
        def zeros(p: Any) -> jax.Array:
            return jnp.zeros_like(p, jnp.promote_types(jnp.result_type(p), "float32"))

        return AveragedSteps(
            jnp.zeros([], jnp.int32), jax.tree.map(zeros, params), jnp.zeros([])
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        now = [x(state.count) if callable(x) else x for x in (weight, rate)]
        return _averaged((beta, 1 - beta, *now), updates, state)

    return optax.GradientTransformation(init, update)


@functools.partial(jax.jit, inline=True)
def _averaged(
    numbers: Any, updates: optax.Updates, state: AveragedSteps
) -> tuple[optax.Updates, AveragedSteps]:
    beta, rest, weight, rate = (jnp.asarray(x, float) for x in numbers)

    def average(old: jax.Array, new: Any) -> jax.Array:
        a, b, c = (x.astype(old.dtype) for x in (beta, rest, weight))
        return a * old + b * (c * jnp.asarray(new).astype(old.dtype))

    averages = jax.tree.map(average, state.average, updates)
    total = average(state.weight, jnp.ones([]))
    # If every weight was 0, the step is 0.
    factor = -rate / jnp.where(total > 0, total, 1)
    steps = jax.tree.map(lambda b: factor.astype(b.dtype) * b, averages)
    count = optax.safe_increment(state.count)
    return steps, AveragedSteps(count, averages, total)


def _clip_by_leaf(clipping: Number, least: float) -> optax.GradientTransformation:
    """Bound the norm of a leaf's gradient by a fraction of its parameter's norm.

    `optax.adaptive_grad_clip` does so for each output unit of a leaf.
    """

    @jax.jit
    def clip(bound: Any, g: jax.Array, x: jax.Array) -> jax.Array:
        largest = bound * jnp.maximum(least, jnp.linalg.norm(x.ravel()))
        return g / jnp.maximum(1, jnp.linalg.norm(g.ravel()) / largest)

    def clip_all(updates: optax.Updates, params: optax.Params | None) -> Any:
        return _map_with(functools.partial(clip, clipping), "agc", updates, params)

    return optax.stateless(clip_all)


def _shrink_after(decay: Number) -> optax.GradientTransformation:
    """Subtract decay * x for the parameters x after the step."""

    @jax.jit
    def shrink(decay: Any, u: jax.Array, x: jax.Array) -> jax.Array:
        x = x.astype(u.dtype)
        return u - jnp.asarray(decay, u.dtype) * (x + u)

    def shrink_all(updates: optax.Updates, params: optax.Params | None) -> Any:
        traced = isinstance(decay, jax.core.Tracer)
        if params is None and traced:  # valid only if it turns out to be 0
            return jax.tree.map(lambda u: jnp.where(decay == 0, u, jnp.nan), updates)
        each = functools.partial(shrink, decay)
        return _map_with(each, "weight_decay", updates, params)

    return optax.stateless(shrink_all)


def _map_with(
    function: Any, name: str, updates: optax.Updates, params: optax.Params | None
) -> Any:
    """Apply a function to each leaf that is not None and its parameter."""
    if params is None:
        raise ValueError(
            f"`params` must be passed to `update` when `{name}` is not 0, got None"
        )
    leaves, tree = jax.tree.flatten(updates)
    parameters = _validate.match_parameters(updates, params)
    pairs = zip(leaves, parameters, strict=True)
    return tree.unflatten([function(g, jnp.asarray(x)) for g, x in pairs])

"""What the conventions are made of: `rmsprop`, and Optax's parts around it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._optimizer import rmsprop
from jax_rmsprop._validate import Number, NumberOrSchedule
from jax_rmsprop.conventions._table import TABLE

Transformation = optax.GradientTransformationExtraArgs
Part = optax.GradientTransformation | None


def rmsprop_of(
    name: str, *, momentum: Number | None = None, **arguments: Any
) -> Transformation:
    """`rmsprop` with the values of a row of the table, and errors in its words."""
    row = TABLE[name]
    values: dict[str, Any] = {
        "eps_in_sqrt": row.eps_in_sqrt,
        "initial_scale": row.initial_scale,
        "lr_in_momentum": row.lr_in_momentum,
        "decoupled_weight_decay": row.decoupled_weight_decay,
    }
    # Where the row has words or nothing, the caller's arguments decide.
    values = {k: v for k, v in values.items() if not isinstance(v, str | None)}
    with _validate.rename_arguments_in_errors(row.words):
        optimizer = rmsprop(
            momentum=None if is_zero(momentum) else momentum, **(values | arguments)
        )
    return renamed(optimizer, row.words)


def renamed(optimizer: Transformation, words: Mapping[str, str]) -> Transformation:
    """The same, its errors in other words: what a schedule returns shows in a step."""
    # Partials of functions here, so that the result can be pickled.
    return optax.GradientTransformationExtraArgs(
        functools.partial(_called, optimizer.init, dict(words)),
        functools.partial(_called, optimizer.update, dict(words)),
    )


def _called(
    function: Callable[..., Any], words: Mapping[str, str], *args: Any, **extra: Any
) -> Any:
    try:
        with _validate.rename_arguments_in_errors(words):
            return function(*args, **extra)
    except (AttributeError, TypeError):
        for tree in args:  # Optax's parts do not look
            _validate.check_array_leaves(tree)
        raise


def beginning_at(optimizer: Transformation, scale: Any) -> Transformation:
    """Start nu at `scale`, with a weight of 0."""

    def init(params: Any) -> Any:
        state: Any = optimizer.init(params)
        first, average, *rest = state
        nu = jax.tree.map(lambda n: n + jnp.asarray(scale, n.dtype), average.nu)
        return first, average._replace(nu=nu), *rest

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def chain(*parts: Part) -> Transformation:
    """Optax's chain of the parts that are there; one alone stays as it is."""
    there = [part for part in parts if part is not None]
    if len(there) == 1:
        return optax.with_extra_args_support(there[0])
    whole = optax.chain(*there)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        new, state = whole.update(updates, state, params, **extra)
        # A traced bound or factor may be wider than a leaf, and widens it in Optax.
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return renamed(optax.GradientTransformationExtraArgs(whole.init, update), {})


def is_zero(value: Any) -> bool:
    """Whether it is the number 0, which switches something off; a tracer is not."""
    return type(value) in (int, float) and value == 0


def at_most_one(arguments: Mapping[str, Any]) -> None:
    """Check that no two of the arguments are given."""
    given = [
        f"`{name}` {_validate.short_repr(value)}"
        for name, value in arguments.items()
        if value is not None
    ]
    if len(given) > 1:
        names = ", ".join(f"`{n}`" for n in arguments)
        raise ValueError(f"only one of {names} may be given, got {' and '.join(given)}")


def refuse(name: str, value: Any, only: Any, advice: str) -> None:
    """Check an argument of which one value alone can be had here."""
    if value is not only and not (type(value) is type(only) and value == only):
        got = _validate.short_repr(value)
        raise ValueError(f"`{name}` must be {only!r}, got {got}; {advice}")


def positive(name: str, value: Number) -> Any:
    """Check a number that must be greater than 0."""
    if is_zero(value):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}")
    return _validate.check_scalar(name, value)


def clip_each_norm(bound: Any) -> optax.GradientTransformation:
    """Clip the norm of each leaf by itself."""

    def clip(updates: Any, params: Any) -> Any:
        del params
        ball = optax.projections.projection_l2_ball
        return jax.tree.map(lambda g: ball(g, bound), updates)

    return optax.stateless(clip)


_CLIPPINGS = {
    "clipvalue": optax.clip,
    "clip_gradient": optax.clip,
    "clipnorm": clip_each_norm,
    "global_clipnorm": optax.clip_by_global_norm,
}


def clipping(name: str, bound: Number | None, *, zero_is_none: bool = True) -> Part:
    """One of the frameworks' clippings, by the argument's name."""
    if bound is None or (zero_is_none and is_zero(bound)):
        return None
    return _CLIPPINGS[name](positive(name, bound))


def unscale(factor: Number | None) -> Part:
    """Divide the gradient by what the loss was multiplied by."""
    if factor is None:
        return None
    return optax.scale(1 / positive("loss_scale_factor", factor))


def accumulate(optimizer: Transformation, steps: int) -> Transformation:
    """Step once for `steps` gradients, with their mean."""
    # From Optax 0.2.8 on the mean is float32 unless another dtype is asked for; before,
    # it had the parameters' dtype.
    dtype: dict[str, Any] = {"accumulator_dtype": float}
    known = inspect.signature(optax.MultiSteps).parameters
    wrapper = optax.MultiSteps(
        optimizer, steps, **{k: v for k, v in dtype.items() if k in known}
    )
    every = optax.with_extra_args_support(wrapper.gradient_transformation())
    return renamed(every, {})


def every(steps: int, value: NumberOrSchedule) -> NumberOrSchedule:
    """Turn a schedule over gradients into one over steps of `steps` gradients each."""
    if steps == 1 or not callable(value):
        return value
    return lambda count: value(steps * count + steps - 1)


def begun(value: NumberOrSchedule, count: Any) -> NumberOrSchedule:
    """The schedule advanced by `count` steps, as if so many had been taken."""
    if is_zero(count) or not callable(value):
        return value
    return lambda step: value(step + count)


def inverse_time(rate: NumberOrSchedule, decay: Any) -> NumberOrSchedule:
    """The learning rate divided by 1 + decay * step, Keras's old schedule."""
    rate = _validate.check_scalar("learning_rate", rate, schedule=True)
    if is_zero(decay):
        return rate

    def schedule(step: Any) -> Any:
        eta = rate(step) if callable(rate) else rate
        return eta / (1 + decay * jnp.asarray(step, float))

    return schedule


def cautious(optimizer: Transformation) -> Transformation:
    """Keep of a step what goes against the gradient, scaled for what is left out."""

    def mask(step: jax.Array, g: jax.Array) -> jax.Array:
        kept = (step * g < 0).astype(step.dtype)
        return step * kept / jnp.maximum(kept.mean(), 1e-3)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        steps, state = optimizer.update(updates, state, params, **extra)
        return jax.tree.map(mask, steps, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def shrink(
    rate: NumberOrSchedule, weight_decay: Any, max_rate: Any
) -> optax.GradientTransformation:
    """Subtract rate^2 / max_rate * weight_decay * x; without `max_rate`, rate."""

    def factor(step: Any) -> Any:
        eta = rate(step) if callable(rate) else rate
        return -weight_decay * eta * (1.0 if max_rate is None else eta / max_rate)

    # Injected, since Optax below 0.2.7 takes no schedule for a decay.
    return optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=factor)


def mxnet(
    optimizer: Transformation,
    *,
    decay_first: bool,
    rescale_grad: Number,
    wd: Number,
    clip_gradient: Number | None,
    clip_weights: Number | None,
    lr_scheduler: Any,
    multi_precision: Any,
    **of_each_parameter: Any,
) -> Transformation:
    """What all of MXNet's optimizers do to a gradient before, and some to x after."""
    advice = "pass a schedule, a function of the step from 0, as `learning_rate`"
    refuse("lr_scheduler", lr_scheduler, None, advice)
    advice = "keep the parameters in float32 and cast them where they are used"
    refuse("multi_precision", multi_precision, False, advice)
    for name, value in of_each_parameter.items():
        refuse(name, value, None, "settings for each parameter are an optax.partition")

    factor = _validate.check_scalar("rescale_grad", rescale_grad)
    decay = _validate.check_scalar("wd", wd)
    same = isinstance(factor, float) and factor == 1.0
    scaled = None if same else optax.scale(factor)
    decayed = None if is_zero(decay) else optax.add_decayed_weights(decay)
    clipped = clipping("clip_gradient", clip_gradient)
    gradient = (decayed, clipped) if decay_first else (clipped, decayed)
    return chain(scaled, *gradient, optimizer, bounded(clip_weights))


def bounded(bound: Number | None) -> Part:
    """End a step where it leaves [-bound, bound]: a projection of the parameters."""
    if bound is None or is_zero(bound):
        return None
    limit = _validate.check_scalar("clip_weights", bound)

    def project(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError(
                "`params` must be passed to `update` when `clip_weights` is given, "
                "got None"
            )
        box = optax.projections.projection_box
        return jax.tree.map(lambda x, u: box(x + u, -limit, limit) - x, params, updates)

    return optax.stateless(project)

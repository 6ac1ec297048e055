"""Parts of the conventions around `rmsprop`: names, clipping, decay."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._hyperparameters import Options
from jax_rmsprop._rmsprop import build
from jax_rmsprop._validate import Number, is_zero

Transformation = optax.GradientTransformationExtraArgs
Part = optax.GradientTransformation | None
_OPTIONS = {field.name for field in dataclasses.fields(Options)}


def named(
    names: Mapping[str, str], *, momentum: Number | None = None, **arguments: Any
) -> Transformation:
    """`rmsprop` with a framework's argument names in errors.

    Args:
      names: the framework's names of the arguments, if they differ.
      momentum: as in `rmsprop`; a concrete 0 means None.
      arguments: the other arguments of `rmsprop`.
    """
    options = {n: x for n, x in arguments.items() if n in _OPTIONS}
    numbers = {n: x for n, x in arguments.items() if n not in _OPTIONS}
    momentum = None if is_zero(momentum) else momentum
    numbers = {"initial_scale": 0.0, "momentum": momentum, **numbers}
    return build(names, None, Options(**options), **numbers)


def chain(*parts: Part) -> Transformation:
    """Chain the parts with Optax, in the gradient's dtype; None is the identity.

    A part that a 0 switches off keeps its place, so a state has the same tree whether
    that number is concrete or traced.
    """
    if len(parts) == 1 and parts[0] is not None:
        return optax.with_extra_args_support(parts[0])
    there = [optax.identity() if part is None else part for part in parts]
    return around(optax.chain(*there), _in_the_gradients_dtype)


def around(
    inner: optax.GradientTransformation, change: Callable[..., Any] | None = None
) -> Transformation:
    """Change a transformation's steps, and name the leaf in errors.

    Args:
      inner: the transformation.
      change: a function from the step and the gradient, two trees, to a new step.
    """
    # Partials of module functions, so that the result can be pickled.
    inner = optax.with_extra_args_support(inner)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, inner), functools.partial(_update, inner, change)
    )


def _init(inner: Transformation, /, params: optax.Params) -> Any:
    with _validate.blame_leaves(params):  # Optax's parts do not check
        return inner.init(params)


def _update(
    inner: Transformation,
    change: Callable[..., Any] | None,
    /,
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, Any]:
    with _validate.blame_leaves(updates, state):
        _validate.check_inexact_leaves(updates)
        steps, state = inner.update(updates, state, params, **extra_args)
        return steps if change is None else change(steps, updates), state


def _in_the_gradients_dtype(steps: optax.Updates, updates: optax.Updates) -> Any:
    """Cast steps back: in Optax, a wider traced bound or factor widens a leaf."""
    return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), steps, updates)


def check_positive(name: str, value: Number) -> Any:
    """Check a number that must be greater than 0."""
    if is_zero(value):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}")
    return _validate.check_scalar(name, value)


def _clip_each_norm(bound: Any) -> optax.GradientTransformation:
    """Clip the norm of each leaf separately."""
    ball = optax.projections.projection_l2_ball
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: ball(g, bound), updates)
    )


_CLIPPINGS = {
    "clipvalue": optax.clip,
    "clip_gradient": optax.clip,
    "clipnorm": _clip_each_norm,
    "global_clipnorm": optax.clip_by_global_norm,
}


def clipping(name: str, bound: Number | None, *, zero_is_none: bool = True) -> Part:
    """The clipping of a framework's argument, by its name."""
    if bound is None or (zero_is_none and is_zero(bound)):
        return None
    checked = check_positive(name, bound)
    clip = _CLIPPINGS[name](checked)
    return unless_zero(checked, clip) if zero_is_none else clip


def decayed(name: str, amount: Number) -> Part:
    """Add amount * x to the gradient; nothing if the amount is 0.

    Without the parameters, a traced amount that is not 0 makes the step NaN.
    """
    amount = _validate.check_scalar(name, amount)
    if is_zero(amount):
        return None

    def add(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is not None:
            g, tree = jax.tree.flatten(updates)
            pairs = zip(g, _validate.match_parameters(updates, params), strict=True)
            return tree.unflatten(
                [g + jnp.asarray(amount, g.dtype) * x for g, x in pairs]
            )
        if not isinstance(amount, jax.core.Tracer):
            raise ValueError(
                f"`params` must be passed to `update` when `{name}` is not 0, got None"
            )
        return jax.tree.map(lambda g: jnp.where(amount == 0, g, jnp.nan), updates)

    return optax.stateless(add)


def unless_zero(
    number: Number, part: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Turn a part into the identity if a traced number is 0."""
    if not isinstance(number, jax.core.Tracer):
        return part
    part = optax.with_extra_args_support(part)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        changed, state = part.update(updates, state, params, **extra_args)
        return jax.tree.map(
            lambda u, g: jnp.where(number == 0, g, u.astype(g.dtype)), changed, updates
        ), state

    return optax.GradientTransformationExtraArgs(part.init, update)

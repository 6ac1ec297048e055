"""What goes around `rmsprop` in the conventions: names, clipping, decay, a box."""

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
    """`rmsprop` with a framework's own names of its arguments.

    Args:
      names: what the framework calls the arguments, where it has another name.
      momentum: as in `rmsprop`; a momentum that is known to be 0 is none.
      arguments: the others of `rmsprop`.
    """
    options = {n: x for n, x in arguments.items() if n in _OPTIONS}
    numbers = {n: x for n, x in arguments.items() if n not in _OPTIONS}
    momentum = None if is_zero(momentum) else momentum
    numbers = {"initial_scale": 0.0, "momentum": momentum, **numbers}
    return build(names, None, Options(**options), **numbers)


def chain(*parts: Part) -> Transformation:
    """Optax's chain of the parts, which keeps the gradient's dtype; None does nothing.

    A part that a number switches off keeps its place, so that a state has the same tree
    whether that number was known, and 0, when it was made or is traced.
    """
    if len(parts) == 1 and parts[0] is not None:
        return optax.with_extra_args_support(parts[0])
    there = [optax.identity() if part is None else part for part in parts]
    return around(optax.chain(*there), _in_the_gradients_dtype)


def around(
    inner: optax.GradientTransformation, change: Callable[..., Any] | None = None
) -> Transformation:
    """The same, with its steps changed, and with errors that name a leaf.

    Args:
      inner: the transformation.
      change: a function of the step and the gradient, two trees, to another step.
    """
    # Partials of functions here, so that the result can be pickled.
    inner = optax.with_extra_args_support(inner)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, inner), functools.partial(_update, inner, change)
    )


def _init(inner: Transformation, /, params: optax.Params) -> Any:
    with _validate.blame_leaves(params):  # Optax's parts do not look
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
    """A traced bound or factor may be wider than a leaf, and widens it in Optax."""
    return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), steps, updates)


def check_positive(name: str, value: Number) -> Any:
    """Check a number that must be greater than 0."""
    if is_zero(value):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}")
    return _validate.check_scalar(name, value)


def _clip_each_norm(bound: Any) -> optax.GradientTransformation:
    """Clip the norm of each leaf by itself."""
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
    """One of the frameworks' clippings, by the argument's name."""
    if bound is None or (zero_is_none and is_zero(bound)):
        return None
    checked = check_positive(name, bound)
    clip = _CLIPPINGS[name](checked)
    return unless_zero(checked, clip) if zero_is_none else clip


def decayed(name: str, amount: Number) -> Part:
    """Add the amount of the parameters to the gradient; nothing if it is 0.

    A traced amount needs the parameters unless it turns out to be 0: the step is NaN.
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
    """A part that does nothing where a traced number is 0."""
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

"""Build the conventions from `rmsprop` and Optax's parts around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jax_rmsprop import _validate
from jax_rmsprop._optimizer import rmsprop
from jax_rmsprop._validate import Number, is_zero
from jax_rmsprop.conventions._table import CONVENTIONS

Transformation = optax.GradientTransformationExtraArgs
Part = optax.GradientTransformation | None


def rmsprop_of(
    name: str, *, momentum: Number | None = None, **arguments: Any
) -> Transformation:
    """`rmsprop` with the values of a row of the table, and errors in its words."""
    row = CONVENTIONS[name]
    values: dict[str, Any] = {
        "eps_in_sqrt": row.eps_in_sqrt,
        "initial_scale": row.initial_scale,
        "lr_in_momentum": row.lr_in_momentum,
        "decoupled_weight_decay": row.decoupled_weight_decay,
    }
    # Where the row has words or nothing, the caller's arguments decide.
    values = {k: v for k, v in values.items() if not isinstance(v, str | None)}
    with _validate.rename_arguments_in_errors(row.argument_names):
        optimizer = rmsprop(
            momentum=None if is_zero(momentum) else momentum, **(values | arguments)
        )
    return with_clear_errors(optimizer, row.argument_names)


def with_clear_errors(
    optimizer: Transformation, argument_names: Mapping[str, str] | None = None
) -> Transformation:
    """The same, its errors of arguments in other words, of leaves in ours.

    What a schedule returns shows only in a step.
    """
    # Partials of functions here, so that the result can be pickled.
    return optax.GradientTransformationExtraArgs(
        functools.partial(_called, optimizer.init, dict(argument_names or {})),
        functools.partial(_called, optimizer.update, dict(argument_names or {})),
    )


def _called(
    function: Callable[..., Any], names: Mapping[str, str], *args: Any, **extra: Any
) -> Any:
    with (
        _validate.check_array_leaves_on_error(*args),  # Optax's parts do not look
        _validate.rename_arguments_in_errors(names),
    ):
        return function(*args, **extra)


def chain_keeping_dtype(*parts: Part) -> Transformation:
    """Optax's chain of the parts that are there; one alone stays as it is."""
    there = [part for part in parts if part is not None]
    if len(there) == 1:
        return optax.with_extra_args_support(there[0])
    whole = optax.chain(*there)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, Any]:
        new, state = whole.update(updates, state, params, **extra)
        # A traced bound or factor may be wider than a leaf, and widens it in Optax.
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return with_clear_errors(optax.GradientTransformationExtraArgs(whole.init, update))


def check_only_value(name: str, value: Any, only: Any, advice: str) -> None:
    """Check an argument of which one value alone can be had here."""
    if value is not only and not (type(value) is type(only) and value == only):
        got = _validate.short_repr(value)
        raise ValueError(f"`{name}` must be {only!r}, got {got}; {advice}")


def check_positive(name: str, value: Number) -> Any:
    """Check a number that must be greater than 0."""
    if is_zero(value):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}")
    return _validate.check_scalar(name, value)


def _clip_each_norm(bound: Any) -> optax.GradientTransformation:
    """Clip the norm of each leaf by itself."""

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        ball = optax.projections.projection_l2_ball
        return jax.tree.map(lambda g: ball(g, bound), updates)

    return optax.stateless(clip)


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
    return _CLIPPINGS[name](check_positive(name, bound))

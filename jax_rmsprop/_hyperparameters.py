"""The hyperparameters of an optimizer: numbers, on-off options, and a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jax_rmsprop._arithmetic import least_eps, positive
from jax_rmsprop._equations import Decay, decay
from jax_rmsprop._validate import (
    Number,
    NumberOrSchedule,
    check_bool,
    check_scalar,
    is_zero,
    match_parameters,
    short_repr,
)


class Hyperparameters(NamedTuple):
    """The numbers: Python floats, tracers, or schedules until `at_step`; None for off.

    `one_minus_gamma` is computed in double precision if gamma is a Python number, since
    in float32 1 - 0.9999 has a relative error of 3e-4. It is None if gamma is an array,
    which holds no more precision.
    """

    gamma: NumberOrSchedule
    one_minus_gamma: float | None
    eps: Number
    initial_scale: Number
    learning_rate: NumberOrSchedule | None = None
    momentum: NumberOrSchedule | None = None
    weight_decay: NumberOrSchedule | None = None


class Operands(NamedTuple):
    """A step's numbers, in the dtype of a leaf's state; None for off."""

    learning_rate: Any
    decay: Decay
    eps: Any
    momentum: Any
    weight_decay: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """On-off options, which decide the compiled program.

    Raises:
      TypeError: one is not a bool.
      ValueError: two exclude each other.
    """

    eps_in_sqrt: bool = True
    centered: bool = False
    bias_correction: bool = False
    nesterov: bool = False
    lr_in_momentum: bool = True
    decoupled_weight_decay: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, check_bool(name, value))
        if self.centered and self.bias_correction:
            raise ValueError(
                "`bias_correction` must be False if `centered` is True, got True: the "
                "variance after the first step is zero by construction"
            )


# Allowed values other than a number >= 0.
_LIMITS: dict[str, dict[str, Any]] = {
    "learning_rate": {"schedule": True},
    "gamma": {"high": 1, "schedule": True},
    "eps": {},
    "initial_scale": {},
    "momentum": {"high": 1, "schedule": True},
    "weight_decay": {"schedule": True},
}


def check_numbers(
    names: Mapping[str, str], **numbers: NumberOrSchedule | None
) -> Hyperparameters:
    """Check the numbers; a weight decay that is a concrete 0 is off.

    Args:
      names: the caller's names for messages, if they differ.
      numbers: the optimizer's numbers. The momentum may be None.

    Raises:
      TypeError: one is not a scalar number.
      ValueError: one is out of range.
    """
    checked = {
        name: check_scalar(names.get(name, name), x, **_LIMITS[name])
        for name, x in numbers.items()
        if name != "momentum" or x is not None
    }
    if is_zero(checked.get("weight_decay")):
        del checked["weight_decay"]
    gamma = checked["gamma"]
    one_minus_gamma = 1 - gamma if isinstance(gamma, float) else None
    return Hyperparameters(one_minus_gamma=one_minus_gamma, **checked)


def at_step(h: Hyperparameters, count: Any) -> Hyperparameters:
    """The numbers at a step: schedules are replaced by their values.

    A schedule is called here, as Optax calls it, and its value is not stored.
    """
    if not any(map(callable, h)):
        return h
    now = h._make(x(count) if callable(x) else x for x in h)
    if callable(h.gamma) and isinstance(now.gamma, float):
        now = now._replace(one_minus_gamma=1 - now.gamma)
    return now


def one_minus_gamma(h: Hyperparameters) -> jax.Array:
    """1 - gamma, as exactly as possible."""
    if h.one_minus_gamma is None:
        return 1 - jnp.asarray(h.gamma, float)
    return jnp.asarray(h.one_minus_gamma)


def in_dtype(
    h: Hyperparameters, options: Options, weight: jax.Array | None, dtype: Any
) -> Operands:
    """The numbers at a step, and nu's weight, for a leaf of this dtype."""

    def cast(x: Any) -> Any:
        return None if x is None else jnp.asarray(x, dtype)

    rate = cast(h.learning_rate)
    return Operands(
        rate,
        decay(jnp.asarray(h.gamma, dtype), one_minus_gamma(h).astype(dtype)),
        least_eps(jnp.asarray(h.eps, dtype), rate, options.eps_in_sqrt),
        cast(h.momentum),
        cast(h.weight_decay),
        None if weight is None else positive(weight.astype(dtype)),
    )


def off_if_zero(h: Hyperparameters, name: str) -> Hyperparameters:
    """Switch off a number; if it is traced and not 0, steps are NaN."""
    number = getattr(h, name)
    if isinstance(number, jax.core.Tracer):
        rate = jnp.asarray(h.learning_rate, float)
        h = h._replace(learning_rate=jnp.where(number == 0, rate, jnp.nan))
    return h._replace(**{name: None})


def check_mask(mask: Any) -> Any:
    """Check a mask: a function, or a tree of bools, converted to Python's.

    Raises:
      TypeError: a leaf is not a bool.
    """
    if mask is None or callable(mask):
        return mask

    def check(leaf: Any) -> bool:
        if isinstance(leaf, jax.Array | np.ndarray) and leaf.size == 1:
            leaf = leaf.item()
        allowed = "a tree of bools, or a function from the parameters to one"
        return check_bool("mask", leaf, allowed)

    return jax.tree.map(check, mask)


def decaying(
    h: Hyperparameters, mask: Any, updates: optax.Updates, params: optax.Params | None
) -> tuple[Hyperparameters, list[Any]]:
    """The parameter of each leaf of the updates that decays; None for all others.

    Leaves without a gradient, such as the integers of an Equinox model, are left out.
    Without the parameters, a traced decay that is not 0 makes the step NaN.

    Raises:
      ValueError: the parameters are missing, or not a tree of arrays like the updates.
    """
    if params is None:
        if not (is_zero(h.weight_decay) or isinstance(h.weight_decay, jax.core.Tracer)):
            raise ValueError(
                "`params` must be passed to `update` when `weight_decay` is not 0, got "
                "None"
            )
        return off_if_zero(h, "weight_decay"), [None] * len(jax.tree.leaves(updates))
    if mask is not None:
        params = _masked(mask, params)
    return h, match_parameters(updates, params)


def _masked(mask: Any, params: optax.Params) -> Any:
    """The parameters, None where the mask is False.

    The mask is a prefix of their tree, or a function that returns one.
    """
    if callable(mask):
        mask = check_mask(mask(params))
    try:
        return jax.tree.map(
            lambda on, part: part if on else jax.tree.map(lambda _: None, part),
            mask,
            params,
        )
    except ValueError:
        raise ValueError(
            "`mask` must be a tree of bools like the parameters "
            f"{short_repr(jax.tree.structure(params))}, or a prefix of their tree, got "
            f"{short_repr(jax.tree.structure(mask))}"
        ) from None

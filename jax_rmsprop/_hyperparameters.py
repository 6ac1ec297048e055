"""The numbers of a step: what a person may pass, and what they are at each step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jax_rmsprop._complement import one_minus
from jax_rmsprop._validate import (
    Number,
    NumberOrSchedule,
    check_bool,
    check_scalar,
    check_scheduled,
    short_repr,
)

# What each may be besides a number >= 0.
_LIMITS: dict[str, dict[str, Any]] = {
    "learning_rate": {"schedule": True},
    "gamma": {"high": 1, "schedule": True},
    "eps": {},
    "initial_scale": {},
    "momentum": {"high": 1, "schedule": True},
    "weight_decay": {"schedule": True},
}


def check_hyperparameters(**numbers: NumberOrSchedule) -> dict[str, NumberOrSchedule]:
    """Check numbers by their names; a concrete one becomes a Python float."""
    return {name: check_scalar(name, x, **_LIMITS[name]) for name, x in numbers.items()}


def check_options(
    *, centered: bool, bias_correction: bool, **options: bool
) -> dict[str, bool]:
    """Check what is on or off, and what excludes each other."""
    options = {"centered": centered, "bias_correction": bias_correction, **options}
    checked = {name: check_bool(name, x) for name, x in options.items()}
    if checked["centered"] and checked["bias_correction"]:
        raise ValueError(
            "`bias_correction` must be False if `centered` is True, got True: the "
            "variance after the first step is zero by construction"
        )
    return checked


def check_mask(mask: Any) -> Any:
    """Check a mask; as `optax.masked` takes it, equal and hashed by what it says.

    Raises:
      TypeError: a leaf is no bool.
    """
    if mask is None or callable(mask):
        return mask
    leaves, tree = jax.tree.flatten(mask)
    numbers = [
        leaf.item()
        if isinstance(leaf, jax.Array | np.ndarray) and leaf.size == 1
        else leaf
        for leaf in leaves
    ]
    return _TreeMask(tuple(check_bool("mask", leaf) for leaf in numbers), tree)


@dataclasses.dataclass(frozen=True)
class _TreeMask:
    """A tree of bools as a function of the parameters, of which it has the upper part.

    Raises:
      ValueError: it does not fit them.
    """

    leaves: tuple[bool, ...]
    tree: Any

    def __call__(self, params: optax.Params) -> Any:
        try:
            self.tree.flatten_up_to(params)
        except ValueError:
            raise ValueError(
                "`mask` must be a tree of bools like the parameters, or like the upper "
                f"part of them, got {short_repr(self.tree)}"
            ) from None
        return self.tree.unflatten(self.leaves)


def evaluate_hyperparameters(
    hyperparameters: Mapping[str, NumberOrSchedule], count: Any
) -> dict[str, float | jax.Array]:
    """The hyperparameters at a step: Python floats, or arrays not below float32.

    1 - gamma is formed here, where a Python float is still a double: in float32,
    1 - 0.9999 is wrong by 3e-4 of itself.
    """
    values: dict[str, float | jax.Array] = {}
    for name, x in hyperparameters.items():
        if callable(x):
            value, complement = _at(name, x, count)
        else:
            value, complement = x, one_minus(x) if name == "gamma" else None
        values[name] = _operand(value)
        if name == "gamma":
            values["one_minus_gamma"] = _operand(complement)
    return values


def _operand(x: Any) -> float | jax.Array:
    return x if isinstance(x, float) else jnp.asarray(x, float)


def _at(name: str, schedule: Callable[[Any], Any], count: Any) -> tuple[Number, Number]:
    """A schedule's value at a step, and what that is short of 1.

    Raises:
      TypeError: the schedule is plain Python, and the step not known yet; or it
        returns something else than a number.
    """
    try:
        return _compiled_both(name, schedule, count)
    except jax.errors.JAXTypeError as error:
        if isinstance(count, jax.core.Tracer):
            raise TypeError(
                f"`{name}` must be a schedule of JAX operations where it is compiled, "
                f"but it asks for the step's value ({type(error).__name__})"
            ) from None
    return _both(name, schedule, count)  # plain Python, of a step that is known


def _both(
    name: str, schedule: Callable[[Any], Any], count: Any
) -> tuple[Number, Number]:
    value = schedule(count)
    check_scheduled(name, value)
    return value, 1 - value


_compiled_both = functools.partial(jax.jit, static_argnums=(0, 1))(_both)

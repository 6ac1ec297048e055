"""Bad input gets one line that names the argument, its value and what is allowed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]
Number = float | jax.Array
NumberOrSchedule = Number | Schedule


def check_scalar(
    name: str,
    value: Any,
    *,
    high: float = math.inf,
    schedule: bool = False,
) -> Any:
    """Check one hyperparameter, which must lie in [0, `high`] and be finite.

    Args:
      name: the argument's name, for the message.
      value: what the caller passed.
      high: the largest allowed value.
      schedule: whether a function step -> number is allowed too.

    Returns:
      A Python float for a concrete value, in whatever type it came; a tracer as it
      is; a schedule as a partial, which whatever it is has a hash, as jit needs.

    Raises:
      TypeError: not a scalar number (nor a schedule, where one is allowed).
      ValueError: a concrete value out of range, or NaN.
    """
    allowed = "a finite number >= 0" if high == math.inf else f"in [0, {high:g}]"
    if schedule:
        allowed += " or a schedule (a function from step to number)"
    if schedule and callable(value):
        _takes_a_step(name, value)
        return functools.partial(value)
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array and value.shape != () and _is_real(value.dtype):
        raise TypeError(
            f"`{name}` must be a scalar, got an array of shape {value.shape}; "
            "to run several values at once, use jax.vmap"
        )
    if not (is_array and _is_real(value.dtype)) and type(value) not in (int, float):
        raise TypeError(f"`{name}` must be {allowed}, got {short_repr(value)}")
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        concrete = float(value)
    except OverflowError:  # an integer beyond all floats
        concrete = math.inf
    if not (0 <= concrete <= high and math.isfinite(concrete)):
        raise ValueError(f"`{name}` must be {allowed}, got {concrete!r}")
    return concrete


def _takes_a_step(name: str, schedule: Schedule) -> None:
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return  # a builtin or the like has none; calling it will tell
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a number or a function from step to number, got "
            f"{short_repr(schedule)}: {error}"
        ) from None


def is_zero(value: Any) -> bool:
    """Tell whether it is the number 0, which switches something off; no tracer is."""
    return type(value) in (int, float) and value == 0


def check_scheduled(name: str, value: Any) -> None:
    """Check what a schedule returned: a scalar of a type that is a number's.

    Raises:
      TypeError: something else.
    """
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array and value.shape == () and _is_real(value.dtype):
        return
    if type(value) not in (int, float):
        got = f"an array of shape {value.shape}" if is_array else short_repr(value)
        raise TypeError(f"`{name}`'s schedule must return a scalar number, got {got}")


def check_bool(name: str, value: Any) -> bool:
    """Check an option that is on or off.

    Raises:
      TypeError: not a bool, for instance a traced one: it decides what is compiled.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {short_repr(value)}")
    return bool(value)


def check_int(name: str, value: Any, *, low: int) -> int:
    """Check a count, and return it.

    Raises:
      TypeError: not an int.
      ValueError: below `low`.
    """
    if type(value) is not int:
        raise TypeError(
            f"`{name}` must be an integer >= {low}, got {short_repr(value)}"
        )
    if not low <= value < 2**31:  # beyond, no int32 holds it
        raise ValueError(
            f"`{name}` must be an integer >= {low}, got {short_repr(value)}"
        )
    return value


def short_repr(value: Any) -> str:
    """Write a value in one line and at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_extra(name: str, *modules: str) -> None:
    """Check that what an extra installs is there.

    Raises:
      ModuleNotFoundError: naming the extra.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is missing: pip install 'jax-rmsprop[{name}]'",
                name=error.name,
            ) from None


@contextlib.contextmanager
def rename_arguments_in_errors(names: Mapping[str, str]) -> Generator[None]:
    """Name the arguments by other names in the errors that are raised within."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # not of ours
            raise
        message = re.sub(r"`(\w+)`", lambda m: f"`{names.get(m[1], m[1])}`", str(error))
        raise type(error)(message) from None


def check_inexact_leaves(params: Any) -> None:
    """Check that every leaf is floating point or complex.

    Raises:
      TypeError: naming the path of the first leaf that is not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"RMSProp needs floating-point or complex leaves, but "
                f"{_name(path)} is {leaf.dtype}; leave it out with optax.masked "
                "or by filtering the tree"
            )


def check_array_leaves(tree: Any) -> None:
    """Check that every leaf is an array of numbers, or a number.

    Raises:
      TypeError: naming the path of the first leaf that is not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        numbers = isinstance(leaf, jax.Array | int | float)
        if isinstance(leaf, np.ndarray | np.generic):
            numbers = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool
        if not numbers:
            raise TypeError(
                f"RMSProp needs arrays for leaves, but {_name(path)} is "
                f"{short_repr(leaf)}; leave it out, as with "
                "equinox.filter(model, equinox.is_inexact_array)"
            )


@contextlib.contextmanager
def check_array_leaves_on_error(*trees: Any) -> Generator[None]:
    """Let a leaf that is no array take the blame for what is raised within."""
    try:
        yield
    except (AttributeError, TypeError):
        for tree in trees:
            check_array_leaves(tree)
        raise


def check_matches_state(updates: Any, nu: Any) -> None:
    """Check that the gradients have the tree and the shapes of the state.

    Raises:
      ValueError: naming the first leaf that differs, which of the two trees it is
        in, and both shapes.
    """
    trees = jax.tree.structure(updates), jax.tree.structure(nu)
    if trees[0] == trees[1]:
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(nu), strict=True)
        if all(g.shape == n.shape for g, n in pairs):
            return  # without the names, which take a while for thousands of leaves
    gradient = {
        _name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(updates)
    }
    state = {_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(nu)}
    for path in gradient | state:
        if path not in state:
            what = f"has shape {gradient[path]}, the state has no such leaf"
        elif path not in gradient:
            what = f"has no such leaf, the state has one of shape {state[path]}"
        elif gradient[path] != state[path]:
            what = f"has shape {gradient[path]}, the state has shape {state[path]}"
        else:
            continue
        raise ValueError(
            f"the gradient does not match the optimizer state at {path}: "
            f"the gradient {what}"
        )
    raise ValueError(
        "the gradient does not match the optimizer state: the leaves agree, the "
        f"containers do not; the gradient is {trees[0]}, the state is {trees[1]}"
    )


def check_same_kind(updates: Any, computed: Any) -> None:
    """Check that gradients are real or complex as what was computed with the state.

    Raises:
      ValueError: one is complex and the other is not.
    """
    for g, u in zip(jax.tree.leaves(updates), jax.tree.leaves(computed), strict=True):
        if jnp.iscomplexobj(u) and not jnp.iscomplexobj(g):
            raise ValueError(
                "the gradient does not match the optimizer state: the gradient is "
                f"{g.dtype}, the state is of complex parameters"
            )


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"

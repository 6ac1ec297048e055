"""Convert the variables of Keras 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import optax

from jax_rmsprop import conventions
from jax_rmsprop.migrate._elements import Layout, LayoutIndex
from jax_rmsprop.migrate._state import (
    FIELDS,
    build_state,
    check_all_used,
    extract_arrays,
    pop_array,
    to_numpy,
)

_WORDS = {"nu": "velocity", "mu": "average_gradient", "momentum": "momentum"}


def from_keras(
    variables: Iterable[Any],
    params: Any,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation | None = None,
) -> Any:
    """Convert the state of Keras 3's RMSprop to that of `conventions.keras`.

    Args:
      variables: `optimizer.variables` of the Keras optimizer.
      params: our parameters, which give the state its tree, shapes and placement.
      layout: as the module describes; the names are the paths of the model's variables,
        such as "sequential/dense/kernel". Keras replaces "/" by "_": paths that become
        one name must be in the order of the variables. A suffix that starts with "#"
        distinguishes equal paths.
      optimizer: the optimizer of the result; None for `conventions.keras`, with the
        checkpoint's momentum and centering. Required with clipping or scaling.

    Returns:
      The state, at the checkpoint's step.

    Raises:
      ValueError: a variable is missing, unexpected, unknown (such as the sums of
        `gradient_accumulation_steps`) or of another shape.

    References:
      https://github.com/keras-team/keras/blob/v3.15.1/keras/src/optimizers/rmsprop.py
    """
    index = LayoutIndex(layout, params)
    known = _known(index)
    theirs: dict[str, dict[str, Any]] = {field: {} for field in FIELDS}
    count = 0
    for variable in variables:
        field, name = _field(variable, known)
        if field == "iteration":
            count = int(to_numpy(variable))
        elif field != "learning_rate":
            theirs[field][name] = to_numpy(variable)
    if optimizer is None:
        optimizer = conventions.keras(
            momentum=0.9 if theirs["momentum"] else 0.0, centered=bool(theirs["mu"])
        )
    return build_state(optimizer, params, index, theirs, _WORDS, count)


def to_keras(
    state: Any, params: Any, variables: Iterable[Any], *, layout: Layout
) -> list[np.ndarray]:
    """Convert our state to the values of a Keras 3 RMSprop's variables.

    Args:
      state: the state of `conventions.keras`, or of an optimizer with its parts.
      params: our parameters.
      variables: `optimizer.variables` of the Keras optimizer that is to resume: a built
        one with the same settings.
      layout: as in `from_keras`.

    Returns:
      A value for each variable, in their order, to pass to its `assign`. The learning
      rate keeps its value.

    Raises:
      ValueError: the state lacks what a variable holds, or the other way round.

    References:
      https://github.com/keras-team/keras/blob/v3.15.1/keras/src/optimizers/rmsprop.py
    """
    index = LayoutIndex(layout, params)
    known = _known(index)
    theirs, count = extract_arrays(state, index)
    values: list[np.ndarray] = []
    for variable in variables:
        field, name = _field(variable, known)
        old = to_numpy(variable)
        if field == "iteration":
            value = np.asarray(count)
        elif field == "learning_rate":
            value = old
        else:
            value = pop_array(theirs, field, name, _WORDS)
        values.append(value.astype(old.dtype))
    check_all_used(theirs, _WORDS)
    return values


# The fields that the variables' names denote, in order: "dense_kernel_velocity" is the
# nu of "dense/kernel".
Known = dict[str, list[tuple[str, str]]]


def _known(index: LayoutIndex) -> Known:
    known: Known = {name: [(name, "")] for name in ("iteration", "learning_rate")}
    for field, word in _WORDS.items():
        for name in index.names:
            theirs = f"{name.partition('#')[0].replace('/', '_')}_{word}"
            known.setdefault(theirs, []).append((field, name))
    return known


def _field(variable: Any, known: Known) -> tuple[str, str]:
    """The field and path of a variable: the next ones of its name."""
    if variable.name not in known:
        raise ValueError(
            f"the checkpoint has an unknown variable {variable.name!r}; `layout` knows "
            f"{', '.join(known)}"
        )
    if not known[variable.name]:
        raise ValueError(
            f"the checkpoint has more variables {variable.name!r} than `layout`; name "
            "the second variable of a path 'path#2', and so on, in their order"
        )
    return known[variable.name].pop(0)

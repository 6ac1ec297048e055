"""Convert the slots of TensorFlow 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from jax_rmsprop import conventions
from jax_rmsprop.migrate._elements import Layout, LayoutIndex
from jax_rmsprop.migrate._state import (
    FIELDS,
    build_state,
    extract_arrays,
    is_ours,
    to_numpy,
)

_WORDS = {"nu": "rms", "mu": "mg", "momentum": "momentum"}


def from_tf1(
    slots: Mapping[str, Mapping[str, Any]],
    params: Any,
    *,
    layout: Layout,
    count: int = 0,
    optimizer: optax.GradientTransformation | None = None,
) -> Any:
    """Convert `tf.train.RMSPropOptimizer`'s slots to `conventions.tensorflow1`'s state.

    Args:
      slots: arrays by slot ("rms", "momentum" and, if centered, "mg") and by the name
        of the variable. For a live optimizer they are

            {slot: {v.name: optimizer.get_slot(v, slot).numpy() for v in variables}
             for slot in optimizer.get_slot_names()}

        A checkpoint names those of a variable w w/RMSProp, w/RMSProp_1 and w/RMSProp_2:
        rms, mg if centered, and momentum.
      params: our parameters, which give the state its tree, shapes and placement.
      layout: as the module describes.
      count: the step from which schedules resume; slots do not store it.
      optimizer: the optimizer of the result; None for `conventions.tensorflow1` with
        momentum, centered if there is "mg". If it has no momentum, the slot that
        TensorFlow always has is ignored. The slots of `tf.keras`'s OptimizerV2 have the
        same names: pass `conventions.tf_keras_v2`.

    Returns:
      The state.

    Raises:
      ValueError: a slot or a variable is missing, unknown or has another shape.

    References:
      https://github.com/tensorflow/tensorflow/blob/v2.21.0/tensorflow/python/training/rmsprop.py
    """
    for slot in slots:
        if slot not in _WORDS.values():
            raise ValueError(f"the checkpoint has an unknown slot {slot!r}")
    if optimizer is None:
        optimizer = conventions.tensorflow1(
            0.0, momentum=0.9 if "momentum" in slots else 0.0, centered="mg" in slots
        )
    theirs = {
        field: {name: to_numpy(x) for name, x in slots.get(_WORDS[field], {}).items()}
        for field in FIELDS
    }
    if not _has_momentum(jax.eval_shape(optimizer.init, params)):
        del theirs["momentum"]
    index = LayoutIndex(layout, params)
    return build_state(optimizer, params, index, theirs, _WORDS, count)


def to_tf1(
    state: Any, params: Any, *, layout: Layout
) -> dict[str, dict[str, np.ndarray]]:
    """Convert our state to slots of `tf.train.RMSPropOptimizer`.

    Args:
      state: the state of `conventions.tensorflow1`, or of an optimizer with its parts.
      params: our parameters.
      layout: as in `from_tf1`.

    Returns:
      Arrays by slot and name, as in `from_tf1`. TensorFlow always has a momentum slot:
      it is zeros if the state has no momentum.

    References:
      https://github.com/tensorflow/tensorflow/blob/v2.21.0/tensorflow/python/training/rmsprop.py
    """
    theirs, _ = extract_arrays(state, LayoutIndex(layout, params))
    zeros = {name: np.zeros_like(x) for name, x in theirs["nu"].items()}
    theirs["momentum"] = zeros | theirs["momentum"]
    return {_WORDS[field]: arrays for field, arrays in theirs.items() if arrays}


def _has_momentum(state: Any) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=is_ours)
    return any(is_ours(x) and x.momentum is not None for x in leaves)

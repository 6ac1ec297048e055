"""Successive halving: each rung resumes the best members of the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_rmsprop._validate import check_int, expected
from jax_rmsprop.sweeps._report import check_direction
from jax_rmsprop.sweeps._sweep import Call
from jax_rmsprop.sweeps._training import Training

if TYPE_CHECKING:
    import xarray as xr


def successive_halving(
    training: Any,
    axes: Mapping[str, Any],
    *,
    steps: Any,
    by: Any = "loss",
    keep: Any = 1 / 3,
    over: Any = "seed",
    maximize: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    r"""Run all members for a few steps, the best of them for more, and so on.

    After :math:`t_r` steps, the points of rung :math:`r` with the best mean of the
    output over the seeds resume, and run to step :math:`t_{r+1}`:

    .. math::
        P_{r+1} = \text{the best } \lceil \text{keep} \cdot |P_r| \rceil
        \text{ of } P_r \text{ by } \frac{1}{S} \sum_s y_{p,s}(t_r)

    Points with a diverged member come last.

    Args:
      training: a `Training`.
      axes: as for `sweep`.
      steps: the last step of each rung, ascending.
      by: the output to compare at the last step of a rung; one number a step.
      keep: the fraction of the points that continues, above 0 and below 1.
      over: the axis over which to average, if there is one.
      maximize: whether higher is better; required unless `by` is a loss or an error.
      options: those of `sweep`: store, client, batch_size and so on. With a store the
        same call resumes, and a call with more points or seeds runs the new ones.

    Returns:
      The Dataset of `sweep` for `steps[-1]`, with `rung` for each member: the number of
      its last rung, from 0. Members are `finished` if they ran the last rung or
      diverged.

    Raises:
      TypeError, ValueError: as in `sweep`, and for the arguments above.

    Example:
      >>> from jax_rmsprop import Training, successive_halving
      >>> training = Training(
      ...     lambda rate: 1.0 + 0 * rate,
      ...     lambda x, rate: (rate * x, {"loss": rate * x}),
      ... )
      >>> rates = {"rate": [0.9, 0.5, 0.7, 0.3]}
      >>> found = successive_halving(
      ...     training, rates, steps=[1, 3], keep=0.5, progress=False
      ... )
      >>> print(found.rung.values, found.steps.values)
      [0 1 0 1] [1 3 1 3]

    References:
      Jamieson and Talwalkar, [Non-stochastic Best Arm Identification and
      Hyperparameter Optimization](https://arxiv.org/abs/1502.07943), 2016
    """
    if not isinstance(training, Training):
        raise TypeError(expected("training", "a Training", training))
    allowed = "an ascending sequence of integers, such as [2, 7, 20]"
    ascending = expected("steps", allowed, steps)
    if isinstance(steps, str) or not isinstance(steps, Sequence | np.ndarray):
        raise TypeError(ascending)
    ends = [check_int("steps", step, low=1) for step in steps]
    if not ends or sorted(set(ends)) != ends:
        raise ValueError(ascending)
    if not isinstance(keep, int | float | np.number) or not 0 < keep < 1:
        raise ValueError(expected("keep", "above 0 and below 1", keep))
    if not isinstance(over, str):
        raise TypeError(expected("over", "the name of an axis", over))
    sign = -1 if check_direction(by, maximize) else 1
    call = Call(training, axes, steps=ends[-1], keeps_carries=True, **options)
    with call.running():
        if by not in call.outputs:
            raise ValueError(expected("by", f"one of {', '.join(call.outputs)}", by))
        point = call.points_of_members(over)
        alive = call.every
        rung = np.zeros(len(alive), int)
        for number, end in enumerate(ends):
            call.run(alive, end)
            rung[alive] = number
            if call.shown.stopped or end == ends[-1]:
                break
            scores = sign * _means(call.last(by, end), point, alive)
            order = np.argsort(scores, kind="stable")  # NaN comes last
            count = len(np.unique(point[alive]))
            best = order[: max(1, math.ceil(keep * count - 1e-9))]
            alive = alive[np.isin(point[alive], best)]
    return call.curves(alive, rung)


def _means(values: np.ndarray, point: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """For each point the mean over its members; NaN if it is not in this rung."""
    size = int(point.max()) + 1
    total, count = (np.bincount(point[alive], w, size) for w in (values[alive], None))
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)

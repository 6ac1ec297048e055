"""Pictures of a sweep, and of one training's average.

All functions except `report` draw on matplotlib Axes and return them. An output is
judged by its last value; diverged members are marked, never dropped silently. An
output's xarray attributes `long_name` and `units` label its axis.
"""

from jax_rmsprop.plotting._axes import (
    best_curves,
    diagnosis,
    heatmap,
    loss_against_gamma,
    sensitivity,
)
from jax_rmsprop.plotting._html import report
from jax_rmsprop.plotting._members import importance, parallel_coordinates

__all__ = [
    "best_curves",
    "diagnosis",
    "heatmap",
    "importance",
    "loss_against_gamma",
    "parallel_coordinates",
    "report",
    "sensitivity",
]

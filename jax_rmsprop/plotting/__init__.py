"""Pictures of a sweep, and of one training's average.

Each function but `report` draws into matplotlib's Axes, which it returns, so that
pictures are combined, changed and saved with matplotlib's own means. An output of a
sweep is judged by its last value; what diverged is marked, never left out silently.
If an output has attributes `long_name` and `units`, as xarray knows them, they label
its axis.
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

"""Pictures of all members of a sweep, whether they are a grid or points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jax_rmsprop.plotting._axes import COLOURS, label_of, prepare, spacing, texts
from jax_rmsprop.sweeps._report import best_index, diverged, last_value, reduce_seeds

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

# Where numbers stand on an axis that is spaced so.
_SCALES: dict[str, Any] = {
    "short of 1": lambda x: -np.log(1 - np.asarray(x, float)),
    "log": lambda x: np.log(np.asarray(x, float)),
    "linear": lambda x: np.asarray(x, float),
}


def parallel_coordinates(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    seed_dim: str = "seed",
    maximize: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot each point of a sweep as a line across its hyperparameters to its output.

    There is a vertical axis for each hyperparameter and one for the output, which also
    colours the lines, with the best on top. Positive numbers that span more than a
    factor of ten are spaced logarithmically, numbers in [0, 1) with one above 0.9 by
    log(1 - x), and Python values evenly. Points with a diverged seed are grey lines
    that end at the top; points that did not finish are only counted.

    Args:
      curves: what `sweep` returned, of a grid or of points.
      output: which output; required if there are several and none is "loss".
      seed_dim: the axis over which to average, if the grid has it.
      maximize: whether higher is better; required unless the output is a loss.
      ax: where to draw; None for a new figure.

    Returns:
      The matplotlib Axes.

    Raises:
      ValueError: no point is finite.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> from jax_rmsprop import log, log_one_minus, plotting, points, sweep
      >>> space = {"gamma": log_one_minus(0, 0.999), "learning_rate": log(0.001, 1)}
      >>> curves = sweep(
      ...     lambda gamma, learning_rate: {"loss": gamma * learning_rate},
      ...     points(space, 16),
      ...     zipped=True,
      ...     batch_size=16,
      ...     progress=False,
      ... )
      >>> ax = plotting.parallel_coordinates(curves)

    References:
      Inselberg, [The plane with parallel
      coordinates](https://doi.org/10.1007/BF01898350), 1985
    """
    ax, curves, output, most = prepare(curves, output, maximize, ax)
    import matplotlib as mpl
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    found = reduce_seeds(curves, output, seed_dim)
    mean = found.mean
    place = best_index(mean, most)
    best = int(np.ravel_multi_index(tuple(place.values()), mean.shape))
    names, values = [str(name) for name in mean.coords], mean.values.ravel()
    every = [mean[name].broadcast_like(mean).values.ravel() for name in names]
    ran = found.finished.transpose(*mean.dims).values.ravel()
    best, every, values = int(ran[:best].sum()), [x[ran] for x in every], values[ran]
    finite = np.isfinite(values)
    columns = [_column(x, best) for x in [*every, values]]
    height = np.stack([heights for heights, _ in columns], axis=1)
    height[~finite, -1] = 1.1
    lines = np.stack([np.broadcast_to(range(len(columns)), height.shape), height], -1)
    # The worst first, so that the best lie above.
    order = np.argsort(height[:, -1] if most else -height[:, -1])
    order = [*order[~finite[order]], *order[finite[order]]]
    colours = mpl.colormaps["viridis" if most else "viridis_r"](height[:, -1])
    colours[~finite] = to_rgba("0.7")
    style: dict[str, Any] = {
        "colors": colours[order],
        "linestyles": list(np.where(finite, "solid", "dotted")[order]),
        "linewidths": 1,
    }
    ax.add_collection(LineCollection(list(lines[order]), alpha=0.7, **style))
    label = f"best: {values[best]:.4g}"
    ax.plot(*lines[best].T, color=COLOURS[1], linewidth=3, label=label)
    box: dict[str, Any] = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"}
    for x, (_, marks) in enumerate(columns):
        ax.axvline(x, color="0.3", linewidth=1)
        for y, text in marks:
            beside: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
            ax.annotate(text, (x, y), (4, 0), fontsize=8, bbox=box, **beside)
    if not finite.all():
        ax.plot([], [], ":", color="0.7", label=f"diverged: {(~finite).sum()}")
    if not ran.all():
        ax.plot([], [], " ", label=f"not finished: {(~ran).sum()}")
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_yticks([])
    ax.set_xticks(range(len(columns)), [*names, label_of(curves, output)])
    ax.set_xlim(-0.1, len(names) + 0.35)
    ax.set_ylim(-0.05, 1.12 if not finite.all() else 1.05)
    ax.set_title(f"{output} of {len(values)} points")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    return ax


def importance(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    maximize: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the importance of each hyperparameter: the variance it explains.

    Members are ranked by the last value of the output, diverged ones last, so that an
    extreme value counts no more than its rank. Of the ranks :math:`y`, the share that
    hyperparameter :math:`x_i` explains by itself is its first-order Sobol index, the
    correlation ratio

    .. math::
        S_i = \frac{\mathrm{Var}(\mathrm{E}[y \mid x_i])}{\mathrm{Var}(y)}

    and, over a grid, its share including interactions is its total index
    :math:`T_i = \mathrm{E}[\mathrm{Var}(y \mid x_{-i})] / \mathrm{Var}(y)`. The share
    of the seeds is the scatter of the training itself. Shares depend on the swept
    ranges: wider ranges explain more.

    For points, values that all differ are grouped into bins of equal counts, as many as
    the root of the number of points. What bins explain by chance is subtracted
    (Kelley's :math:`\epsilon^2`).

    Args:
      curves: what `sweep` returned, of a grid or of points.
      output: which output; required if there are several and none is "loss".
      maximize: whether higher is better; required unless the output is a loss.
      ax: where to draw; None for a new figure.

    Returns:
      The matplotlib Axes, a bar for each hyperparameter, the longest on top.

    Raises:
      ValueError: fewer than two members have run, or all are equally good.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> from jax_rmsprop import plotting, sweep
      >>> curves = sweep(
      ...     lambda gamma, learning_rate: {"loss": gamma + 10 * learning_rate},
      ...     {"gamma": [0.0, 0.9, 0.99], "learning_rate": [1.0, 0.1, 0.01]},
      ...     progress=False,
      ... )
      >>> ax = plotting.importance(curves)
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['gamma', 'learning_rate']

    References:
      Saltelli et al., [Variance based sensitivity analysis of model
      output](https://doi.org/10.1016/j.cpc.2009.09.018), 2010, the indices;
      Hutter, Hoos and Leyton-Brown, [An efficient approach for assessing
      hyperparameter importance](https://proceedings.mlr.press/v32/hutter14.html), 2014;
      Kelley, [An unbiased correlation ratio
      measure](https://doi.org/10.1073/pnas.21.9.554), 1935
    """
    ax, curves, output, most = prepare(curves, output, maximize, ax)
    shares = explained(curves, output, most)
    names = sorted(shares, key=lambda name: shares[name])
    places = np.arange(len(names))
    alone = np.array([shares[name][0] for name in names])
    total = np.array([shares[name][1] for name in names])
    if np.isfinite(total).all():
        style: dict[str, Any] = {"color": COLOURS[5], "height": 0.6}
        ax.barh(places, total, label="with others", **style)
    ax.barh(places, alone, height=0.6, color=COLOURS[0], label="by itself")
    for place, share, whole in zip(places, alone, total, strict=True):
        text = f"{share:.0%}" if np.isnan(whole) else f"{share:.0%}, {whole:.0%}"
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        end = np.nanmax([share, whole]), place
        ax.annotate(text, end, (4, 0), fontsize=9, **beside)
    ax.set_yticks(places, names)
    ax.set_xlim(0, 1.2 * max(float(np.nanmax([alone, total])), 0.05))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ax.set_xlabel("share of the variance of the members' ranks")
    ax.set_title(f"what decides the {output}")
    ax.legend(loc="lower right")
    return ax


def explained(
    curves: xr.Dataset, output: str, maximize: bool
) -> dict[str, tuple[float, float]]:
    """The shares of `importance`: by itself, and with others (NaN for points).

    Raises:
      ValueError: fewer than two members have run, or all are equally good.
    """
    from scipy.stats import rankdata

    values = last_value(curves, output)
    worst = -np.inf if maximize else np.inf
    values = values.astype(float).where(~diverged(curves, output), worst)
    values = values.where(curves["finished"]).compute()
    ranked = rankdata(values.values, axis=None, nan_policy="omit")
    ranks = values.copy(data=ranked.reshape(values.shape))
    variance = float(ranks.var())
    if not variance > 0:
        raise ValueError(
            f"`curves` must have members that differ in {output}, but all "
            f"{int(curves['finished'].sum())} have the same"
        )
    if "member" in ranks.dims:
        return {
            str(name): (_binned(column.values, ranks.values), np.nan)
            for name, column in ranks.coords.items()
        }
    return {
        axis: (
            _variance_of_means(ranks, axis) / variance,
            float(ranks.var(axis).mean()) / variance,
        )
        for axis in map(str, ranks.dims)
    }


def _variance_of_means(ranks: xr.DataArray, axis: str) -> float:
    """The variance of the means along an axis, each by how many members it has."""
    others = [d for d in ranks.dims if d != axis]
    mean, count = ranks.mean(others), ranks.count(others)
    return float(mean.weighted(count).var())


def _binned(x: np.ndarray, y: np.ndarray) -> float:
    """Kelley's epsilon^2 of values in bins of equal counts, or in groups if few."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if x.dtype.kind not in "iuf":
        x = x.astype(str)  # Python's values of several types have no order
    groups, place = np.unique(x, return_inverse=True)
    bins = round(len(y) ** 0.5)
    if len(groups) > bins and groups.dtype.kind in "iuf":
        order = np.argsort(x, kind="stable")
        place[order] = np.arange(len(y)) * bins // len(y)
    counts = np.bincount(place)
    means = np.bincount(place, y) / np.maximum(counts, 1)
    whole = ((y - y.mean()) ** 2).sum()
    within = ((y - means[place]) ** 2).sum()
    used = (counts > 0).sum()
    if used >= len(y):
        return 0.0
    return max(0.0, 1 - within / whole * (len(y) - 1) / (len(y) - used))


def _column(
    values: np.ndarray, best: int
) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights in [0, 1] along an upright axis, and where its labels stand.

    The best point's value has one, and the ends; others where there is room.
    """
    import pandas as pd

    numbers = values.dtype.kind in "iuf"
    if not numbers:  # Python's values of several types have no order
        values = np.array([str(value) for value in values])
    # NaN has the place -1.
    place, labels = map(np.asarray, pd.factorize(values, sort=numbers))
    if numbers and np.isfinite(labels).all():
        scale = _SCALES[spacing(labels)]
        low, high = scale(labels[0]), scale(labels[-1])
        heights = (scale(labels) - low) / ((high - low) or 1.0)
    else:
        heights = np.linspace(0, 1, len(labels))
    even = np.linspace(0, 1, min(len(labels), 6))
    near = [int(abs(heights - y).argmin()) for y in even]
    order = [int(place[best]), 0, len(labels) - 1, *near]
    places: list[int] = []
    for i in order if len(labels) > 7 else [*order, *range(len(labels))]:
        if all(abs(heights[i] - heights[j]) > 0.04 for j in places):
            places.append(i)
    marks = list(zip(heights[places].tolist(), texts(labels[places]), strict=True))
    return np.append(heights, np.nan)[place], marks

"""Pictures over the axes of a grid, and of one training's average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_rmsprop._diagnose import Diagnosis
from jax_rmsprop._validate import check_int, require_extra
from jax_rmsprop.sweeps import _report
from jax_rmsprop.sweeps._report import Scores, as_text

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKED = COLOURS[1]


def loss_against_gamma(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    gamma: str = "gamma",
    seed_dim: str = "seed",
    maximize: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot an output against gamma, with its range over the seeds.

    The horizontal axis is even in log(1 - gamma); the upper one shows how many steps
    the average looks back over, 1/(1 - gamma). Other axes are held at the values of the
    best point, which the title names. Gammas with a diverged seed are marked by a cross
    at the top, and gammas far worse than the best by a triangle.

    Args:
      curves: what `sweep` returned.
      output: which output; required if there are several and none is "loss".
      gamma: the axis that is drawn, of values in [0, 1).
      seed_dim: the axis over which to average, if the grid has it.
      maximize: whether higher is better; required unless the output is a loss.
      ax: where to draw; None for a new figure.

    Returns:
      The matplotlib Axes.

    Raises:
      ValueError: the grid has no such axis, or no point is finite.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> from jax_rmsprop import plotting, sweep
      >>> curves = sweep(
      ...     lambda gamma: {"loss": (gamma - 0.9) ** 2},
      ...     {"gamma": [0.8, 0.9, 0.99]},
      ...     progress=False,
      ... )
      >>> ax = plotting.loss_against_gamma(curves)
      >>> ax.figure.savefig("/dev/null", format="png")
    """
    ax, curves, output, most = prepare(curves, output, maximize, ax)
    found, place, rest = select_scores(curves, output, seed_dim, most, gamma=gamma)
    mean, low, high, ran = (x.isel(rest) for x in (*found[:3], found.finished))
    x, ran = _short_of_1(mean, gamma), ran.values
    if found.seeds > 1:
        spread: dict[str, Any] = {"color": COLOURS[0], "alpha": 0.25, "linewidth": 0}
        label = f"range over {found.seeds} seeds"
        ax.fill_between(x, low.values, high.values, label=label, **spread)
    ax.plot(x, mean.values, "o-", color=COLOURS[0], markersize=4, label="mean")
    here, value = x[place[gamma]], float(mean.isel({gamma: place[gamma]}))
    label = f"best: {gamma} = {1 - here:.6g}"
    ax.plot(here, value, "*", color=MARKED, markersize=15, label=label)
    worst = _set_y_axis(ax, mean.values, label_of(curves, output), most)
    _mark_diverged(ax, x[ran], mean.values[ran], worst, most)
    _gamma_axis(ax, x, gamma)
    ax.set_title(
        f"{output} against {gamma}{_held_values(found.mean.isel(rest), rest)}", pad=10
    )
    ax.legend()
    return ax


def heatmap(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    x: str = "gamma",
    y: str = "learning_rate",
    seed_dim: str = "seed",
    maximize: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot an output over two axes of the grid, as a heat map.

    Cells with a diverged seed are grey with a cross, cells that did not finish grey
    with a dot; the best cell is outlined. Other axes are held at the values of the best
    point. The colour scale covers values near the best, logarithmically if they span
    more than a factor of ten; far worse values are black.

    Args:
      curves: what `sweep` returned.
      output: which output; required if there are several and none is "loss".
      x: the horizontal axis.
      y: the vertical axis.
      seed_dim: the axis over which to average, if the grid has it.
      maximize: whether higher is better; required unless the output is a loss.
      ax: where to draw; None for a new figure.

    Returns:
      The matplotlib Axes.

    Raises:
      ValueError: the grid has no such axes, or no point is finite.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> from jax_rmsprop import plotting, sweep
      >>> curves = sweep(
      ...     lambda gamma, learning_rate: {"loss": gamma * learning_rate},
      ...     {"gamma": [0.8, 0.9, 0.99], "learning_rate": [0.1, 0.01]},
      ...     progress=False,
      ... )
      >>> ax = plotting.heatmap(curves)
    """
    ax, curves, output, most = prepare(curves, output, maximize, ax)
    import matplotlib as mpl
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    found, place, rest = select_scores(curves, output, seed_dim, most, x=x, y=y)
    cells = found.mean.isel(rest).transpose(y, x)
    values = cells.values
    beyond = _beyond(values, _worst_shown(values, most), most)
    shown = values[np.isfinite(values) & ~beyond]
    scale = LogNorm if spans_decades(shown) else Normalize
    ax.set_facecolor("#BBBBBB")
    ax.grid(visible=False)
    colours = mpl.colormaps["viridis" if most else "viridis_r"]
    image = ax.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=colours.with_extremes(over="black", under="black"),
        norm=scale(shown.min(), shown.max()),
    )
    arrow = ("min" if most else "max") if beyond.any() else "neither"
    ax.figure.colorbar(image, ax=ax, label=label_of(curves, output), extend=arrow)
    ran = found.finished.isel(rest).transpose(y, x).values
    diverged = "a seed diverged" if found.seeds > 1 else "diverged"
    for where, mark, label in (
        (ran & ~np.isfinite(values), "kx", diverged),
        (~ran, "k.", "not finished"),
    ):
        rows, columns = np.nonzero(where)
        if len(rows):
            ax.plot(columns + 0.5, rows + 0.5, mark, markersize=5, label=label)
    corner = (place[x], place[y])
    label = f"best: {float(cells.isel({x: corner[0], y: corner[1]})):.4g}"
    outline: dict[str, Any] = {"fill": False, "edgecolor": MARKED, "linewidth": 3}
    ax.add_patch(Rectangle(corner, 1, 1, label=label, zorder=3, **outline))
    for name, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        labels = np.array(texts(cells[name].values))
        step = -(-len(labels) // 7)  # of each few the shortest ones
        shown = min(
            (np.arange(first, len(labels), step) for first in range(step)),
            key=lambda ticks: len("".join(labels[ticks])) / len(ticks),
        )
        axis.set_ticks(shown + 0.5, labels[shown])
        axis.set_label_text(name)
    ax.set_title(f"{output} by {x} and {y}{_held_values(cells, rest)}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return ax


def best_curves(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    top_k: int = 5,
    seed_dim: str = "seed",
    maximize: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the curves of the best points of the grid.

    Each line is the mean over the seeds, each band their range. Points are ordered by
    the last value, best first; points with a diverged seed are omitted.

    Args:
      curves: what `sweep` returned.
      output: which output, with one axis of its own; needed if there are several and
        none is "loss".
      top_k: how many points, at least 1.
      seed_dim: the axis over which to average, if the grid has it.
      maximize: whether higher is better; required unless the output is a loss.
      ax: where to draw; None for a new figure.

    Returns:
      The matplotlib Axes.

    Raises:
      ValueError: the output has no axis of its own, or no point is finite.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import plotting, sweep
      >>> curves = sweep(
      ...     lambda gamma: {"loss": gamma ** jnp.arange(10.0)},
      ...     {"gamma": [0.8, 0.9]},
      ...     progress=False,
      ... )
      >>> ax = plotting.best_curves(curves, top_k=2)
    """
    check_int("top_k", top_k, low=1)
    ax, curves, output, most = prepare(curves, output, maximize, ax)
    from matplotlib.ticker import MaxNLocator

    found, _, _ = select_scores(curves, output, seed_dim, most)
    values = curves[output]
    own = _report.own_axes(curves, output)
    if len(own) != 1:
        raise ValueError(
            f"`output` must be a curve, with one axis of its own, but {output} has "
            f"{len(own)}"
        )
    flat = (-1 if most else 1) * found.mean.values.ravel()
    order = [i for i in np.argsort(flat, kind="stable") if np.isfinite(flat[i])][:top_k]
    words = [(n, x.dims, texts(np.ravel(x))) for n, x in found.mean.coords.items()]
    shown: list[np.ndarray] = []
    for rank, i in enumerate(order):
        where = np.unravel_index(i, found.mean.shape)
        place = {d: int(j) for d, j in zip(found.mean.dims, where, strict=True)}
        lines = values.isel(place)
        if seed_dim not in lines.dims:
            lines = lines.expand_dims(seed_dim)
        lines = lines.transpose(seed_dim, own[0]).values
        colour = colour_of(rank, len(order))
        steps = values[own[0]].values + 1
        if len(lines) > 1:
            band: dict[str, Any] = {"color": colour, "alpha": 0.15, "linewidth": 0}
            ax.fill_between(steps, lines.min(0), lines.max(0), **band)
        point = ", ".join(f"{n} {t[place[d[0]] if d else 0]}" for n, d, t in words)
        style: dict[str, Any] = {"color": colour, "label": point}
        ax.plot(steps, lines.mean(0), zorder=3 - rank / top_k, **style)
        shown.append(lines)
    _set_y_axis(ax, np.concatenate(shown), label_of(curves, output), None)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    ax.set_title(f"{output}, the best {len(order)}" if len(order) > 1 else output)
    ax.legend(fontsize="small")
    return ax


def sensitivity(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    gamma: str = "gamma",
    hue: str = "learning_rate",
    seed_dim: str = "seed",
    maximize: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot an output against gamma, one line for each value of another axis.

    The horizontal axis is even in log(1 - gamma). Where a line is flat, gamma matters
    little. Each line is at the best values of the remaining axes. Points with a
    diverged seed are marked by a cross at the top, points far worse than the best by a
    triangle, in the colour of the line.

    Args:
      curves: what `sweep` returned.
      output: which output; required if there are several and none is "loss".
      gamma: the horizontal axis, of values in [0, 1).
      hue: the axis with one line for each value.
      seed_dim: the axis over which to average, if the grid has it.
      maximize: whether higher is better; required unless the output is a loss.
      ax: where to draw; None for a new figure.

    Returns:
      The matplotlib Axes.

    Raises:
      ValueError: the grid has no such axes, or no point is finite.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> from jax_rmsprop import plotting, sweep
      >>> curves = sweep(
      ...     lambda gamma, learning_rate: {"loss": gamma * learning_rate},
      ...     {"gamma": [0.8, 0.9, 0.99], "learning_rate": [0.1, 0.01]},
      ...     progress=False,
      ... )
      >>> ax = plotting.sensitivity(curves)
    """
    ax, curves, output, most = prepare(curves, output, maximize, ax)
    axes = {"gamma": gamma, "hue": hue}
    found, _, rest = select_scores(curves, output, seed_dim, most, **axes)
    table = found.mean.isel(rest).transpose(hue, gamma)
    ran = found.finished.isel(rest).transpose(hue, gamma).values
    lines, x = texts(table[hue].values), _short_of_1(table, gamma)
    worst = _set_y_axis(ax, table.values, label_of(curves, output), most)
    for i, values in enumerate(table.values):
        colour = colour_of(i, len(table))
        marker = "osDphP*"[i % 7]
        ax.plot(x, values, f"{marker}-", color=colour, markersize=4, label=lines[i])
        shown = x[ran[i]], values[ran[i]]
        _mark_diverged(ax, *shown, worst, most, colour, 0.03 * (i % 7))
    _gamma_axis(ax, x, gamma)
    ax.set_title(
        f"sensitivity of {output} to {gamma}{_held_values(table, rest)}", pad=10
    )
    # Beside the lines, of which there may be many, everywhere.
    outside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    ax.legend(title=hue, fontsize="small", frameon=False, **outside)
    return ax


def diagnosis(found: Diagnosis, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Plot what decides the steps of a training, the average or eps.

    From top to bottom: the median and the middle 90% of the average, with the threshold
    below which eps dominates the divisor; the fraction of elements below it; and the
    largest step, if known.

    Args:
      found: what `diagnose` returned at each step, stacked as by a scan.
      axes: three to draw on, from the top; None for a new figure.

    Returns:
      The three matplotlib Axes.

    Raises:
      ValueError: `found` has one step only, or there are not three `axes`.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_rmsprop import diagnose, plotting, rmsprop
      >>> optimizer, g = rmsprop(0.01), jnp.ones(3)
      >>> def step(state, _):
      ...     _, state = optimizer.update(g, state)
      ...     return state, diagnose(optimizer, state, g)
      >>> _, found = jax.lax.scan(step, optimizer.init(g), length=20)
      >>> axes = plotting.diagnosis(found)
      >>> axes[0].figure.savefig("/dev/null", format="png")
    """
    require_extra("plot", "matplotlib.pyplot")
    import matplotlib.pyplot as plt

    nu = np.asarray(found.nu)
    if nu.ndim != 2:
        raise ValueError(
            "`found` must be stacked along the steps, as by jax.lax.scan, but its nu "
            f"has the shape {nu.shape}"
        )
    if axes is None:
        options: dict[str, Any] = {"layout": "constrained", "sharex": True}
        axes = list(plt.subplots(3, figsize=(6.4, 6.4), **options)[1])
    if len(axes) != 3:
        raise ValueError(f"`axes` must be three, got {len(axes)}")
    average, share, step = axes
    steps, (_, low, middle, high, _) = np.arange(1, len(nu) + 1), nu.T
    # A logarithmic axis has no place for an average that is zero.
    smallest = np.min(nu[nu > 0], initial=1.0)
    low, middle, high = (np.maximum(x, smallest) for x in (low, middle, high))
    band: dict[str, Any] = {"color": COLOURS[0], "alpha": 0.25, "linewidth": 0}
    average.fill_between(steps, low, high, label="nine tenths of nu", **band)
    average.plot(steps, middle, color=COLOURS[0], label="middle")
    threshold: dict[str, Any] = {"color": MARKED, "label": "eps decides below"}
    average.plot(steps, np.asarray(found.threshold), "--", **threshold)
    average.set(yscale="log", ylabel="nu, units of g²")
    average.legend(fontsize="small")
    share.plot(steps, 100 * np.asarray(found.eps_share), color=MARKED)
    share.set(ylabel="eps decides, %", ylim=(-3, 103))
    if found.largest_step is not None:
        step.plot(steps, np.asarray(found.largest_step), color=COLOURS[0])
    step.set(ylabel="largest |u|", xlabel="step")
    step.set_ylim(bottom=0)
    for ax in axes:
        _open(ax)
    return list(axes)


def prepare(
    curves: xr.Dataset, output: str | None, maximize: bool | None, ax: Axes | None
) -> tuple[Axes, xr.Dataset, str, bool]:
    """Where to draw, the curves in order, which output, and whether more is better."""
    require_extra("plot", "matplotlib.pyplot")
    import matplotlib.pyplot as plt

    if ax is None:
        ax = _open(plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1])
    curves = _report.ordered(curves)
    output = _report.resolve_output(curves, output)
    return ax, curves, output, _report.check_direction(output, maximize)


def _open(ax: Axes) -> Axes:
    """Open above and at the right, with a faint grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)
    return ax


def select_scores(
    curves: xr.Dataset, output: str, seed_dim: str, maximize: bool, **axes: str
) -> tuple[Scores, dict[str, int], dict[str, int]]:
    """The output's scores, the best point, and of it what is not on these axes."""
    found = _report.reduce_seeds(curves, output, seed_dim)
    for argument, axis in axes.items():
        if axis not in found.mean.dims:
            raise ValueError(
                f"`{argument}` must be one of the grid's axes "
                f"{', '.join(map(str, found.mean.dims))}, got {axis!r}"
            )
    place = _report.best_index(found.mean, maximize)
    return found, place, {d: i for d, i in place.items() if d not in axes.values()}


def _short_of_1(values: xr.DataArray, name: str) -> np.ndarray:
    """How far the values of an axis are from 1."""
    distance = 1 - values[name].values.astype(float)
    if not (distance > 0).any():
        raise ValueError(
            f"`gamma` must be an axis with a value below 1, but {name} begins at "
            f"{1 - distance.max():g}"
        )
    return distance


def _gamma_axis(ax: Axes, distance: np.ndarray, name: str) -> None:
    """Draw along log(1 - gamma): gamma below, the window on top."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    def powers(low: float, high: float) -> np.ndarray:
        return 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)

    positive = distance[distance > 0]  # gamma = 1 looks back for ever
    low, high = positive.min() / 1.2, positive.max() * 1.2
    ticks = [t for t in powers(low, high) if low <= t <= high]
    if len(ticks) < 2:
        ticks = list(np.geomspace(positive.min(), positive.max(), 4))
    ax.set_xscale("log")
    ax.set_xlim(high, low)
    ax.set_xlabel(name)
    top = ax.secondary_xaxis("top")
    top.set_xlabel(f"steps looked back over, 1/(1 - {name})")
    for each, text in (
        (ax.xaxis, lambda t, _: f"{1 - t:.6g}"),
        (top.xaxis, lambda t, _: _format_steps(1 / t)),
    ):
        each.set_major_locator(FixedLocator(ticks))
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(text))


def _set_y_axis(
    ax: Axes, values: np.ndarray, label: str, maximize: bool | None
) -> float:
    """Label and scale the axis; the worst value on it. With None, all values are."""
    worst = np.nan if maximize is None else _worst_shown(values, maximize)
    beyond = _beyond(values, worst, bool(maximize))
    shown = values[np.isfinite(values) & ~beyond]
    ax.set_ylabel(label)
    if spans_decades(shown):
        ax.set_yscale("log")
    if beyond.any():
        low, high = float(shown.min()), float(shown.max())
        if ax.get_yscale() == "log":
            ax.set_ylim(low / 1.2, high * 1.5)
        else:
            margin = 0.1 * (high - low or abs(high) or 1)
            ax.set_ylim(low - margin, high + margin)
    return worst


def _worst_shown(values: np.ndarray, maximize: bool) -> float:
    """The end of a scale that shows differences near the best.

    The worst value within a hundred times the best third, or ten times as far from the
    best as that where values are not positive or more is better. One training that blew
    up to 1e20 would leave no difference among the others.
    """
    finite = np.sort(values[np.isfinite(values)])
    finite = finite[::-1] if maximize else finite
    first, near = finite[0], finite[len(finite) // 3]
    if first == near:
        return float(finite[-1])
    scaled = not maximize and first > 0
    limit = 100 * near if scaled else first + 10 * (near - first)
    return float(finite[~_beyond(finite, limit, maximize)][-1])


def _beyond(values: np.ndarray, worst: float, maximize: bool) -> np.ndarray:
    return np.asarray(values < worst if maximize else values > worst)


def spacing(values: np.ndarray) -> str:
    """How finite numbers are spaced on an axis: "short of 1", "log" or "linear"."""
    if values.min() >= 0 and 0.9 < values.max() < 1:
        return "short of 1"
    return "log" if spans_decades(values) else "linear"


def spans_decades(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    return low > 0 and high > 10 * low


def _mark_diverged(
    ax: Axes,
    x: np.ndarray,
    values: np.ndarray,
    worst: float,
    maximize: bool,
    colour: str = "black",
    lower: float = 0.0,
) -> None:
    """Marks at the axis' end for what diverged or lies beyond it."""
    beyond, end = _beyond(values, worst, maximize), 0.03 if maximize else 0.97
    for where, marker, height, label in (
        (~np.isfinite(values), "x", 0.97 - lower, "diverged"),
        (beyond, "v" if maximize else "^", abs(end - lower), "beyond the axis"),
    ):
        if not where.any():
            continue
        _, labels = ax.get_legend_handles_labels()
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
        ax.plot(
            x[where],
            np.full(where.sum(), height),
            transform=ax.get_xaxis_transform(),
            label=None if label in labels else label,
            **style,
        )


def colour_of(i: int, n: int) -> Any:
    """A colour of its own for each of n lines; of viridis if they are many."""
    import matplotlib as mpl

    return COLOURS[i] if n <= len(COLOURS) else mpl.colormaps["viridis"](i / (n - 1))


def label_of(curves: xr.Dataset, output: str) -> str:
    attributes = curves[output].attrs
    name, units = attributes.get("long_name", output), attributes.get("units")
    return f"{name} [{units}]" if units else str(name)


def _format_steps(steps: float) -> str:
    return f"{steps:,.0f}" if steps >= 100 else f"{steps:.3g}"


def texts(values: np.ndarray) -> list[str]:
    """Values as texts, with as many digits as tell each from the others."""
    found, different = list[str](), len(np.unique(values))
    for digits in range(4, 18):
        found = [as_text(value, digits) for value in values]
        if len(set(found)) == different:
            break
    return found


def _held_values(values: xr.DataArray, rest: Mapping[str, int]) -> str:
    """The values at which the other axes are held."""
    held = [f"{d} {as_text(values[d].item())}" for d in rest if d in values.coords]
    return f", at {', '.join(held)}" if held else ""

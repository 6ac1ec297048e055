"""A sweep as one page of HTML, to open in a browser."""

from __future__ import annotations

import math
import os
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_rmsprop._validate import check_int, require_extra
from jax_rmsprop.plotting._axes import (
    COLOURS,
    label_of,
    spacing,
    spans_decades,
    texts,
)
from jax_rmsprop.sweeps import _report
from jax_rmsprop.sweeps._report import Summary, summary, to_dataframe

if TYPE_CHECKING:
    import xarray as xr


def report(
    curves: xr.Dataset,
    path: str | os.PathLike[str],
    output: str | None = None,
    *,
    top_k: int = 20,
    seed_dim: str = "seed",
    maximize: bool | None = None,
) -> Path:
    """Write a sweep as one HTML file, which opens in a browser offline.

    It contains the summary; a plot of each member's output against a selectable axis,
    coloured by another one, with values on hover; the curves of the best members, if
    the output has steps; and a sortable table of all members. Selecting members in the
    plot selects them in the table, and vice versa. Diverged members are marked by a
    cross at the top, those that did not finish by a triangle.

    Args:
      curves: what `sweep` returned, of a grid or of points.
      path: the file to write.
      output: which output; required if there are several and none is "loss".
      top_k: number of members whose curves are drawn, at least 1.
      seed_dim: the axis over which the summary averages, if the grid has it.
      maximize: whether higher is better; required unless the output is a loss.

    Returns:
      The path of the file.

    Raises:
      ValueError: no point is finite.
      ModuleNotFoundError: Bokeh is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> from jax_rmsprop import plotting, sweep
      >>> curves = sweep(
      ...     lambda gamma, learning_rate: {"loss": gamma * learning_rate},
      ...     {"gamma": [0.8, 0.9, 0.99], "learning_rate": [0.1, 0.01]},
      ...     progress=False,
      ... )
      >>> page = pathlib.Path(tempfile.mkdtemp()) / "sweep.html"
      >>> plotting.report(curves, page).stat().st_size > 100_000
      True
    """
    require_extra("plot", "bokeh.plotting")
    import pandas as pd
    from bokeh.embed import file_html
    from bokeh.layouts import column, row
    from bokeh.models import ColumnDataSource, CustomJS, Div, Select
    from bokeh.palettes import Viridis256
    from bokeh.resources import INLINE

    check_int("top_k", top_k, low=1)
    curves = _report.ordered(curves)
    output = _report.resolve_output(curves, output)
    maximize = _report.check_direction(output, maximize)
    found = summary(curves, output, maximize=maximize, seed_dim=seed_dim)
    # Its index says where each stood in the grid.
    table = to_dataframe(curves).sort_values(output, ascending=not maximize)
    axes = [str(name) for name in curves["finished"].coords]
    values, ran = table[output].to_numpy(float), table["finished"].to_numpy()
    lost = _report.diverged(curves, output).values.ravel()[table.index]
    there = np.isfinite(values) & ~lost
    good = there & ran
    for axis in axes:  # an infinite value has no place, and is a category
        x = table[axis].to_numpy()
        if x.dtype.kind == "f" and np.isinf(x).any():
            labels = np.unique(x)
            kinds: Any = pd.Categorical(x, labels)
            table[axis] = kinds.rename_categories(texts(labels))
    members: dict[str, Any] = {
        str(name): x.astype(str) if x.dtype.kind in "Obc" else x
        for name, x in table.items()
    }
    members["_height"] = np.where(there, values, values[good].max())
    members["_mark"] = np.select([good, ran], ["circle", "x"], "triangle")
    members["_colour"] = np.where(good, COLOURS[0], COLOURS[1])
    for axis in axes:
        values_of, place = np.unique(members[axis], return_inverse=True)
        at = place * 255 // max(1, len(values_of) - 1)
        members[f"_colour_{axis}"] = np.array(Viridis256)[at]
    source = ColumnDataSource(members)
    label = label_of(curves, output)
    figures = [_against(axis, source, table, label, values[good]) for axis in axes]
    for figure in figures[1:]:
        figure.visible = False
    options: Any = axes
    select = Select(title="against", value=axes[0], options=options, width=170)
    code = "figures.forEach((f, i) => { f.visible = names[i] == cb_obj.value })"
    script = CustomJS(args={"figures": figures, "names": axes}, code=code)
    select.js_on_change("value", script)
    colour = Select(title="coloured by", value="", options=["", *axes], width=170)
    code = """
      const field = cb_obj.value ? "_colour_" + cb_obj.value : "_colour"
      for (const f of figures) for (const r of f.renderers)
        for (const part of ["fill_color", "line_color"]) r.glyph[part] = {field}
    """
    script = CustomJS(args={"figures": figures}, code=code)
    colour.js_on_change("value", script)
    parts = [
        Div(text=f"<h1>{escape(output)} of {len(table):,} members</h1>"),
        Div(text=_summary(found, curves), styles={"overflow-x": "auto"}),
        row(select, colour),
        *figures,
    ]
    best = _best(curves, output, table[good], top_k)
    if best is not None:
        parts.append(_curves(best, axes, label))
    parts.append(
        _table(source, [*axes, *_report.outputs(curves), "diverged", "finished"])
    )
    layout = column(*parts, sizing_mode="stretch_width", max_width=1100)
    path = Path(path).expanduser()
    path.write_text(
        file_html(layout, INLINE, title=f"{output}, a sweep"), encoding="utf-8"
    )
    return path


def _summary(found: Summary, curves: xr.Dataset) -> str:
    """The summary with its table, and how it was computed."""
    above, rows, below = found.parts()
    made = [f"{name} {value}" for name, value in curves.attrs.items()]
    made = [*made, f"jax {jax.__version__}", f"{datetime.now():%Y-%m-%d %H:%M}"]
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    lines = [f"{escape(line)}<br>" for line in above]
    ends = [f"<p>{escape(line)}</p>" for line in (*below, ", ".join(made))]
    return "".join([*lines, f"<table>{table}</table>", *ends])


def _against(axis: str, source: Any, table: Any, label: str, shown: np.ndarray) -> Any:
    """The output of each member against one axis, spaced as that axis asks for."""
    from bokeh.models import CustomJSTickFormatter, FixedTicker, HoverTool, LogAxis
    from bokeh.plotting import figure

    x = table[axis]
    where, short_of_1 = axis, False
    options: dict[str, Any] = {"x_axis_label": axis, **_axis_of("y", shown)}
    if x.dtype.kind not in "iuf":
        in_order = x.cat.categories if hasattr(x, "cat") else x.sort_index()
        options["x_range"] = list(dict.fromkeys(in_order.astype(str)))
    elif spacing(x.to_numpy(float)) == "short of 1":
        short_of_1, where = True, f"_short_{axis}"
        source.data[where] = 1 - x.to_numpy(float)
        options |= _axis_of("x", source.data[where])
        options["x_range"] = options["x_range"][::-1]
    else:
        options |= _axis_of("x", x.to_numpy(float))
    plot = figure(
        height=380,
        sizing_mode="stretch_width",
        y_axis_label=label,
        tools="pan,wheel_zoom,box_select,tap,reset",
        active_drag="box_select",
        **options,
    )
    plot.scatter(
        where,
        "_height",
        source=source,
        marker="_mark",
        size=8,
        color="_colour",
        alpha=0.7,
        nonselection_alpha=0.1,
    )
    tips = [(name, f"@{{{name}}}") for name in table.columns]
    plot.add_tools(HoverTool(tooltips=tips))
    ranges: Any = ((plot.xaxis, plot.x_range), (plot.yaxis, plot.y_range))
    for each, ends in ranges:
        if isinstance(each[0], LogAxis):  # Bokeh's own ticks are few, or spaced evenly
            each.ticker = FixedTicker(ticks=_ticks(ends.start, ends.end))
            tick = "1 - tick" if short_of_1 and ends is plot.x_range else "tick"
            code = f"return String(Number(({tick}).toPrecision(6)))"
            each.formatter = CustomJSTickFormatter(code=code)
    return plot


def _ticks(*ends: float) -> list[float]:
    """Powers of ten between two ends, and 2 and 5 times them if they are few."""
    low, high = sorted(ends)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 2, 5) if len(powers) < 5 else (1,)
    every = [m * 10.0**k for k in powers for m in mantissas]
    return [tick for tick in every if low <= tick <= high]


def _axis_of(name: str, values: np.ndarray) -> dict[str, Any]:
    """The scale and the ends of an axis: a figure that is hidden finds none itself."""
    low, high = float(values.min()), float(values.max())
    if spans_decades(values):
        return {f"{name}_axis_type": "log", f"{name}_range": (low / 1.3, high * 1.3)}
    margin = 0.05 * (high - low) or 1.0
    return {f"{name}_range": (low - margin, high + margin)}


def _best(
    curves: xr.Dataset, output: str, members: Any, top_k: int
) -> dict[str, Any] | None:
    """The curves of the best members, if the output has one axis of its own."""
    own = _report.own_axes(curves, output)
    if len(own) != 1:
        return None
    best, dims = members[:top_k], curves["finished"].dims
    values = curves[output].transpose(*dims, own[0])
    flat = values.data.reshape(-1, values.sizes[own[0]])
    lines = np.asarray(flat[best.index.to_numpy()], float)
    return {
        "xs": [(values[own[0]].values + 1).tolist()] * len(best),
        "ys": lines.tolist(),
        "_colour": [COLOURS[rank % len(COLOURS)] for rank in range(len(best))],
        **{name: best[name].astype(str).tolist() for name in best.columns},
    }


def _curves(best: dict[str, Any], axes: list[str], label: str) -> Any:
    """The curves, each with its member under the pointer."""
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.plotting import figure

    drawn = np.concatenate(best["ys"])
    plot = figure(
        title=f"the best {len(best['ys'])} members",
        height=380,
        sizing_mode="stretch_width",
        x_axis_label="step",
        y_axis_label=label,
        **_axis_of("y", drawn[np.isfinite(drawn)]),
        tools="pan,wheel_zoom,box_zoom,reset",
    )
    style: dict[str, Any] = {"alpha": 0.6, "hover_alpha": 1.0, "hover_line_width": 4}
    plot.multi_line(
        "xs",
        "ys",
        source=ColumnDataSource(best),
        color="_colour",
        line_width=2,
        **style,
    )
    plot.add_tools(HoverTool(tooltips=[(name, f"@{{{name}}}") for name in axes]))
    return plot


def _table(source: Any, names: list[str]) -> Any:
    """All members, sorted by a click on a column's head."""
    from bokeh.models import (
        DataTable,
        ScientificFormatter,
        StringFormatter,
        TableColumn,
    )

    columns = [
        TableColumn(
            field=name,
            title=name,
            formatter=ScientificFormatter(precision=4, power_limit_low=-4)
            if np.asarray(source.data[name]).dtype.kind == "f"
            else StringFormatter(),
        )
        for name in names
        if name in source.data
    ]
    return DataTable(
        source=source,
        columns=columns,
        height=420,
        sizing_mode="stretch_width",
        index_position=None,
        reorderable=False,  # what would need a library of its own
    )

"""Report on a sweep: its best point, and all members as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jax_rmsprop import _markdown
from jax_rmsprop._validate import check_bool, expected, require_extra, short_repr

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


class Scores(NamedTuple):
    """An output's last value at each point of the grid, over the seeds.

    NaN where a seed diverged or is not finished.

    Attributes:
      mean: over the seeds.
      low: the lowest seed.
      high: the highest seed.
      seeds: the number of seeds; 1 if the grid has no such axis.
      lacking: the number of points at which some seeds, but not all, have not run.
      of_others: the mean over the seeds that have run.
      finished: whether all seeds are.
    """

    mean: xr.DataArray
    low: xr.DataArray
    high: xr.DataArray
    seeds: int
    lacking: int
    of_others: xr.DataArray
    finished: xr.DataArray

    def values_at(self, place: Mapping[str, int]) -> tuple[float, float, float]:
        """Mean, lowest and highest value at one point."""
        mean, low, high = (x.isel(place) for x in (self.mean, self.low, self.high))
        return float(mean), float(low), float(high)


Neighbour = tuple[str, float, float | None, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The findings of `summary`; prints as a page of text.

    Attributes:
      output: the judged output.
      best: the best point, by axis.
      value: the output at the best point, averaged over the seeds.
      low: the lowest seed there.
      high: the highest seed there.
      seeds: the number of seeds.
      neighbours: for each axis of numbers the points just below and above the best
        one: (axis, its value there, mean, low, high), NaN where a seed diverged, None
        where one is not finished.
      edges: the axes on which the best point has the first or last value.
      members: the number of members.
      diverged: the number of members whose output is not finite.
      unfinished: the number of members that did not run to the end, whether they were
        interrupted or stopped by `successive_halving`.
      maximized: whether higher is better.
      lacking: the number of points at which some seeds have not run; none is `best`.
      promising: the best of these points by the seeds that have run, if it beats
        `best`: the mean, and the point.
    """

    output: str
    best: dict[str, Any]
    value: float
    low: float
    high: float
    seeds: int
    neighbours: list[Neighbour]
    edges: list[str]
    members: int
    diverged: int
    unfinished: int
    maximized: bool = False
    lacking: int = 0
    promising: tuple[float, dict[str, Any]] | None = None

    def __str__(self) -> str:
        """The best point, its neighbours, and warnings."""
        above, rows, below = self.parts()
        lines = [*above, "", _markdown.table(rows, numbers=True)]
        return "\n".join([*lines, "", *below] if below else lines)

    def _repr_markdown_(self) -> str:
        """Markdown for notebooks."""
        return str(self).replace("\n", "  \n")

    def parts(self) -> tuple[list[str], list[list[str]], list[str]]:
        """The lines above the table, its rows, and the lines below."""
        over = ""
        if self.seeds > 1:
            over = f" ({self.low:.4g} to {self.high:.4g} over {self.seeds} seeds)"
        rows = [["", self.output, "lowest seed", "highest seed"]]
        rows.append(["best", *(f"{x:.4g}" for x in (self.value, self.low, self.high))])
        for axis, label, *values in self.neighbours:
            rows.append([f"{axis} {as_text(label)}", *map(_cell, values)])
        if self.seeds == 1:
            rows = [row[:2] for row in rows]
        above = [
            f"{self.members:,} members, {self.diverged:,} diverged"
            + (f", {self.unfinished:,} not finished" if self.unfinished else ""),
            f"{'highest' if self.maximized else 'lowest'} {self.output}: "
            f"{self.value:.4g}{over}",
            f"at {_point(self.best)}",
            *self._lacking(),
        ]
        edges = ", ".join(self.edges)
        return above, rows, [f"at the end of its axis: {edges}"] if edges else []

    def _lacking(self) -> list[str]:
        if not self.lacking:
            return []
        some = self.lacking > 1
        line = f"{self.lacking:,} {'points lack' if some else 'point lacks'} seeds"
        if self.promising is not None:
            value, point = self.promising
            line += f"; by those that ran, {value:.4g} at {_point(point)}"
        return [line]


def summary(
    curves: xr.Dataset,
    output: str | None = None,
    *,
    maximize: bool | None = None,
    seed_dim: str = "seed",
) -> Summary:
    r"""The best point of a sweep, its neighbours and its spread over seeds.

    Judge an output :math:`y` by its last value, averaged over the seeds
    :math:`s = 1 \dots S` of a point :math:`p`. A point is never the best if the output
    of one of its seeds diverged or is not finished:

    .. math::
        p^* = \arg\min_p \frac{1}{S} \sum_s y_{p,s}

    Args:
      curves: what `sweep` returned.
      output: the output to judge, with at most one axis of its own; required if there
        are several and none is "loss".
      maximize: whether higher is better, as for an accuracy; required unless the output
        is called a loss, an error or the like.
      seed_dim: the axis over which to average, if there is one, also among points.

    Returns:
      A `Summary`: a frozen dataclass of the numbers, which prints as text.

    Raises:
      TypeError: `curves` is anything else, such as a mean over the seeds.
      ValueError: there is no such output, `output` or `maximize` is required, the
        output is complex or has several axes of its own, or no point finished without
        diverging.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import summary, sweep
      >>> def train(gamma, seed):
      ...     return {"loss": (gamma - 0.9) ** 2 + 0.001 * seed.astype(float)}
      >>> curves = sweep(
      ...     train, {"gamma": [0.8, 0.9, 0.99], "seed": range(3)}, progress=False
      ... )
      >>> print(summary(curves))
      9 members, 0 diverged
      lowest loss: 0.001 (0 to 0.002 over 3 seeds)
      at gamma 0.9
      <BLANKLINE>
      |            |   loss | lowest seed | highest seed |
      | ---------- | ------ | ----------- | ------------ |
      | best       |  0.001 |           0 |        0.002 |
      | gamma 0.8  |  0.011 |        0.01 |        0.012 |
      | gamma 0.99 | 0.0091 |      0.0081 |       0.0101 |

    References:
      Sivaprasad et al., [Optimizer Benchmarking Needs to Account for Hyperparameter
      Tuning](https://arxiv.org/abs/1910.11758), 2020, on judging by more than the best
    """
    curves = ordered(curves)
    output = resolve_output(curves, output)
    most = check_direction(output, maximize)
    found = reduce_seeds(curves, output, seed_dim)
    place = best_index(found.mean, most)
    promising = None
    if found.lacking:
        other = best_index(found.of_others, most)
        value = float(found.of_others.isel(other))
        best = float(found.mean.isel(place))
        if value > best if most else value < best:
            promising = value, _labels(found.of_others.isel(other))
    neighbours: list[Neighbour] = []
    edges: list[str] = []
    for axis, i in place.items():
        labels = curves[axis].values if axis in curves.coords else np.array([])
        if labels.dtype.kind not in "iuf" or not len(labels):
            continue
        if len(labels) > 2 and i in (0, len(labels) - 1):
            edges.append(axis)
        for j in (i - 1, i + 1):
            if 0 <= j < len(labels):
                there, label = place | {axis: j}, labels[j].item()
                if bool(found.finished.isel(there)):
                    neighbours.append((axis, label, *found.values_at(there)))
                else:
                    neighbours.append((axis, label, None, None, None))
    value, low, high = found.values_at(place)
    return Summary(
        output,
        _labels(found.mean.isel(place)),
        value,
        low,
        high,
        found.seeds,
        neighbours,
        edges,
        members=curves["finished"].size,
        diverged=int(diverged(curves, output).sum()),
        unfinished=int((~curves["finished"]).sum()),
        maximized=most,
        lacking=found.lacking,
        promising=promising,
    )


def _labels(point: xr.DataArray) -> dict[str, Any]:
    return {str(name): x.item() for name, x in point.coords.items()}


def to_dataframe(curves: xr.Dataset) -> pd.DataFrame:
    """Make a table of the hyperparameters and last outputs, one row for each member.

    Args:
      curves: what `sweep` returned.

    Returns:
      A pandas DataFrame with a row for each member, in the order of the grid, and a
      column for each axis, each output with at most one axis of its own, `diverged`
      and `finished`.

    Raises:
      ModuleNotFoundError: pandas is not installed.

    Example:
      >>> from jax_rmsprop import sweep, to_dataframe
      >>> curves = sweep(
      ...     lambda gamma: {"loss": gamma**2}, {"gamma": [0.25, 0.5]}, progress=False
      ... )
      >>> print(to_dataframe(curves))
         gamma    loss  diverged  finished
      0   0.25  0.0625     False      True
      1   0.50  0.2500     False      True

    References:
      Wickham, [Tidy Data](https://doi.org/10.18637/jss.v059.i10), 2014
    """
    require_extra("sweep", "pandas")
    curves = checked(curves)
    last = {name: last_value(curves, name) for name in outputs(curves)}
    rows = curves[["diverged", "finished"]].assign(
        {name: x for name, x in last.items() if x.ndim == curves["finished"].ndim}
    )
    axes = [str(name) for name in curves["finished"].coords]
    columns = [*axes, *(n for n in last if n in rows), "diverged", "finished"]
    return rows.to_dataframe().reset_index().loc[:, columns]


def ordered(curves: xr.Dataset) -> xr.Dataset:
    """Sort the result of `sweep` by the values of its numeric axes.

    Raises:
      TypeError, ValueError: as in `checked`.
    """
    curves = checked(curves)
    unsorted = [a for a in _numeric(curves) if (np.diff(curves[a].values) < 0).any()]
    return curves.sortby(unsorted) if unsorted else curves


def checked(curves: xr.Dataset) -> xr.Dataset:
    """Check that a dataset is the result of `sweep`, or a selection of it.

    Returns:
      The same with its original dtypes, and "member" as a dimension if one member was
      selected.

    Raises:
      TypeError: anything but a sweep's results.
      ValueError: an axis has a duplicate, as when two sweeps were joined.
    """
    wanted = {"finished": bool, "diverged": bool, "diverged_at": int}
    for name in (*wanted, "output"):
        if name not in getattr(curves, "variables", ()):
            raise TypeError(
                f"`curves` must be what `sweep` returned, got {type(curves).__name__} "
                f"without {name!r}"
            )
    for name, kind in wanted.items():
        found = curves[name]
        if found.dtype.kind in "Of":  # where() has put in NaN
            whole = found.notnull()
            known = found.where(whole, -1 if kind is int else False)
            if not bool((known == known.astype(kind)).all()):
                raise TypeError(
                    "`curves` must be what `sweep` returned, but its "
                    f"{name!r} is {found.dtype}; `seed_dim` averages the seeds instead"
                )
            curves = curves.assign({name: known.astype(kind)})
    if "step" in curves["finished"].coords:  # one was selected
        curves = curves.drop_vars("step")
    if not curves["finished"].dims:
        members = [n for n in curves.coords if n not in ("output", "step")]
        kept = curves.reset_coords([n for n in members if not curves[n].dims])
        curves = kept.expand_dims("member").set_coords(members)
        curves = curves.assign_coords(output=kept["output"])
    for axis in _numeric(curves):
        labels, count = np.unique(curves[axis].values, return_counts=True)
        if (count > 1).any():
            raise ValueError(
                f"`curves` must have no duplicates on an axis, but {axis} has "
                f"{labels[count > 1][0]} more than once"
            )
    return curves


def _numeric(curves: xr.Dataset) -> list[str]:
    """The numeric axes."""
    return [
        str(axis)
        for axis in curves["finished"].dims
        if axis in curves.coords and curves[axis].dtype.kind in "iuf"
    ]


def diverged(curves: xr.Dataset, output: str) -> xr.DataArray:
    """Mask of the members whose `output` diverged, or that ended before all steps."""
    lost = curves["diverged_at"].sel(output=output, drop=True) >= 0
    if "steps" in curves and "step" in curves.dims:
        lost |= curves["finished"] & (curves["steps"] < curves.sizes["step"])
    return lost


def outputs(curves: xr.Dataset) -> list[str]:
    """The names of the training's outputs, but for those that were dropped."""
    names = [str(name) for name in curves["output"].values]
    there = [name for name in names if name in curves.data_vars]
    if not there:
        raise ValueError(f"`curves` must have an output: one of {', '.join(names)}")
    return there


def resolve_output(curves: xr.Dataset, output: str | None) -> str:
    """The output to judge by.

    Raises:
      ValueError: there is no such output, or there are several, none of them named or
        called "loss".
    """
    names = outputs(curves)
    if output is None and "loss" in names:
        return "loss"
    if output not in names and (output is not None or len(names) > 1):
        raise ValueError(expected("output", f"one of {', '.join(names)}", output))
    return output or names[0]


def last_value(curves: xr.Dataset, output: str) -> xr.DataArray:
    """The last value of an output: at the last step run, then of its leading axis."""
    own, values = own_axes(curves, output), curves[output]
    if own[:1] == ["step"] and "steps" in curves:
        labels = curves["step"].values  # some may have been selected
        last = np.searchsorted(labels, curves["steps"].values) - 1
        values = values.isel(step=curves["steps"].copy(data=last.clip(min=0)))
        return values.drop_vars("step", errors="ignore")
    return values.isel({own[0]: -1}) if own else values


def own_axes(curves: xr.Dataset, output: str) -> list[str]:
    """The axes of an output that are not axes of the grid."""
    return [str(d) for d in curves[output].dims if d not in curves["finished"].dims]


def reduce_seeds(curves: xr.Dataset, output: str, seed_dim: str = "seed") -> Scores:
    """The output's last value at each point, over the seeds.

    Raises:
      ValueError: the output has several axes of its own.
    """
    values = last_value(curves, output)
    if values.ndim > curves["finished"].ndim:
        raise ValueError(
            f"`output` must have at most one axis of its own, but {output} has "
            f"{values.ndim - curves['finished'].ndim + 1}"
        )
    if values.dtype.kind == "c":
        raise ValueError(
            f"`output` must be real, but {output} is {values.dtype}; return its size"
        )
    ran = curves["finished"]
    good = ran & ~diverged(curves, output)
    values = values.astype(float).where(good).compute()
    of_points = seed_dim in values.coords and values[seed_dim].dims == ("member",)
    if seed_dim not in values.dims and not of_points:
        return Scores(values, values, values, 1, 0, values, ran)
    if seed_dim not in values.dims:
        values, ran = _by_point(values, seed_dim), _by_point(ran, seed_dim)
        ran = ran.fillna(False).astype(bool)
    some = ran.any(seed_dim) & ~ran.all(seed_dim)
    mean = values.mean(seed_dim, skipna=False)
    # The mean of the seeds that ran, if none diverged.
    others = values.mean(seed_dim).where(some & (values.notnull() | ~ran).all(seed_dim))
    return Scores(
        mean,
        values.min(seed_dim, skipna=False),
        values.max(seed_dim, skipna=False),
        values.sizes[seed_dim],
        int(some.sum()),
        others,
        ran.all(seed_dim),
    )


def _by_point(values: xr.DataArray, seed_dim: str) -> xr.DataArray:
    """Split a list of members into points and seeds."""
    import pandas as pd
    import xarray as xr

    axes = [str(n) for n in values.coords if n not in (seed_dim, "output")]
    table = pd.DataFrame({n: values[n].values for n in [*axes, seed_dim]})
    point = (
        table.groupby(axes, sort=False, dropna=False).ngroup().to_numpy()
        if axes
        else np.zeros(len(table), int)
    )
    seeds, seed = np.unique(table[seed_dim], return_inverse=True)
    first = np.unique(point, return_index=True)[1]
    found = np.full((len(first), len(seeds)), np.nan)
    found[point, seed] = values.values
    coords = {n: ("member", values[n].values[first]) for n in axes}
    return xr.DataArray(found, {**coords, seed_dim: seeds}, ("member", seed_dim))


def check_direction(output: Any, maximize: bool | None) -> bool:
    """Whether higher is better.

    Raises:
      TypeError: `maximize` is not a bool.
      ValueError: it is None, and the output's name does not decide.
    """
    if maximize is not None:
        return check_bool("maximize", maximize)
    if not isinstance(output, str):
        raise TypeError(expected("by", "an output's name", output))
    words = "loss", "error", "cost", "regret", "nll", "mse", "rmse", "mae", "perplexity"
    if not any(word in output.lower() for word in words):
        raise ValueError(
            f"`maximize` must be True or False for {short_repr(output)}, whose name "
            "does not say whether more is better"
        )
    return False


def best_index(mean: xr.DataArray, most: bool) -> dict[str, int]:
    """Find the indices of the best value, by dimension.

    Raises:
      ValueError: no value is finite.
    """
    values = -mean if most else mean
    if not bool(np.isfinite(values).any()):
        raise ValueError("every point has a seed that diverged or did not finish")
    place = np.unravel_index(int(np.nanargmin(values.values)), values.shape)
    return {str(d): int(i) for d, i in zip(values.dims, place, strict=True)}


def _cell(x: float | None) -> str:
    if x is None:
        return "not finished"
    return "diverged" if np.isnan(x) else f"{x:.4g}"


def _point(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} {as_text(x)}" for name, x in point.items())


def as_text(value: Any, digits: int = 6) -> str:
    """A number with so many digits, and more where they tell it from 1."""
    if not isinstance(value, float | np.floating):
        return str(value)
    if 0.9 < value < 1:
        digits = max(digits, 2 - math.floor(math.log10(1 - value)))
    return f"{value:.{digits}g}"

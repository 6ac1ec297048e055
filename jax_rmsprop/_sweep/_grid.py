"""The points of a sweep: the axes' values, and which members share a program."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jax_rmsprop._sweep._trace import complement
from jax_rmsprop._validate import check_int, short_repr

Coordinates = dict[str, tuple[tuple[str, ...], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One hyperparameter and its values.

    Attributes:
      labels: the coordinate of each value, as a person reads it.
      numbers: what a program gets as an array; None if the values are Python's.
      complements: where that has lost what a value is short of 1, that; else None.
      values: Python's values, each once; empty for numbers.
      which: for each entry of the axis, which of `values` it is; 0 for numbers.
    """

    labels: np.ndarray
    numbers: np.ndarray | None
    values: tuple[Any, ...]
    which: np.ndarray
    complements: np.ndarray | None = None

    @property
    def digest(self) -> str:
        """Short hash of the values."""
        if self.labels.dtype.kind == "U":
            data = "\0".join(self.labels.tolist()).encode()
        else:
            data = f"{self.labels.dtype} ".encode() + self.labels.tobytes()
        return hashlib.sha256(data).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Group:
    """The members that share one program, since they share Python's values.

    Attributes:
      python: Python's values, by the axis' name.
      members: their numbers in the grid, ascending.
      numbers: for each numeric axis, the members' values, and their complements.
    """

    python: dict[str, Any]
    members: np.ndarray
    numbers: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Axes, and whether their product is meant or the points that they pair."""

    axes: dict[str, Axis]
    zipped: bool

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of a result."""
        return ("member",) if self.zipped else tuple(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Their lengths."""
        lengths = tuple(len(axis.labels) for axis in self.axes.values())
        return lengths[:1] if self.zipped else lengths

    @property
    def size(self) -> int:
        """The number of members."""
        return int(np.prod(self.shape))

    @property
    def coordinates(self) -> Coordinates:
        """The axes' labels, as xarray takes them."""
        return {
            name: (("member",) if self.zipped else (name,), axis.labels)
            for name, axis in self.axes.items()
        }

    def groups(self) -> list[Group]:
        """The members, in the order in which they run: one program after another."""
        entry = np.unravel_index(np.arange(self.size), self.shape)
        if self.zipped:
            entry *= len(self.axes)  # one dimension, which all axes share
        entries = dict(zip(self.axes, entry, strict=True))
        python = {n: a for n, a in self.axes.items() if a.numbers is None}
        which = [axis.which[entries[name]] for name, axis in python.items()]
        kinds, kind = np.unique(
            np.stack([np.zeros(self.size, int), *which]), axis=1, return_inverse=True
        )
        groups: list[Group] = []
        for number, chosen in enumerate(kinds[1:].T):
            members = np.flatnonzero(kind == number)
            groups.append(
                Group(
                    {
                        name: axis.values[i]
                        for (name, axis), i in zip(python.items(), chosen, strict=True)
                    },
                    members,
                    {
                        name: numbers[entries[axis][members]]
                        for name, axis, numbers in self._inputs()
                    },
                )
            )
        return groups

    def _inputs(self) -> Generator[tuple[str, str, np.ndarray]]:
        """The numbers that a program gets: name, axis, and values."""
        for name, axis in self.axes.items():
            if axis.numbers is not None:
                yield name, name, axis.numbers
            if axis.complements is not None:
                yield complement(name), name, axis.complements


def parse(grid: Any, zipped: bool) -> Grid:
    """Check a grid as a person writes it.

    Raises:
      TypeError: not a mapping from names to sequences of values.
      ValueError: an axis that is empty, or has NaN, or a number that 32 bits do not
        hold; zipped axes of unequal lengths; a name that a result needs itself.
    """
    if not isinstance(grid, Mapping) or not grid:
        raise TypeError(
            "`grid` must map the name of at least one axis to its values, got "
            f"{short_repr(grid)}"
        )
    axes: dict[str, Axis] = {}
    for name, values in grid.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in RESERVED:
            raise ValueError(
                "an axis' name must be an argument's name, and none of "
                f"{', '.join(sorted(RESERVED))}; got {name!r}"
            )
        axes[name] = _axis(name, values)
    lengths = {name: len(axis.labels) for name, axis in axes.items()}
    if zipped and len(set(lengths.values())) > 1:
        found = ", ".join(f"`{name}` has {n}" for name, n in lengths.items())
        raise ValueError(f"zipped axes must be equally long, but {found}")
    return Grid(axes, zipped)


def distinct(points: Grid) -> None:
    """Check that an axis of a product has no value twice: by it, a result is found.

    Raises:
      ValueError: naming the axis and the value.
    """
    for name, axis in points.axes.items():
        unique, count = np.unique(axis.labels, return_counts=True)
        if not points.zipped and (count > 1).any():
            raise ValueError(
                f"`{name}` must have each value once, but {unique[count > 1][0]} is "
                f"there {count.max()} times"
            )


# What a result, or its folder, calls something else.
RESERVED = frozenset(
    {"checksum", "diverged", "diverged_at", "finished", "member", "output"}
)


def _axis(name: str, values: Any) -> Axis:
    if isinstance(values, jax.core.Tracer):
        raise TypeError(f"`{name}` must be known when the sweep is made, got a tracer")
    if hasattr(values, "__array__") and not isinstance(values, jax.Array):
        values = np.asarray(values)  # of pandas, xarray, PyTorch
    is_array = isinstance(values, np.ndarray | jax.Array)
    if is_array and jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"`{name}` must be numbers or Python values, got random keys; sweep over "
            "seeds, and make the key of each with jax.random.key"
        )
    if isinstance(values, str) or not (is_array or isinstance(values, Sequence)):
        raise TypeError(
            f"`{name}` must be a sequence of values, got {short_repr(values)}"
        )
    if is_array and values.ndim != 1:
        raise ValueError(
            f"`{name}` must have one dimension, got an array of shape {values.shape}"
        )
    if len(values) == 0:
        raise ValueError(f"`{name}` must have at least one value, got none")
    if is_array and jnp.issubdtype(values.dtype, jnp.floating):
        # NumPy's own tools stop at its own floats; float64 holds the others exactly.
        values = np.asarray(values, None if values.dtype.kind == "f" else "float64")
    labels = np.asarray(values) if is_array or _all_numbers(values) else None
    if labels is not None and labels.dtype.kind in "iuf":
        numbers = _numbers(name, labels)
        lost = complements(labels, numbers)
        unique = np.unique(labels)
        same = np.flatnonzero(np.diff(unique.astype(numbers.dtype)) == 0)
        if lost is None and len(same):
            a, b = unique[same[0] :][:2].tolist()
            raise ValueError(
                f"`{name}` must have values that differ in {numbers.dtype}, but {a} "
                f"and {b} are the same there"
            )
        return Axis(labels, numbers, (), np.zeros(len(labels), int), lost)
    return _python_axis(np.asarray(values).tolist() if is_array else list(values))


def _all_numbers(values: Iterable[Any]) -> bool:
    return all(
        (isinstance(v, int | float | np.number) and not isinstance(v, bool))
        or (isinstance(v, jax.Array) and v.shape == ())
        for v in values
    )


def _numbers(name: str, labels: np.ndarray) -> np.ndarray:
    """Cast to JAX's own width, 32 bits unless x64 is on, as the programs get them."""
    if np.isnan(labels).any():
        where = int(np.isnan(labels).argmax())
        raise ValueError(f"`{name}` must have no NaN, got one at [{where}]")
    dtype = jax.dtypes.canonicalize_dtype(labels.dtype)
    bounds = jnp.iinfo(dtype) if labels.dtype.kind in "iu" else jnp.finfo(dtype)
    wrong = (labels < bounds.min) | (labels > bounds.max)
    if (wrong & np.isfinite(labels)).any():
        raise ValueError(f"`{name}` must fit {dtype}, got {labels[wrong][0]}")
    numbers = labels.astype(dtype)
    if labels.dtype.kind == "f":
        gone = (labels != 0) & (abs(labels) < jnp.finfo(dtype).smallest_normal)
        if gone.any():
            raise ValueError(f"`{name}` must fit {dtype}, where {labels[gone][0]} is 0")
    return numbers


def complements(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray | None:
    """1 less each label, where for any of them the numbers have lost it, else None.

    Lost is what is wrong by a thousandth, as at 0.9999999 in float32.
    """
    exact = 1 - labels.astype("float64")
    near = (exact > 0) & (exact <= 0.5)
    lost = abs((1 - numbers.astype("float64")) - exact) > 1e-3 * exact
    return exact.astype(numbers.dtype) if (near & lost).any() else None


def _python_axis(values: list[Any]) -> Axis:
    # By type too: True == 1, and a training may tell them apart.
    keys = [(type(v), v if isinstance(v, Hashable) else id(v)) for v in values]
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    which = np.array([order[key] for key in keys])
    unique = tuple(dict(zip(keys, values, strict=True)).values())
    if all(isinstance(v, bool) for v in unique):
        labels = np.array(unique)
    else:
        names = [_label(value) for value in unique]
        labels = np.array(
            [f"{s}[{i}]" if names.count(s) > 1 else s for i, s in enumerate(names)]
        )
    return Axis(labels[which], None, unique, which)


def _label(value: Any) -> str:
    """A name without an address in memory, which is another in every process."""
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__name__", None) or (
        str(value)
        if type(value).__repr__ is not object.__repr__
        else type(value).__name__
    )


def log_one_minus(low: float, high: float, num: int) -> np.ndarray:
    r"""Gammas that are spaced evenly in log(1 - gamma).

    An average with decay gamma looks back over about 1/(1 - gamma) steps, so near 1
    it is the distance from 1 that counts: .9, .99, .999 are a factor of ten apart.

    .. math::
        \gamma_i = 1 - (1-low)^{1-i/(num-1)} (1-high)^{i/(num-1)}, \quad
        i = 0 \dots num-1

    Args:
      low: the first gamma, in [0, 1).
      high: the last one, in [0, 1).
      num: how many, at least 2.

    Returns:
      A float64 array of shape [num], for an axis of `sweep` or `population`.

    Raises:
      TypeError: `num` is not an integer.
      ValueError: an argument out of its range.

    Example:
      >>> from jax_rmsprop import log_one_minus
      >>> print(log_one_minus(0.9, 0.9999, 4))
      [0.9    0.99   0.999  0.9999]

    References:
      [Zhang et al., Dive into Deep Learning](https://d2l.ai/chapter_optimization/rmsprop.html)
    """
    for name, value in (("low", low), ("high", high)):
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {short_repr(value)}")
    count = check_int("num", num, low=2)
    gammas = 1 - np.geomspace(1 - low, 1 - high, count)
    gammas[[0, -1]] = low, high
    return gammas

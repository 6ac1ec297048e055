"""The members of a sweep: the axes' values, and which members share a program."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jax_rmsprop._validate import expected, short_repr
from jax_rmsprop.sweeps._identity import identify
from jax_rmsprop.sweeps._points import Range, ShortOfOne

if TYPE_CHECKING:
    import pandas as pd

Columns = dict[str, np.ndarray]
# The kinds of axes of Python values; an axis of numbers has its dtype.
PYTHON_KINDS = "bool", "int", "float", "str"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One hyperparameter and its values.

    Attributes:
      labels: the coordinate of each value in the results.
      kind: the dtype of numbers in a program, or one of `PYTHON_KINDS`.
      values: the Python values by label; empty for numbers.
      named: whether the caller has named the values by `labels`.
    """

    labels: np.ndarray
    kind: str
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])
    named: bool = False

    def named_by(self, known: Mapping[str, str]) -> tuple[Axis, dict[str, str]]:
        """The axis with the labels that its values have in a store, and all labels.

        Args:
          known: the store's labels, and the identity of each (`identify`).

        Raises:
          TypeError: a value cannot be identified.
        """
        known = dict(known)
        if self.kind != "str":
            return self, known
        label_of, new = {what: label for label, what in known.items()}, dict[str, str]()
        for label, value in self.values.items():
            what = label if self.named or isinstance(value, str) else _identified(value)
            if what not in label_of:
                label_of[what] = f"{label} {what[:6]}" if label in known else label
                known[label_of[what]] = what
            new[label] = label_of[what]
        labels = np.array([new[label] for label in self.labels.tolist()])
        values = {new[label]: value for label, value in self.values.items()}
        return dataclasses.replace(self, labels=labels, values=values), known


@dataclasses.dataclass(frozen=True)
class Combination:
    """The members that share one program, since they share the Python values.

    Attributes:
      name: the shared values in words; empty if all axes are numbers.
      python: the shared Python values, by axis.
      members: their numbers, ascending.
    """

    name: str
    python: dict[str, Any]
    members: np.ndarray


@dataclasses.dataclass(frozen=True)
class Members:
    """Distinct members, found by their hyperparameters.

    Attributes:
      columns: the labels of the members for each axis, as a store has them.
      kinds: the kind of each axis.
      index: the index of their values, as their programs get them.
    """

    columns: Columns
    kinds: dict[str, str]
    index: pd.MultiIndex

    @functools.cached_property
    def numbers(self) -> Columns:
        """The numbers as programs get them, by axis in sorted order."""
        kinds = {n: k for n, k in sorted(self.kinds.items()) if k not in PYTHON_KINDS}
        return {name: self.columns[name].astype(kind) for name, kind in kinds.items()}

    def locate(self, columns: Columns) -> np.ndarray:
        """The number of the member in each row of a table; -1 if there is none."""
        return self.index.get_indexer(_index(columns, self.kinds))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Axes, and whether to pair them instead of forming their product."""

    axes: dict[str, Axis]
    zipped: bool

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of a result."""
        return ("member",) if self.zipped else tuple(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the dimensions."""
        lengths = tuple(len(axis.labels) for axis in self.axes.values())
        return lengths[:1] if self.zipped else lengths

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each axis."""
        return {name: axis.kind for name, axis in self.axes.items()}

    @property
    def coordinates(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """The axes' labels, as coordinates of xarray."""
        return {
            name: (self.dims if self.zipped else (name,), axis.labels)
            for name, axis in self.axes.items()
        }

    def members(self) -> tuple[Members, np.ndarray]:
        """The distinct members, and for each point the number of its member."""
        every = [x.labels.astype(column_dtype(x.kind)) for x in self.axes.values()]
        if not self.zipped:
            every = [x.ravel() for x in np.meshgrid(*every, indexing="ij")]
        index = _index(dict(zip(self.axes, every, strict=True)), self.kinds)
        first = np.flatnonzero(~index.duplicated())
        columns = {n: x[first] for n, x in zip(self.axes, every, strict=True)}
        members = Members(columns, self.kinds, index.take(first))
        return members, members.index.get_indexer(index)

    def combinations(self, members: Members) -> list[Combination]:
        """Group the members by program."""
        import pandas as pd

        labels = {n: members.columns[n] for n, a in self.axes.items() if a.values}
        which = np.zeros(len(members.index), int)
        if labels:
            groups = pd.DataFrame(labels).groupby(list(labels), sort=False)
            which = groups.ngroup().to_numpy()
        found: list[Combination] = []
        for i in range(which.max() + 1):
            own = np.flatnonzero(which == i)
            shared = {name: column[own[0]] for name, column in labels.items()}
            python = {name: self.axes[name].values[x] for name, x in shared.items()}
            words = ", ".join(f"{name} {x}" for name, x in shared.items())
            found.append(Combination(words, python, own))
        return found


def column_dtype(kind: str) -> np.dtype:
    """The dtype of an axis' labels in a store."""
    wide = {"f": "float64", "i": "int64", "u": "uint64", "b": "bool", "U": "object"}
    return np.dtype(wide[np.dtype(kind).kind])


def _index(columns: Columns, kinds: Mapping[str, str]) -> pd.MultiIndex:
    """Index members by the values that their programs get, to find equal ones.

    A float32 program gets the same number for 0.1 in float32 and in float64.
    """
    import pandas as pd

    keys = [
        columns[name] if kind in PYTHON_KINDS else columns[name].astype(kind)
        for name, kind in sorted(kinds.items())
    ]
    return pd.MultiIndex.from_arrays(keys)


def parse_grid(grid: Any, zipped: bool, labels: Any = None) -> Grid:
    """Check a caller's axes and labels, and make a grid of them.

    Raises:
      TypeError: not a mapping from names to sequences of values.
      ValueError: an axis that is empty or has NaN or a number that 32 bits do not hold;
        zipped axes of unequal lengths; a reserved name.
    """
    if not isinstance(grid, Mapping) or not grid:
        allowed = "a mapping of the name of at least one axis to its values"
        raise TypeError(expected("axes", allowed, grid))
    if not isinstance(labels, Mapping | None):
        allowed = "a mapping of the names of axes to texts for their values"
        raise TypeError(expected("labels", allowed, labels))
    axes: dict[str, Axis] = {}
    labels = {as_argument(name): texts for name, texts in (labels or {}).items()}
    for name, values in grid.items():
        name = as_argument(name)
        wrong = not (isinstance(name, str) and name.isidentifier()) or name in axes
        if wrong or is_reserved(name):
            raise ValueError(
                "an axis must have the name of an argument, other than "
                f"{', '.join(_RESERVED)}, carry_0 and the like; got {name!r}"
            )
        axes[name] = _axis(name, values, zipped, labels.get(name))
    for name in set(labels) - set(axes):
        raise ValueError(f"`labels` must name axes, but there is no {name!r}")
    lengths = {name: len(axis.labels) for name, axis in axes.items()}
    if zipped and len(set(lengths.values())) > 1:
        found = ", ".join(f"`{name}` has {n}" for name, n in lengths.items())
        raise ValueError(f"zipped axes must be equally long, but {found}")
    return Grid(axes, zipped)


def check_distinct(points: Grid) -> None:
    """Check that the axes of a product have no duplicates, so results can be indexed.

    Raises:
      ValueError: naming the axis and the value.
    """
    for name, axis in points.axes.items():
        unique, count = np.unique(axis.labels, return_counts=True)
        if not points.zipped and (count > 1).any():
            raise ValueError(
                f"`{name}` must not contain duplicates, but {unique[count > 1][0]} "
                f"appears {count.max()} times"
            )


_RESERVED = (
    "carried diverged diverged_at finished member output rung step steps".split()
)


def as_argument(name: Any) -> Any:
    """The name as Python writes it, which replaces some letters."""
    return unicodedata.normalize("NFKC", name) if isinstance(name, str) else name


def is_reserved(name: str) -> bool:
    """Whether a result or a store uses the name itself."""
    return name in _RESERVED or re.fullmatch(r"carry_\d+", name) is not None


def _axis(name: str, values: Any, zipped: bool, names: Any) -> Axis:
    if isinstance(values, jax.core.Tracer):
        raise TypeError(f"`{name}` must be concrete values, got a tracer")
    if isinstance(values, Range):
        ends = f"{values.scale}({values.low:g}, {values.high:g}"
        raise TypeError(
            f"`{name}` must be a sequence of values, got {ends}); say how many, "
            f"{ends}, 5), or draw them with points(space, n)"
        )
    short_of_1 = isinstance(values, ShortOfOne)
    if hasattr(values, "__array__") and not isinstance(values, jax.Array):
        values = np.asarray(values)  # such as of pandas, xarray, PyTorch
        if values.dtype.kind in "mM":  # Python's own times have no nanoseconds
            values = values.astype(f"{values.dtype.kind}8[us]")
    is_array = isinstance(values, np.ndarray | jax.Array)
    if is_array and jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"`{name}` must be numbers or Python values, got random keys; sweep over "
            "seeds, and make a key of each with jax.random.key"
        )
    if isinstance(values, str) or not (is_array or isinstance(values, Sequence)):
        raise TypeError(expected(name, "a sequence of values", values))
    if is_array and values.ndim != 1:
        raise ValueError(
            f"`{name}` must have one dimension, got an array of shape {values.shape}"
        )
    if len(values) == 0:
        raise ValueError(f"`{name}` must have at least one value, got none")
    labels = np.asarray(values) if is_array or _all_numbers(values) else None
    if labels is not None and not (labels.dtype.isnative and labels.itemsize in (4, 8)):
        for kind, wide in ((jnp.floating, "float64"), (jnp.integer, "int64")):
            if jnp.issubdtype(labels.dtype, kind):  # pandas has no others
                labels = labels.astype(wide)
    if labels is not None and labels.dtype.kind in "iuf" and names is None:
        kind = jax.dtypes.canonicalize_dtype(labels.dtype)
        check_numbers(name, labels, kind, short_of_1)
        unique = np.unique(labels)
        same = np.flatnonzero(np.diff(unique.astype(kind)) == 0)
        if len(same) and not zipped:  # other axes may distinguish zipped points
            a, b = unique[same[0] :][:2].tolist()
            raise ValueError(
                f"`{name}` must have values that differ in {kind}, but {a} and {b} "
                "round to the same number"
            )
        return Axis(labels, str(kind))
    every = np.asarray(values).tolist() if is_array else list(values)
    return _python_axis(name, every, names)


def _all_numbers(values: Iterable[Any]) -> bool:
    return all(
        (isinstance(v, int | float) and not isinstance(v, bool))
        or (
            isinstance(v, jax.Array | np.generic)
            and v.shape == ()
            and jnp.issubdtype(v.dtype, jnp.number)
        )
        for v in values
    )


def check_numbers(
    name: str, labels: np.ndarray, dtype: np.dtype, short_of_1: bool = False
) -> None:
    """Check that a program's dtype holds numbers, and their distances to 1."""
    _check_no_nan(name, labels)
    floating = dtype.kind == "f"
    info: Any = jnp.finfo(dtype) if floating else jnp.iinfo(dtype)
    wrong = np.isfinite(labels) & ((labels < info.min) | (labels > info.max))
    if floating:
        wrong |= (labels != 0) & (abs(labels) < info.smallest_normal)
    if wrong.any():
        raise ValueError(f"`{name}` must fit {dtype}, got {labels[wrong][0]}")
    numbers, short = labels.astype(dtype), 1 - labels.astype("float64")
    with np.errstate(invalid="ignore"):  # of infinity
        lost = abs(1 - numbers.astype("float64") - short) > 1e-3 * abs(short)
    if short_of_1 and lost.any():
        raise ValueError(
            f"`{name}` must be as far from 1 in {dtype} as it says, but 1 - "
            f"{labels[lost][0]} is off by more than a thousandth; set jax_enable_x64, "
            "or make it an axis of Python values (an array of dtype object)"
        )
    one = (labels < 1) & (numbers == 1)
    if one.any():
        text = f"`{name}` {labels[one][0]} rounds to exactly 1 in {dtype}"
        warnings.warn(text, stacklevel=7)  # the line that calls `sweep`


def _check_no_nan(name: str, labels: np.ndarray) -> None:
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        where = int(np.isnan(labels).argmax())
        raise ValueError(f"`{name}` must have no NaN, got one at [{where}]")


def _python_axis(name: str, values: list[Any], names: Any) -> Axis:
    # By type too: True == 1, and a training may distinguish them.
    keys = [(type(v), _hashable(v)) for v in values]
    unique = dict(zip(keys, values, strict=True))
    if names is not None:
        texts = list(names) if isinstance(names, Sequence) else [names]
        valid = all(isinstance(text, str) for text in texts)
        if not (valid and len({*texts}) == len(texts) == len(unique)):
            allowed = f"a text for each value of `{name}`, all different"
            raise ValueError(expected("labels", allowed, names))
    elif all(isinstance(v, bool | np.bool_) for v in values) or _all_numbers(values):
        texts = [x.item() if hasattr(x, "item") else x for x in unique.values()]
    else:
        found = [_label(value) for value in unique.values()]
        texts = [
            f"{text} {_identified(value)[:6]}" if found.count(text) > 1 else text
            for text, value in zip(found, unique.values(), strict=True)
        ]
    label_of = dict(zip(unique, texts, strict=True))
    labels = np.array([label_of[key] for key in keys])
    _check_no_nan(name, labels)
    kind = {"b": "bool", "i": "int", "f": "float"}.get(labels.dtype.kind, "str")
    # The first of those with equal labels.
    by_label = dict(zip(labels.tolist()[::-1], values[::-1], strict=True))
    return Axis(labels, kind, by_label, names is not None)


def _hashable(value: Any) -> Any:
    """The value, or its address if it or a part of it has no hash."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _identified(value: Any) -> str:
    try:
        return identify(value)
    except TypeError as error:
        raise TypeError(
            f"`axes` has a value that cannot be told apart from others, "
            f"{short_repr(value)}: {error}; name the values of its axis with `labels`"
        ) from None


def _label(value: Any) -> str:
    """A name without a memory address, which differs between processes."""
    while isinstance(value, functools.partial):
        value = value.func
    name = value if isinstance(value, str) else getattr(value, "__name__", None)
    if name is None:
        name = " ".join(str(value).split())
        if len(name) > 60 or " at 0x" in name:
            name = type(value).__name__
    return name

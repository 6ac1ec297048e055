"""Keep the results of a sweep while it runs: in memory, or in a store.

All members lie along one dimension, "member", in the order in which they run. They are
computed in segments, each of one batch size, and a segment in blocks of that size: a
block is what a device runs at once. In a store a segment is a zarr group, a block is
one chunk of each of its arrays, so no two processes ever write to one file, and every
member has a checksum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from jax_rmsprop import _versions
from jax_rmsprop._sweep._location import Location, in_one_line, writing
from jax_rmsprop._sweep._program import Rows, agree, widened
from jax_rmsprop._sweep._trace import Spec

if TYPE_CHECKING:
    import xarray as xr


class Segment(NamedTuple):
    """Members that run at one batch size.

    Attributes:
      start: the first of them, in the order in which they run.
      stop: the one after the last.
      size: the batch size: the members of a block.
      rate: seconds a member took on one device; None while that is not known.
    """

    start: int
    stop: int
    size: int
    rate: float | None = None

    @property
    def blocks(self) -> int:
        """Their number; the last one may be short."""
        return math.ceil((self.stop - self.start) / self.size)

    def block(self, number: int) -> slice:
        """The members of a block."""
        start = self.start + number * self.size
        return slice(start, min(start + self.size, self.stop))


class Memory:
    """Results in memory; those of all processes, in the end, in each."""

    def __init__(self, outputs: Spec, members: int):
        """Make room for `members`."""
        self.segments: list[Segment] = []
        self._dims = dimensions(outputs)
        self._rows = {
            name: np.zeros((members, *shape), dtype)
            for name, (shape, dtype) in _arrays(outputs).items()
        }
        self._finished = np.zeros(members, bool)

    def begin(self, segment: Segment) -> None:
        """Add a segment."""
        self.segments.append(segment)

    def timed(self, number: int, rate: float) -> None:
        """Note how fast a segment was."""
        self.segments[number] = self.segments[number]._replace(rate=rate)

    def missing(self, number: int) -> np.ndarray:
        """The numbers of a segment's blocks that are still to be computed."""
        return np.arange(self.segments[number].blocks)

    def write(self, number: int, where: slice, rows: Rows) -> None:
        """Keep some members of a segment."""
        del number
        for name, values in rows.items():
            self._rows[name][where] = values
        self._finished[where] = True

    def flat(self) -> xr.Dataset:
        """All results, along "member"."""
        import xarray as xr

        rows, finished = self._rows, self._finished
        if jax.process_count() > 1:
            rows, finished = _versions.process_allgather((rows, finished))
            process, member = finished.argmax(0), np.arange(finished.shape[1])
            rows = {name: np.asarray(x)[process, member] for name, x in rows.items()}
            finished = finished.any(0)
        rows["finished"] = finished
        return xr.Dataset({name: (self._dims[name], x) for name, x in rows.items()})


class Store:
    """Results in a zarr store; what it has already is kept.

    Its root's attributes hold what the sweep is and the list of its segments. A change
    of them replaces one file by another, so they are whole at every moment.
    """

    def __init__(
        self, at: Location, identity: Mapping[str, Any], outputs: Spec, members: int
    ):
        """Open the store, or make it.

        Raises:
          ValueError: it holds something else; the message says what differs.
          OSError: it cannot be read or written.
        """
        import zarr

        self.at, self._members = at, members
        self._dims = dimensions(outputs)
        self._arrays = _arrays(outputs) | {"checksum": ((), np.dtype("int64"))}
        agree(0)  # the first process has the lock
        found = attributes(at)
        if found is not None:
            _same(at, identity, found["sweep"])
        agree(0)  # all have looked before one of them makes it
        if found is None:
            found = dict[str, Any](sweep=dict(identity), segments=[])
            if jax.process_index() == 0:
                with writing(at):
                    zarr.create_group(at.target, attributes=found, zarr_format=3)
        agree(0)  # it is there
        self.batch_size: int | str = found["sweep"]["batch_size"]
        self.segments = [Segment(*s) for s in found["segments"]]

    def describe(self, grid: xr.Dataset) -> None:
        """Write the grid beside the results, so that they can be read without it."""
        if not self.segments and jax.process_index() == 0:
            # Zarr has no strings of one length.
            words = {
                n: x.astype(object)
                for n, x in grid.coords.items()
                if x.dtype.kind == "U"
            }
            grid = grid.assign_coords(words)
            with writing(self.at):
                grid.to_zarr(self.at.target, group="grid", mode="w", consolidated=False)

    def begin(self, segment: Segment) -> None:
        """Add a segment: first its arrays, then its place in the list."""
        import dask.array as da
        import xarray as xr

        n = segment.stop - segment.start
        arrays = {}
        for name, (shape, dtype) in self._arrays.items():
            # Of these only shape, dtype and chunks are written.
            zeros = da.zeros((n, *shape), dtype=dtype, chunks=(segment.size, *shape))
            arrays[name] = (self._dims[name], zeros)
        if jax.process_index() == 0:
            with writing(self.at):
                xr.Dataset(arrays).to_zarr(
                    self.at.target,
                    group=str(len(self.segments)),
                    mode="w",
                    compute=False,
                    consolidated=False,
                    encoding={name: {"_FillValue": None} for name in arrays},
                )
        self.segments.append(segment)
        self._list()

    def timed(self, number: int, rate: float) -> None:
        """Note how fast a segment was."""
        self.segments[number] = self.segments[number]._replace(rate=rate)
        self._list()

    def missing(self, number: int) -> np.ndarray:
        """The numbers of a segment's blocks that are not there, or not whole."""
        segment = self.segments[number]
        missing = np.ones(segment.blocks, bool)
        if jax.process_index() == 0:
            rows = _open(self.at, number, chunks=None)
            for block in range(segment.blocks):
                missing[block] = not _whole(rows, segment.block(block), segment.start)
        return np.flatnonzero(agree(missing))

    def write(self, number: int, where: slice, rows: Rows) -> None:
        """Keep some members of a segment: whole blocks."""
        import xarray as xr

        start = self.segments[number].start
        # The checksum last: whoever finds it finds the rest.
        for part in (rows, {"checksum": checksums(rows)}):
            with writing(self.at):
                xr.Dataset({n: (self._dims[n], x) for n, x in part.items()}).to_zarr(
                    self.at.target,
                    group=str(number),
                    region={"member": slice(where.start - start, where.stop - start)},
                    consolidated=False,
                    # Else zarr takes -0.0 for a 0 that it need not write.
                    write_empty_chunks=True,
                )

    def flat(self) -> xr.Dataset:
        """All results, along "member", read where they are needed."""
        agree(0)  # all processes have written
        return flat(self.at, len(self.segments), self._members)

    def _list(self) -> None:
        import zarr

        if jax.process_index() == 0:
            with writing(self.at):
                root = zarr.open_group(self.at.target, mode="r+")
                root.attrs.update({"segments": [list(s) for s in self.segments]})
        agree(0)


def flat(at: Location, segments: int, members: int) -> xr.Dataset:
    """The results of a store, along "member", read where they are needed.

    Members that no segment has yet are zero, as are those whose turn has not come.
    """
    import xarray as xr

    parts = [_open(at, number, chunks="auto") for number in range(segments)]
    rows = xr.concat(parts, "member", data_vars="all")
    if rows.sizes["member"] < members:
        absent = np.zeros(members - rows.sizes["member"], int)
        rows = xr.concat(
            [rows, xr.zeros_like(rows.isel(member=absent))], "member", data_vars="all"
        )
    return rows.assign(finished=rows.checksum.compute() != 0).drop_vars("checksum")


def attributes(at: Location) -> dict[str, Any] | None:
    """Read the attributes of a store's root; None if there is no store yet.

    Raises:
      ValueError: something else is there.
      OSError: it cannot be read.
    """
    import zarr
    from zarr.errors import ContainsArrayError, GroupNotFoundError

    path = at.folder
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(
            f"`store` must be a folder or a new path, got the file {at.name}"
        )
    try:
        found = dict(zarr.open_group(at.target, mode="r").attrs)
    except (FileNotFoundError, GroupNotFoundError):
        found = None
    except ContainsArrayError:
        found = {}
    except ValueError as error:  # not even JSON
        raise ValueError(f"`store` {at.name} cannot be read: {error}") from error
    except Exception as error:
        if path is not None:
            raise
        raise OSError(
            f"`store` {at.name} cannot be read: {in_one_line(error)}"
        ) from error
    if found is None and path is not None and path.exists():
        # A process that was killed while it made the store leaves an empty folder.
        others = [p.name for p in path.iterdir() if p.suffix != ".partial"]
        if others:
            raise ValueError(
                f"`store` must be a sweep's or a new path, but {path} has {others[0]}"
            )
    if found is not None and "sweep" not in found:
        raise ValueError(
            f"`store` must be a sweep's, but {at.name} is of something else"
        )
    return found


def dimensions(outputs: Spec) -> dict[str, tuple[str, ...]]:
    """The dimensions of each array: "member", then the output's own by number."""
    own = {
        name: ("member", *(f"{name}_dim_{i}" for i in range(len(x.shape))))
        for name, x in outputs.items()
    }
    return own | {
        "diverged_at": ("member", "output"),
        "finished": ("member",),
        "checksum": ("member",),
    }


def checksums(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each member 1 + CRC-32 of all its bytes, so that 0 says "not there"."""
    arrays = [np.ascontiguousarray(rows[name]) for name in sorted(rows)]
    found = np.zeros(len(arrays[0]), np.int64)
    for member in range(len(found)):
        value = 0
        for array in arrays:
            value = zlib.crc32(array[member].tobytes(), value)
        found[member] = 1 + value
    return found


def _arrays(outputs: Spec) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape of a member and the dtype of each array."""
    own = {name: (x.shape, widened(x.dtype)) for name, x in outputs.items()}
    return own | {"diverged_at": ((len(outputs),), np.dtype("int32"))}


def _whole(rows: xr.Dataset, where: slice, start: int) -> bool:
    """Tell whether a block can be read and is what was written."""
    block = rows.isel(member=slice(where.start - start, where.stop - start))
    try:
        values = {str(name): np.asarray(x) for name, x in block.items()}
    except Exception:  # noqa: BLE001 - each codec has its own, and all mean the same
        return False
    expected = values.pop("checksum")
    return np.array_equal(expected, checksums(values))


def _same(at: Location, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a store of another sweep.

    Raises:
      ValueError: saying the first thing that differs.
    """

    def refuse(what: str) -> None:
        raise ValueError(f"`store` {at.name} holds another sweep: {what}")

    axes = list(ours["axes"]), list(theirs["axes"])
    if axes[0] != axes[1]:
        refuse(f"its axes are {', '.join(axes[1])}, this one's {', '.join(axes[0])}")
    if ours["zipped"] != theirs["zipped"]:
        refuse(f"its `zipped` is {theirs['zipped']}, this one's {ours['zipped']}")
    for name in axes[0]:
        (n, digest), (m, other) = ours["axes"][name], theirs["axes"][name]
        if n != m:
            refuse(f"its {name} has {m} values, this one's {n}")
        if digest != other:
            refuse(f"its {name} has other values")
    for name in ours["versions"]:
        ours_now, then = ours["versions"][name], theirs["versions"].get(name)
        if ours_now != then:
            refuse(
                f"it was computed with {name} {then}, this one is with {ours_now}, "
                "so the bits may differ; `load_sweep` reads it"
            )
    for name in theirs["outputs"] | ours["outputs"]:
        now, then = (x["outputs"].get(name, "missing") for x in (ours, theirs))
        if now != then:
            refuse(f"its output {name} is {then}, this one's {now}")
    if ours["train"] != theirs["train"]:
        refuse("its `train` is another function, or closes over other data")
    if ours["batch_size"] not in ("auto", theirs["batch_size"]):
        refuse(
            f"its `batch_size` is {theirs['batch_size']!r}, "
            f"this one's {ours['batch_size']!r}"
        )


def _open(at: Location, number: int, chunks: Literal["auto"] | None) -> xr.Dataset:
    import xarray as xr

    return xr.open_zarr(
        at.target,
        group=str(number),
        chunks=chunks,
        consolidated=False,
        mask_and_scale=False,
    )

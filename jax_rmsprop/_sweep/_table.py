"""Keep the members of a sweep: in memory, or in a store that only ever grows.

A store is one zarr group, an ordinary xarray Dataset: along "member" a coordinate for
each hyperparameter, a variable for each output, `diverged_at`, `finished`, `checksum`.
A block, what a device runs at once, is one chunk of each. Whoever has computed blocks
appends them: it locks the folder, writes their chunks beyond the end, the checksum
last, and then moves the end by replacing one file, the group's metadata. So whoever
reads sees whole blocks at every moment, and what was killed while it wrote is written
over.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import uuid
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jax_rmsprop import _versions
from jax_rmsprop._sweep._grid import Members, column_dtype
from jax_rmsprop._sweep._location import (
    Location,
    explain_oserror,
    in_one_line,
    locked,
)
from jax_rmsprop._sweep._program import Rows, broadcast_from_process_0, file_dtype
from jax_rmsprop._sweep._trace import OutputSpecs

if TYPE_CHECKING:
    import xarray as xr
    import zarr

# Of what is checked, or read by dask, at once.
_BYTES_AT_ONCE = 16_000_000
_publishing = threading.Lock()


class Block(NamedTuple):
    """Members that one device has run at once.

    Attributes:
      members: their numbers, at most a batch.
      rows: their results; None if another process has them.
    """

    members: np.ndarray
    rows: Rows | None


class Memory:
    """Results in memory; those of all processes, in the end, in each.

    Attributes:
      finished: which members are there.
    """

    def __init__(self, members: Members, outputs: OutputSpecs):
        """Make room for all members."""
        self.finished = np.zeros(members.size, bool)
        self._own = np.zeros(members.size, bool)
        self._dims = dimensions(outputs)
        self._rows = {
            name: np.zeros((members.size, *shape), dtype)
            for name, (shape, dtype) in _result_arrays(outputs).items()
        }

    def append(self, blocks: Sequence[Block]) -> None:
        """Keep what has been computed."""
        for members, rows in blocks:
            self.finished[members] = True
            if rows is not None:
                self._own[members] = True
                for name, values in rows.items():
                    self._rows[name][members] = values

    def to_dataset(self, memory: int) -> xr.Dataset:
        """All members, in their order, in memory as they are."""
        del memory
        import xarray as xr

        rows = self._rows
        if jax.process_count() > 1:
            rows, own = _versions.process_allgather((rows, self._own))
            process, member = own.argmax(0), np.arange(own.shape[1])
            rows = {name: np.asarray(x)[process, member] for name, x in rows.items()}
        rows = rows | {"finished": self.finished}
        return xr.Dataset({name: (self._dims[name], x) for name, x in rows.items()})


class Store:
    """A zarr store, of which some members are asked for.

    Attributes:
      at: where it is.
      header: what its attributes say of the sweep.
    """

    def __init__(
        self,
        at: Location,
        header: Mapping[str, Any],
        members: Members,
        outputs: OutputSpecs,
        check: bool = True,
    ):
        """Look for the members; `check` that all blocks are whole.

        Raises:
          OSError: it cannot be read.
        """
        self.at, self.header = at, header
        self._size: int = header["batch_size"]
        self._members, self._outputs = members, outputs
        self._position = np.full(members.size, -1)
        self._end, self._free = 0, set[int]()
        end = self._published_end()
        damaged = np.zeros(end, bool)
        check &= jax.process_index() == 0
        if check:
            damaged[self._check(range(end))] = True
            self._give_up(np.flatnonzero(damaged).tolist())
        damaged = broadcast_from_process_0(damaged)
        if not check:
            self._find(np.flatnonzero(~damaged).tolist())
        self._end, self._free = end, set(np.flatnonzero(damaged).tolist())

    @property
    def finished(self) -> np.ndarray:
        """Which members are there."""
        return self._position >= 0

    def refresh(self) -> None:
        """Find what others have appended."""
        end = self._published_end()
        self._find(range(self._end, end))
        self._end = max(end, self._end)

    def append(self, blocks: Sequence[Block]) -> None:
        """Find what others have appended, and add what is not there yet.

        Raises:
          OSError: it cannot be written; what is there stays.
        """
        if not blocks:
            return self.refresh()
        first = jax.process_index() == 0
        with locked(self.at) if first else contextlib.nullcontext():
            broadcast_from_process_0(0)  # the first process has the lock
            self.refresh()
            self._find_refilled()
            lacking = [b for b in blocks if not self.finished[b.members].all()]
            if not lacking:
                return
            ends = itertools.count(self._end)
            slots = list(
                itertools.islice(
                    itertools.chain(sorted(self._free), ends), len(lacking)
                )
            )
            end = max(self._end, slots[-1] + 1)
            with explain_oserror(self.at):
                if first:
                    self._resize(end)
                broadcast_from_process_0(0)  # there is room
                self._write(slots, lacking)
                broadcast_from_process_0(0)  # all have written
                if first:
                    _publish(self.at)
                broadcast_from_process_0(0)
            self._free -= set(slots)
            self._end = end
            for slot, (members, _) in zip(slots, lacking, strict=True):
                new = members[~self.finished[members]]
                self._position[new] = slot * self._size + np.arange(len(new))

    def to_dataset(self, memory: int) -> xr.Dataset:
        """All that were asked for, in their order; dask's arrays if they are larger."""
        return select_rows(self.at, self._position, self._outputs, memory)

    def _published_end(self) -> int:
        """The number of blocks that readers see."""
        end = 0
        if jax.process_index() == 0:
            end = _array(_open(self.at), "checksum").shape[0] // self._size
        return int(broadcast_from_process_0(end))

    def _find(self, slots: Iterable[int]) -> None:
        """Find the members that were asked for among these blocks."""
        for run in _runs(list(slots)):
            self._note(run, self._read([*self._members.kinds, "finished"], run))

    def _note(self, slots: Sequence[int], rows: Rows) -> None:
        """Note where members are that were asked for; of equal ones the first."""
        found = self._members.locate(rows)
        new = (found >= 0) & rows["finished"]
        new[new] = ~self.finished[found[new]]
        row = np.repeat(slots, self._size) * self._size
        row += np.tile(np.arange(self._size), len(slots))
        self._position[found[new]] = row[new]

    def _find_refilled(self) -> None:
        """Take blocks that were damaged from others, who have used their place."""
        for slot in sorted(self._free):
            if self._read(["finished"], [slot])["finished"].any():
                self._free.remove(slot)
                self._find([slot])

    def _read(self, names: Iterable[str], slots: Sequence[int]) -> Rows:
        """The rows of neighbouring blocks."""
        group = _open(self.at)
        where = self._rows_of(slots)
        return {name: np.asarray(_array(group, name)[where]) for name in names}

    def _rows_of(self, slots: Sequence[int]) -> slice:
        """Where the rows of neighbouring blocks are."""
        return slice(slots[0] * self._size, (slots[-1] + 1) * self._size)

    def _resize(self, end: int) -> None:
        """Make every array as long as so many blocks."""
        group = _open(self.at, "r+")
        for name in self._arrays:
            array = _array(group, name)
            if array.shape[0] != end * self._size:
                array.resize((end * self._size, *array.shape[1:]))

    def _write(self, slots: Sequence[int], blocks: Sequence[Block]) -> None:
        """Write this process' blocks, neighbours together, the checksum last."""
        group = _open(self.at, "r+")
        own = {s: b for s, b in zip(slots, blocks, strict=True) if b.rows is not None}
        for run in _runs(sorted(own)):
            parts = [self._filled_up(own[slot]) for slot in run]
            where = self._rows_of(run)
            for name in self._arrays:
                _array(group, name)[where] = np.concatenate([p[name] for p in parts])

    def _filled_up(self, block: Block) -> Rows:
        """A block's arrays: its members that are new, and what fills it up."""
        assert block.rows is not None
        new = np.flatnonzero(~self.finished[block.members])
        rows, absent = block.rows, self._size - len(new)
        if len(new) < len(block.members):
            rows = {name: x[new] for name, x in rows.items()}
        columns = self._members.columns
        rows = rows | {name: x[block.members[new]] for name, x in columns.items()}
        rows["checksum"] = checksums(rows)
        rows["finished"] = np.ones(len(new), bool)
        if not absent:
            return rows
        return {
            name: np.concatenate([x, _fill((absent, *x.shape[1:]), x.dtype)])
            for name, x in rows.items()
        }

    @property
    def _arrays(self) -> list[str]:
        """All along "member", the checksum last: whoever finds it finds the rest."""
        results = _result_arrays(self._outputs)
        return [*self._members.kinds, *results, "finished", "checksum"]

    def _give_up(self, damaged: list[int]) -> None:
        """Let no reader take damaged blocks for finished."""
        if damaged:
            with locked(self.at), contextlib.suppress(OSError):
                group = _open(self.at, "r+")
                for slot in self._check(damaged):  # nobody has mended it meanwhile
                    where = self._rows_of([slot])
                    _array(group, "finished")[where] = False
                    _array(group, "checksum")[where] = 0

    def _check(self, slots: Sequence[int]) -> list[int]:
        """Find the members in the blocks that are whole, and return the others."""
        bytes_each = _row_bytes(_open(self.at), self._arrays)
        at_once = max(1, _BYTES_AT_ONCE // (bytes_each * self._size))
        damaged: list[int] = []
        for run in _runs(slots):
            for i in range(0, len(run), at_once):
                damaged += self._check_at_once(run[i : i + at_once])
        return damaged

    def _check_at_once(self, slots: list[int]) -> list[int]:
        """The same of few and neighbouring blocks."""
        try:
            rows = self._read(self._arrays, slots)
        except Exception:  # noqa: BLE001 - each codec has its own, and all mean the same
            half = len(slots) // 2
            if not half:
                return slots
            return self._check_at_once(slots[:half]) + self._check_at_once(slots[half:])
        expected = rows.pop("checksum")
        finished = rows.pop("finished")
        whole = expected == np.where(finished, checksums(rows), 0)
        whole = whole.reshape(-1, self._size).all(1)
        whole &= finished.reshape(-1, self._size).any(1)
        finished &= np.repeat(whole, self._size)
        self._note(slots, rows | {"finished": finished})
        return [slot for slot, good in zip(slots, whole, strict=True) if not good]


def create(
    at: Location,
    header: Mapping[str, Any],
    kinds: Mapping[str, str],
    outputs: OutputSpecs,
) -> None:
    """Make a store without members; what another has made meanwhile stays.

    Raises:
      OSError: it cannot be written.
    """
    header = {**header, "id": uuid.uuid4().hex}
    with explain_oserror(at):
        folder = at.folder
        if folder is None:
            return _create(at, header, kinds, outputs)
        # Made beside its place and moved there, so that it is whole or not at all.
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.parent / f".{folder.name}.{header['id']}.partial"
        _create(Location(str(beside), str(beside)), header, kinds, outputs)
        try:
            os.rename(beside, folder)
        except OSError:
            shutil.rmtree(beside)
            if read_header(at) is None:
                raise


def _create(
    at: Location,
    header: Mapping[str, Any],
    kinds: Mapping[str, str],
    outputs: OutputSpecs,
) -> None:
    import zarr

    attributes: dict[str, Any] = {
        "sweep": dict(header),
        "coordinates": " ".join(kinds),
    }
    group = zarr.open_group(
        at.target,
        mode="a",
        zarr_format=3,
        attributes=attributes,
        use_consolidated=False,
    )
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((), column_dtype(kind)) for name, kind in kinds.items()
    }
    arrays |= _result_arrays(outputs)
    arrays |= {"finished": ((), np.dtype(bool)), "checksum": ((), np.dtype("int64"))}
    dims = dimensions(outputs)
    for name, (shape, dtype) in arrays.items():
        group.create_array(
            name,
            shape=(0, *shape),
            chunks=(header["batch_size"], *shape),
            dtype=str if dtype.kind == "O" else dtype,
            dimension_names=dims.get(name, ("member",)),
            overwrite=True,
        )
    names = group.create_array(
        "output",
        shape=(len(outputs),),
        dtype=str,
        dimension_names=("output",),
        overwrite=True,
    )
    names[:] = np.array(list(outputs), object)
    _publish(at)


def read_header(at: Location, again: bool = True) -> dict[str, Any] | None:
    """Read what a store's attributes say of its sweep; None if there is no store yet.

    Raises:
      ValueError: something else is there, or what another version has written.
      OSError: it cannot be read.
    """
    import zarr
    from zarr.errors import ContainsArrayError, GroupNotFoundError

    path = at.folder
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(
            f"`store` must be a folder or a new path, got the file {at.name}"
        )
    group = None
    try:
        group = zarr.open_group(at.target, mode="r")
    except (FileNotFoundError, GroupNotFoundError):
        pass
    except ContainsArrayError as error:
        raise ValueError(
            f"`store` must be a sweep's, but {at.name} is of something else"
        ) from error
    except ValueError as error:  # not even JSON
        raise ValueError(f"`store` {at.name} cannot be read: {error}") from error
    except Exception as error:
        if path is not None:
            raise
        raise OSError(
            f"`store` {at.name} cannot be read: {in_one_line(error)}"
        ) from error
    if group is None:
        if path is not None and path.exists():
            if again and (path / "zarr.json").exists():
                return read_header(at, again=False)  # it was made a moment ago
            for other in path.iterdir():
                raise ValueError(
                    f"`store` must be a sweep's or a new path, but {path} has "
                    f"{other.name}"
                )
        return None
    header: Any = group.attrs.get("sweep")
    if not isinstance(header, dict):
        raise ValueError(
            f"`store` must be a sweep's, but {at.name} is of something else"
        )
    # Where nothing can be moved into its place, what was killed is begun anew.
    return None if group.metadata.consolidated_metadata is None else header


def is_here(at: Location, header: Mapping[str, Any]) -> bool:
    """Whether this process finds the very same store in its place."""
    try:
        found = read_header(at)
    except (OSError, ValueError):
        return False
    return found is not None and found["id"] == header["id"]


def update_header(at: Location, header: Mapping[str, Any]) -> None:
    """Replace what the attributes say of the sweep."""
    import zarr

    with explain_oserror(at):
        zarr.open_group(at.target, mode="r+").update_attributes({"sweep": dict(header)})


def read_columns(at: Location, names: Iterable[str]) -> Rows:
    """All rows of some arrays of a store."""
    group = _open(at)
    return {name: np.asarray(_array(group, name)[:]) for name in names}


def select_rows(
    at: Location, position: np.ndarray, outputs: Iterable[str], memory: int
) -> xr.Dataset:
    """The rows of a store at these positions; where that is -1 there is none.

    In memory, where they take no more than that many bytes; else dask's arrays.
    """
    import xarray as xr

    group, names = _open(at), [*outputs, "diverged_at"]
    bytes_each = _row_bytes(group, names)
    # Not as dask's where that need not be: its scheduler may be a cluster's, which
    # would look for the store elsewhere.
    chunks = None
    if bytes_each * len(position) > memory:
        block = _array(group, "checksum").chunks[0]
        chunks = {"member": block * max(1, _BYTES_AT_ONCE // (bytes_each * block))}
    rows = xr.open_dataset(
        at.target,
        engine="zarr",
        chunks=chunks,
        consolidated=True,
        mask_and_scale=False,
    )
    rows = rows[names].drop_vars(
        [name for name in rows.coords if name != "output"], errors="ignore"
    )
    there = position >= 0
    if not rows.sizes["member"]:
        rows = rows.pad(member=(0, 1), constant_values=0)
    steps = np.diff(position)
    if there.all() and (steps == 1).all():
        rows = rows.isel(member=slice(int(position[0]), int(position[-1]) + 1))
    else:
        rows = rows.isel(member=np.where(there, position, 0))
    rows = rows.assign(finished=("member", there))
    rows = rows.assign_coords(output=list(outputs))
    return rows.load() if chunks is None else rows


def dimensions(outputs: OutputSpecs) -> dict[str, tuple[str, ...]]:
    """The dimensions of each array: "member", then the output's own by number."""
    own = {
        name: ("member", *(f"{name}_dim_{i}" for i in range(len(x.shape))))
        for name, x in outputs.items()
    }
    return own | {"diverged_at": ("member", "output"), "finished": ("member",)}


def checksums(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each member 1 + CRC-32 of all its bytes, so that 0 says "not there"."""
    arrays = [_as_bytes(rows[name]) for name in sorted(rows)]
    data = np.concatenate(arrays, axis=1)
    return np.array([1 + zlib.crc32(row) for row in data], np.int64)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Each member's bytes; of a text its CRC-32."""
    if array.dtype.kind in "OT":
        array = np.array([zlib.crc32(str(x).encode()) for x in array], np.uint32)
    numbers = int(np.prod(array.shape[1:]))
    return np.ascontiguousarray(array).reshape(len(array), numbers).view(np.uint8)


def _result_arrays(
    outputs: OutputSpecs,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape of a member and the dtype of each array that a training gives."""
    own = {name: (x.shape, file_dtype(x.dtype)) for name, x in outputs.items()}
    return own | {"diverged_at": ((len(outputs),), np.dtype("int32"))}


def _fill(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, "" if dtype.kind == "O" else 0, dtype)


def _runs(slots: Sequence[int]) -> list[list[int]]:
    """Ascending numbers, neighbours together."""
    edges = np.flatnonzero(np.diff(slots) != 1) + 1
    return [run.tolist() for run in np.split(np.array(slots), edges) if len(run)]


def _open(at: Location, mode: Any = "r") -> zarr.Group:
    """The store as it is published; to write, as it is."""
    import zarr

    # Else zarr takes -0.0 for a 0 that it need not write.
    with zarr.config.set({"array.write_empty_chunks": True}):
        return zarr.open_group(at.target, mode=mode, use_consolidated=mode == "r")


def _array(group: zarr.Group, name: str) -> Any:
    return group[name]


def _row_bytes(group: zarr.Group, names: Iterable[str]) -> int:
    """The size of a member, in these arrays."""
    arrays = (_array(group, name) for name in names)
    return sum(x.dtype.itemsize * int(np.prod(x.shape[1:])) for x in arrays)


def _publish(at: Location) -> None:
    """Let readers see all there is: one file with all arrays' lengths is replaced."""
    import zarr

    # What warnings are caught is one for all threads.
    with _publishing, warnings.catch_warnings():
        # That the metadata of a group in one file are zarr's and xarray's, and not yet
        # of the format's text.
        warnings.filterwarnings("ignore", "Consolidated metadata")
        zarr.consolidate_metadata(at.target)

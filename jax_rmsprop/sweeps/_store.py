"""Store the members of a sweep in a table that only grows.

A store is one zarr group, an ordinary xarray Dataset. Along "member" it has a column
for each hyperparameter and one of `steps`, in chunks of many members, and the outputs
and `diverged_at` in chunks of one batch, or of several small ones. A member of a
resumable training has two carries in `carry_BYTES`, and in `carried` their steps and
their bytes: one is written while the other is valid.

`steps` alone says what is stored. A writer locks the folder, writes rows and carries,
then the other columns and, last, the chunk of `steps`, one file that is replaced: rows
and carry appear together or not at all. A member stays in its row, and fewer steps
never overwrite more; rows left by a killed writer have no steps or are overwritten.
Readers find damage by the CRC-32C of each chunk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_rmsprop._validate import short_repr
from jax_rmsprop.sweeps._batch import broadcast_from_process_0
from jax_rmsprop.sweeps._location import (
    Location,
    explain_oserror,
    in_one_line,
    locked,
)
from jax_rmsprop.sweeps._members import Columns, Members, column_dtype
from jax_rmsprop.sweeps._results import Block, Shapes, earlier, missing

if TYPE_CHECKING:
    import xarray as xr
    import zarr

FORMAT = 1
# Members in a chunk of a column; about the bytes of a chunk of an output with steps,
# and of a chunk of several batches, which is rewritten when a batch is added to it.
_COLUMN_CHUNK = 65_536
_OUTPUT_CHUNK = 1_000_000
_BATCHES_CHUNK = 262_144
# Bytes of a chunk of carries, and of one read by dask.
_CARRY_CHUNK = 4_000_000
_BYTES_AT_ONCE = 16_000_000
_publishing = threading.Lock()


class Damaged(Exception):
    """Chunks that cannot be read.

    Attributes:
      rows: those whose members must be recomputed.
    """

    def __init__(self, rows: np.ndarray):
        """Store the rows."""
        super().__init__(rows)
        self.rows = rows


class ZarrStore:
    """The requested members of a zarr store.

    Attributes:
      at: the store's location.
      steps: the number of steps of each requested member.
    """

    keeps_carries = True

    def __init__(self, at: Location, members: Members, shapes: Shapes):
        """Look up the members.

        Raises:
          OSError: the store cannot be read.
        """
        self.at, self._members, self._shapes = at, members, shapes
        group: Any = open_group(at)
        self._size: int = group.attrs["sweep"]["batch_size"]
        self._rows: int = group["diverged_at"].chunks[0]  # in a chunk
        # The member of each row: -1 if it is not requested, -2 if not yet looked up.
        self._member_of = np.zeros(0, int)
        self._look()

    def refresh(self) -> None:
        """Find rows that others have added, consistently in all processes."""
        self._look()
        self.agree()

    def agree(self) -> None:
        """Take the first process' view of the rows in all processes."""
        found = broadcast_from_process_0(np.stack([self.steps, self._row]))
        self.steps, self._row = found[0].astype("int32"), np.asarray(found[1])

    def _look(self, mend: bool = False) -> None:
        """Find the members' rows; `mend` columns that are damaged."""
        group: Any = open_group(self.at, "r+" if mend else "r")
        self._row_steps = steps = read_steps(group, mend)
        fresh = np.full(len(steps) - len(self._member_of), -2)
        self._member_of = np.concatenate([self._member_of, fresh])
        new = np.flatnonzero((steps > 0) & (self._member_of == -2))
        for chunk in np.unique(new // _COLUMN_CHUNK).tolist():
            rows, part = new[new // _COLUMN_CHUNK == chunk], _chunk(chunk)
            try:
                named = {
                    name: np.asarray(group[name][part])[rows - part.start]
                    for name in self._members.columns
                }
            except ValueError:  # it is damaged, and its members are lost
                steps[part] = 0
                for name in ("steps", *self._members.columns) if mend else ():
                    group[name][part] = group[name].fill_value
                continue
            self._member_of[rows] = self._members.locate(named)
        rows = np.flatnonzero((self._member_of >= 0) & (steps > 0))
        self._row = np.full(len(self._members.index), -1)
        self._row[self._member_of[rows]] = rows
        self.steps = np.append(steps, np.int32(0))[self._row]

    def append(self, block: Block | None) -> None:
        """Find rows that others have added, then add steps that are not stored yet.

        Raises:
          OSError: the store cannot be written; its contents stay.
        """
        import zarr

        # It takes a NaN of any sign for a fill value, whose chunks it does not write.
        all_chunks = {"array.write_empty_chunks": True}
        if jax.process_index() == 0 and block is not None:
            with (
                locked(self.at),
                explain_oserror(self.at),
                zarr.config.set(all_chunks),
            ):
                for _ in range(2):
                    self._look(mend=True)
                    # Except rows that another call has given up as damaged.
                    there = self.steps[block.members]
                    whole = there >= np.minimum(block.begin, block.steps)
                    more = whole & (block.steps > there)
                    if not more.any() or self._add(block.take(more)):
                        break
        broadcast_from_process_0(0)  # wait until the first process has written
        self.refresh()

    def _add(self, block: Block) -> bool:
        """Write a block; return False if a damaged chunk had to be emptied first."""
        group: Any = open_group(self.at, "r+")
        row, first = self._row[block.members], len(self._row_steps)
        new = row < 0
        row[new] = first + np.arange(new.sum())
        end = first + -(-int(new.sum()) // self._size) * self._size
        longer = _resize(group, end, self._shapes.steps)
        rows, part = _span(row), self._shapes.part(block)
        try:
            for name in self._shapes.names:
                group[name].oindex[(rows, *part)] = block.rows[name]
            diverged_at = group["diverged_at"]
            old = _take(diverged_at, row) if block.begin else np.empty(0)
            diverged_at.oindex[rows] = earlier(old, block)
            if block.carry is not None:
                longer |= self._write_carry(group, row, block, block.carry)
            for name, column in self._members.columns.items():
                group[name][first : first + new.sum()] = column[block.members[new]]
        except ValueError:
            self._mend(group, row)
            return False
        if longer:
            publish(self.at)
        group["steps"].oindex[rows] = block.steps
        return True

    def _write_carry(
        self, group: Any, row: np.ndarray, block: Block, carry: np.ndarray
    ) -> bool:
        """Write a block's carry in place of the last but one.

        Returns whether the array of carries is new.
        """
        name, bytes_each = f"carry_{carry.shape[1]}", carry.shape[1]
        if is_new := name not in group:
            at_once = max(1, min(self._size, _CARRY_CHUNK // max(1, bytes_each)))
            group.create_array(
                name,
                shape=(2, *group["steps"].shape, bytes_each),
                chunks=(1, at_once, bytes_each),
                dtype="uint8",
                compressors=_codecs()[1:],
                dimension_names=("place", "member", name),
            )
        of = _take(group["carried"], row)
        place = (of[:, 0] == self.steps[block.members]).astype(int)
        for i in (0, 1):
            own = np.flatnonzero(place == i)
            if len(own):
                group[name].oindex[i : i + 1, _span(row[own])] = carry[None, own]
        of[np.arange(len(of)), place] = block.end
        of[:, 2] = bytes_each
        group["carried"].oindex[_span(row)] = of
        return is_new

    def ended(self, members: np.ndarray) -> np.ndarray:
        """Which of these members, all of them begun, have ended.

        Raises:
          Damaged: `diverged_at` cannot be read.
        """
        group: Any = open_group(self.at)
        first = self._read(group, "diverged_at", self._row[members])
        # A writer may have been killed before it published these steps.
        first = np.where(first < self.steps[members][:, None], first, -1)
        return self._shapes.ended(first)

    def carry(self, members: np.ndarray, steps: int) -> np.ndarray | None:
        """The packed carries at this step; None if members are at another by now.

        Raises:
          Damaged: they cannot be read.
          ValueError: the carries have been dropped.
        """
        with locked(self.at):  # nobody writes meanwhile
            found = self.carry_of(members, steps)
        if found is None:
            self.refresh()
            if (self.steps[members] == steps).all():
                raise ValueError(
                    f"`store` {self.at.name} has no carries any more, so its members "
                    "cannot resume; ask for no more steps than they have"
                )
        return found

    def carry_of(self, members: np.ndarray, steps: int) -> np.ndarray | None:
        """The carries after `steps` steps, [members, bytes]; None if one is missing."""
        group: Any = open_group(self.at)
        row = self._row[members]
        if (row < 0).any() or "carried" not in group:
            return None
        of = self._read(group, "carried", row)
        name, is_one = f"carry_{of[0, 2]}", of[:, 1] == steps
        if not (is_one | (of[:, 0] == steps)).all() or name not in group:
            return None
        found = np.empty((len(row), of[0, 2]), "uint8")
        for i, own in enumerate((~is_one, is_one)):
            if own.any():
                found[own] = self._read(group, name, row[own], before=(i,))
        return found

    def _read(self, group: Any, name: str, row: np.ndarray, **more: Any) -> np.ndarray:
        try:
            return _take(group[name], row, **more)
        except ValueError as error:
            lost = [rows for _, _, rows in self._unreadable(group, row)]
            raise Damaged(np.unique(np.concatenate([row[:0], *lost]))) from error

    def _unreadable(
        self, group: Any, row: np.ndarray
    ) -> Generator[tuple[Any, Any, np.ndarray]]:
        """Yield the unreadable chunks of these rows: array, index, all rows."""
        for array, dims in _with_dimensions(group):
            if "member" not in dims:
                continue
            axis = dims.index("member")
            size = array.chunks[axis]
            for chunk in np.unique(row // size).tolist():
                part = slice(chunk * size, (chunk + 1) * size)
                at = (*(slice(None),) * axis, part)
                try:
                    array[at]
                except ValueError:
                    yield array, at, np.arange(array.shape[axis])[part]

    def _mend(self, group: Any, row: np.ndarray) -> None:
        """Empty the unreadable chunks of these rows; their members are lost."""
        steps = read_steps(group, mend=True)
        for array, at, rows in self._unreadable(group, row):
            rows = rows[rows < len(steps)]
            if len(rows):
                group["steps"].oindex[_span(rows)] = 0
            array[at] = array.fill_value

    def add_to_header(self, **more: Any) -> None:
        """Add entries to the header.

        Raises:
          ValueError: another call has meanwhile given a name to something else.
        """
        if jax.process_index() == 0:
            with locked(self.at), explain_oserror(self.at, ValueError):
                group = open_group(self.at, "r+")
                header: Any = group.attrs["sweep"]
                group.update_attributes({"sweep": _merged(header, more, self.at)})
                publish(self.at)
        broadcast_from_process_0(0)

    def to_dataset(self, memory: int) -> xr.Dataset:
        """The requested members, in their order.

        NumPy arrays if they take at most `memory` bytes, else dask arrays.

        Raises:
          Damaged: chunks cannot be read.
        """
        import dask.array
        import xarray as xr

        group: Any = open_group(self.at)
        shapes, there = self._shapes, np.flatnonzero(self._row >= 0)
        arrays, dims, own = shapes.arrays(), shapes.dimensions(), self._row[there]
        bytes_each = sum(x.itemsize * int(np.prod(s)) for s, x in arrays.values())
        lazy = bytes_each * len(self._row) > memory and len(own) > 0
        at_once = self._rows * max(1, _BYTES_AT_ONCE // (bytes_each * self._rows))
        found, run, steps = dict[str, Any](), {"member": there}, shapes.steps
        for name in arrays:
            stepped, array = shapes.stepped and name in shapes.outputs, group[name]
            part = (slice(steps),) if stepped else ()
            if lazy:
                chunks: Any = at_once, *array.shape[1:]
                rows = dask.array.from_array(array, chunks=chunks)[(own, *part)]
            else:
                rows = self._read(group, name, own, after=part)
            found[name] = dims[name], rows
            run |= {"step": np.arange(rows.shape[1])} if stepped else {}
        fill = {name: missing(name, dtype) for name, (_, dtype) in arrays.items()}
        sizes = {"member": len(self._row), "step": steps}
        asked = {name: np.arange(sizes[name]) for name in run}
        dataset = xr.Dataset(found, run).reindex(asked, fill_value=fill)
        have = xr.DataArray(np.minimum(self.steps, steps), dims="member")
        if shapes.stepped:
            # A writer may have been killed before it published its steps.
            if (have < steps).any():
                each = have.chunk({"member": at_once}) if lazy else have
                for name in shapes.names:
                    ran = dataset["step"] < each
                    dataset[name] = dataset[name].where(ran, fill[name])
            first = dataset["diverged_at"]
            dataset["diverged_at"] = first.where(first < have, -1)
        dataset = dataset.drop_vars(run).assign(steps=have)
        return dataset.assign_coords(output=shapes.names)

    def give_up(self, rows: np.ndarray) -> None:
        """Mark the members of damaged chunks as not computed."""
        if jax.process_index() == 0:
            with locked(self.at), explain_oserror(self.at):
                self._mend(open_group(self.at, "r+"), rows)
        broadcast_from_process_0(0)
        self.refresh()


def _merged(old: Any, new: Any, at: Location, name: str = "") -> Any:
    """Merge new entries into a header."""
    if isinstance(new, Mapping):
        old = old or {}
        return {**old, **{n: _merged(old.get(n), x, at, n) for n, x in new.items()}}
    if isinstance(new, str) and old not in (None, new):
        raise ValueError(
            f"`store` {at.name} has {name!r} for something else, which another call "
            "added meanwhile; repeat this call"
        )
    return new


def create(
    at: Location, header: Mapping[str, Any], kinds: Mapping[str, str], shapes: Shapes
) -> None:
    """Create a store without members, unless another call has just created it.

    Raises:
      OSError: the store cannot be written.
    """
    header, folder = {**header, "id": uuid.uuid4().hex}, at.folder
    fixed = folder and folder.is_dir() and (folder.samefile(".") or folder.is_mount())
    if folder is None or fixed:  # it cannot be replaced by one made beside it
        with locked(at), explain_oserror(at, ValueError):
            if read_header(at) is None:
                _create(at, header, kinds, shapes)
        return
    with explain_oserror(at):
        # Created beside the folder and renamed, so that creation is atomic.
        beside = folder.parent / f".{folder.name}.{header['id']}.partial"
        try:
            _create(Location(str(beside), str(beside)), header, kinds, shapes)
            os.rename(beside, folder)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            if read_header(at) is None:
                raise


def _create(
    at: Location, header: Mapping[str, Any], kinds: Mapping[str, str], shapes: Shapes
) -> None:
    import zarr

    group = zarr.open_group(
        at.target,
        mode="a",
        zarr_format=3,
        attributes={"sweep": dict(header), "coordinates": " ".join(kinds)},
        use_consolidated=False,
    )

    def make(name: str, own: Any, dtype: Any, chunks: Any, dims: Any = ()) -> Any:
        text = dtype.kind == "O"
        return group.create_array(
            name,
            shape=(len(shapes.names) if name == "output" else 0, *own),
            chunks=chunks,
            dtype=str if text else dtype,
            fill_value="" if text else missing(name, dtype),
            dimension_names=dims or ("member",),
            compressors=_codecs(),
            overwrite=True,
        )

    size, dims, arrays = header["batch_size"], shapes.dimensions(), shapes.arrays()
    batch = size * max(x.itemsize * int(np.prod(own)) for own, x in arrays.values())
    rows = size if shapes.stepped else size * max(1, _BATCHES_CHUNK // batch)
    for name, (own, dtype) in arrays.items():
        chunks = (rows, *own)
        if shapes.stepped and name in shapes.outputs:
            each = size * dtype.itemsize * int(np.prod(own[1:]))
            chunks = size, min(own[0], max(1, _OUTPUT_CHUNK // each)), *own[1:]
        make(name, own, dtype, chunks, dims[name])
    for name, kind in kinds.items():
        make(name, (), column_dtype(kind), (_COLUMN_CHUNK,))
    make("steps", (), np.dtype("int32"), (_COLUMN_CHUNK,))
    if shapes.stepped:
        carried = "member", "of_carries"
        make("carried", (3,), np.dtype("int64"), (_COLUMN_CHUNK, 3), carried)
    names = np.array(shapes.names, object)
    make("output", (), names.dtype, (len(names),), ("output",))[:] = names
    publish(at)


def _codecs() -> list[Any]:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return [ZstdCodec(level=0), Crc32cCodec()]


def read_header(at: Location, again: bool = True) -> dict[str, Any] | None:
    """Read the sweep's attributes of a store; None if there is no store yet.

    Raises:
      ValueError: the path holds something else, or another version's store.
      OSError: it cannot be read.
    """
    from zarr.errors import ContainsArrayError, GroupNotFoundError

    path = at.folder
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(
            f"`store` must be a folder or a new path, got the file {at.name}"
        )
    other = f"`store` must be a sweep, but {at.name} is something else"
    try:
        group = open_group(at)
    except ContainsArrayError as error:
        raise ValueError(other) from error
    except (FileNotFoundError, GroupNotFoundError):
        if path is None or not path.exists():
            return None
        if again and (path / "zarr.json").exists():
            return read_header(at, again=False)  # it has just been created
        for found in path.iterdir():
            raise ValueError(
                "`store` must be a sweep or an empty folder, but "
                f"{path} has {found.name}"
            ) from None
        return None
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else OSError  # no JSON
        if path is not None and kind is OSError:
            raise
        raise kind(f"`store` {at.name} cannot be read: {in_one_line(error)}") from error
    header: Any = group.attrs.get("sweep")
    if not isinstance(header, dict):
        raise ValueError(other)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"`store` {at.name} has format {header.get('format')}, but this version "
            f"of jax_rmsprop has format {FORMAT}; xarray.open_zarr can read it"
        )
    # Without an atomic rename, a creation that was killed is repeated.
    return header if "output" in group and "steps" in group else None


def open_header(at: Location) -> dict[str, Any]:
    """Read the header of an existing store.

    Raises:
      ValueError: there is none.
    """
    header, folder = read_header(at), at.folder
    if header is not None:
        return header
    if folder is None or folder.exists():
        raise ValueError(f"`store` {at.name} has no finished members")
    found = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
    beside = f"; beside it are {short_repr(found)}" if found else ""
    raise ValueError(f"`store` {at.name} does not exist{beside}")


def open_group(at: Location, mode: Any = "r") -> zarr.Group:
    """Open the group, ignoring its consolidated metadata."""
    import zarr

    return zarr.open_group(at.target, mode=mode, use_consolidated=False)


def read_steps(group: Any, mend: bool = False) -> np.ndarray:
    """The number of steps of each row; 0 in a damaged chunk."""
    steps, array = np.zeros(group["steps"].shape, "int32"), group["steps"]
    for chunk in range(-(-len(steps) // _COLUMN_CHUNK)):
        part = _chunk(chunk)
        try:
            steps[part] = array[part]
        except ValueError:
            if mend:
                array[part] = steps[part]
    return steps


def read_columns(at: Location, names: Iterable[str]) -> Columns:
    """The labels of all rows that have steps.

    Raises:
      OSError: a column is damaged.
    """
    group: Any = open_group(at)
    there = np.flatnonzero(read_steps(group) > 0)
    found: Columns = {}
    for name in names:
        try:  # convert zarr's strings to NumPy's usual ones
            found[name] = np.array(np.asarray(group[name][:])[there].tolist())
        except ValueError as error:
            raise OSError(
                f"`store` is damaged at {name}: {in_one_line(error)}"
            ) from error
    return found


def _chunk(number: int) -> slice:
    """The rows of a chunk of the columns."""
    return slice(number * _COLUMN_CHUNK, (number + 1) * _COLUMN_CHUNK)


def _with_dimensions(group: zarr.Group) -> list[tuple[Any, tuple[str, ...]]]:
    """All arrays, and the names of their dimensions, also those that others added."""
    with quiet():
        arrays = [array for _, array in group.arrays()]
    names = [getattr(array.metadata, "dimension_names", None) for array in arrays]
    return [(x, tuple(dims or ())) for x, dims in zip(arrays, names, strict=True)]


def _resize(group: zarr.Group, members: int, steps: int) -> bool:
    """Resize every array, also those that others have added, to these lengths.

    This cuts arrays that a killed writer has lengthened. Returns whether any changed.
    """
    changed = False
    for array, dims in _with_dimensions(group):
        shape = tuple(
            members if dim == "member" else max(n, steps) if dim == "step" else n
            for dim, n in zip(dims, array.shape, strict=False)
        )
        if len(dims) == len(array.shape) and shape != array.shape:
            array.resize(shape)
            changed = True
    return changed


def _span(rows: np.ndarray) -> Any:
    """The rows, as a slice if they are consecutive."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if (np.diff(rows) == 1).all() else rows


def _take(
    array: Any, rows: np.ndarray, before: tuple[Any, ...] = (), after: Any = ()
) -> np.ndarray:
    """Read some rows of an array, in one slice if few rows lie between them."""
    first, last = (int(rows.min()), int(rows.max())) if len(rows) else (0, -1)
    if last - first < 4 * len(rows) + array.chunks[len(before)]:
        with contextlib.suppress(ValueError):  # a row between them may be damaged
            part = slice(first, last + 1)
            return np.asarray(array[(*before, part, *after)])[rows - first]
    return np.asarray(array.oindex[(*before, rows, *after)])


def delete_carries(at: Location) -> None:
    """Delete the carries."""
    group: Any = open_group(at, "r+")
    with quiet():
        names = [name for name in group.array_keys() if name.startswith("carry_")]
    if names:
        group["carried"][:] = 0
    for name in names:
        del group[name]
    publish(at)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silence zarr's warnings of foreign files in the group's folder."""
    # Python's warning filters are global to all threads.
    with _publishing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def publish(at: Location) -> None:
    """Write the arrays' lengths to the consolidated metadata, for other readers."""
    import zarr

    if getattr(at.target, "supports_consolidated_metadata", True):
        with quiet():  # also the warning that these are not in zarr's specification
            zarr.consolidate_metadata(at.target)

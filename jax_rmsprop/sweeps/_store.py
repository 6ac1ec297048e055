"""Keep the members of a sweep in a store that grows.

A store is one zarr group, an ordinary xarray Dataset. Along "member" it has a column
for each hyperparameter and one of `steps`, in chunks of many members, and the outputs
and `diverged_at` in chunks of one batch, which is a slot. Of trainings that can go on
each slot has two carries in `carry_BYTES`, a row for each member, and in `carries` the
steps that they are of: one is written while the other one counts.

Only `steps` says what is there. Whoever adds something locks the folder, writes rows
and carries, then the other columns and, last, the chunk of `steps`, which is one file
that is replaced: rows and carry are there together, or not at all. What is there of a
member is never written over by less, and what was killed while it wrote is written
over, or lies there as a slot of no steps. Each chunk has its CRC-32C, by which whoever
reads it finds damage.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_rmsprop.sweeps._batch import broadcast_from_process_0
from jax_rmsprop.sweeps._location import (
    Location,
    explain_oserror,
    in_one_line,
    locked,
)
from jax_rmsprop.sweeps._members import Members, column_dtype
from jax_rmsprop.sweeps._results import Begun, Block, Shapes, cut, earlier, missing

if TYPE_CHECKING:
    import xarray as xr
    import zarr

FORMAT = 1
# The members of a chunk of a column, and about the bytes of one of an output.
_COLUMN_CHUNK = 65_536
_OUTPUT_CHUNK = 1_000_000
# Of what is read at once by dask.
_BYTES_AT_ONCE = 16_000_000
_publishing = threading.Lock()


class Damaged(Exception):
    """Chunks that cannot be read.

    Attributes:
      slots: whose members are to be computed again.
    """

    def __init__(self, slots: np.ndarray):
        """For these slots."""
        super().__init__(slots)
        self.slots = slots


class ZarrStore:
    """A zarr store, of which some members are asked for.

    Attributes:
      at: where it is.
      header: what its attributes say of the sweep.
      steps: for each member that is asked for how many steps it has.
    """

    keeps_carries = True

    def __init__(
        self, at: Location, header: Mapping[str, Any], members: Members, shapes: Shapes
    ):
        """Look for the members.

        Raises:
          OSError: it cannot be read.
        """
        self.at, self.header = at, header
        self._size: int = header["batch_size"]
        self._members, self._shapes = members, shapes
        # For each row how many steps it has, and which member it is: -1 of one that
        # is not asked for, -2 of one that has had no steps.
        self._row_steps, self._row_member = np.zeros(0, "int32"), np.zeros(0, int)
        self._columns = {n: x[:0] for n, x in members.columns.items()}
        self._lost = set[int]()  # chunks of columns that cannot be read
        self.refresh()

    def refresh(self) -> None:
        """Find what others have added, as the first process does."""
        self._look()
        self.steps = np.asarray(broadcast_from_process_0(self.steps))

    def _look(self) -> None:
        group: Any = open_group(self.at)
        steps = read_column(group, "steps")  # first: the other columns are as old
        grown = len(steps) - len(self._row_member)
        self._row_member = _longer(self._row_member, grown, -2)
        self._columns = {n: _longer(x, grown) for n, x in self._columns.items()}
        new = np.flatnonzero((steps > 0) & (self._row_member == -2))
        for chunk in np.unique(new // _COLUMN_CHUNK).tolist():
            part, rows = _chunk(chunk), new[new // _COLUMN_CHUNK == chunk]
            try:
                for name, column in self._columns.items():
                    found = np.asarray(group[name][part])  # shorter, if just resized
                    column[part][: len(found)] = found[: len(column[part])]
            except ValueError:  # it is damaged, and all that it names is lost
                steps[part] = 0
                self._lost.add(chunk)
                continue
            named = {n: x[rows] for n, x in self._columns.items()}
            self._row_member[rows] = self._members.locate(named)
        rows = np.flatnonzero((self._row_member >= 0) & (steps > 0))
        rows = rows[np.argsort(steps[rows], kind="stable")]
        self._row_steps, self._row = steps, np.full(self._members.size, -1)
        self._row[self._row_member[rows]] = rows  # of equal ones that of most steps
        there = self._row >= 0
        self.steps = np.zeros(self._members.size, "int32")
        self.steps[there] = steps[self._row[there]]

    def append(self, blocks: Sequence[Block]) -> None:
        """Find what others have added, and add what is more than there is.

        Raises:
          OSError: it cannot be written; what is there stays.
        """
        if jax.process_index() == 0 and blocks:
            with locked(self.at), explain_oserror(self.at), _writing_all():
                self._look()
                more = [b for b in blocks if self._is_more(b)]
                if more:
                    self._add(more)
        broadcast_from_process_0(0)  # the first process has written
        self.refresh()

    def _is_more(self, block: Block) -> bool:
        """Whether it has more than there is, and what is there goes so far.

        It does not where another call has given damaged rows up meanwhile.
        """
        there = self.steps[block.members]
        whole = (there >= np.minimum(block.begin, block.steps)).all()
        return bool(whole and (block.steps > there).any())

    def _add(self, blocks: Sequence[Block]) -> None:
        group: Any = open_group(self.at, "r+")
        for chunk in self._lost:  # before other names stand there
            _write_chunk(group, "steps", self._row_steps, chunk)
        self._lost.clear()
        end, size = len(self._row_steps) // self._size, self._size
        for block in blocks:
            if block.slot is None:
                block.slot, end = end, end + 1
                block.lanes = np.arange(len(block.members))
        grown = end * size - len(self._row_steps)
        _resize(group, end * size, self._shapes.steps)
        for run in _runs(blocks):
            self._write(group, run)
        columns = self._columns | {"steps": self._row_steps}
        columns = {name: _longer(x, grown) for name, x in columns.items()}
        touched, places = [np.zeros(0, int)], None
        if any(block.carry is not None for block in blocks):
            places = np.zeros((end, 3), "int32")
            there = np.asarray(group["carries"][:])
            places[: len(there)] = there
        for block in blocks:
            if places is not None and block.carry is not None:
                self._write_carry(group, block, places)
            new = block.steps > self.steps[block.members]
            rows, before = _rows(block, size)[new], self._row[block.members[new]]
            before = before[before >= 0]
            columns["steps"][before] = 0  # they have moved
            columns["steps"][rows] = block.steps[new]
            for name, column in self._members.columns.items():
                columns[name][rows] = column[block.members[new]]
            touched += [rows, before]
        if places is not None:
            group["carries"].resize(places.shape)
            group["carries"][:] = places
        chunks = np.unique(np.concatenate(touched) // _COLUMN_CHUNK).tolist()
        for name, column in columns.items():  # `steps` last
            for chunk in chunks:
                _write_chunk(group, name, column, chunk)
        if grown:
            publish(self.at)

    def _write(self, group: Any, run: Sequence[Block]) -> None:
        """Write the outputs of a block, or of new ones in neighbouring slots."""
        first, begin = _slot(run[0]) * self._size, run[0].begin
        lanes = [_rows(block, self._size) for block in run]
        where = np.concatenate(lanes) - first
        before = self._row[np.concatenate([block.members for block in run])]
        moved = begin > 0 and bool((before != first + where).any())
        rows, low = slice(first, first + len(run) * self._size), 0 if moved else begin
        for name, (_, dtype) in self._shapes.arrays().items():
            array, part = group[name], rows
            if name == "diverged_at":
                new = np.concatenate([block.rows[name] for block in run])
                if begin:
                    new = earlier(_take(array, before), new)
            else:
                new = np.concatenate([cut(block.rows[name], block) for block in run])
                if self._shapes.stepped:
                    part = rows, slice(low, begin + new.shape[1])
                    if moved:
                        new = np.concatenate([_take(array, before)[:, :begin], new], 1)
                else:
                    new = new[:, 0]
            if begin:
                into = np.asarray(array[part])
            else:
                fill = -1 if name == "diverged_at" else missing(dtype)
                into = np.full((len(run) * self._size, *new.shape[1:]), fill, dtype)
            into[where] = new
            array[part] = into

    def _write_carry(self, group: Any, block: Block, places: np.ndarray) -> None:
        """Write where a block goes on from, in place of the carry before the last."""
        assert block.carry is not None
        slot, size = _slot(block), self._size
        bytes_each = block.carry.shape[1]
        published = self._row_steps[slot * size :][:size].max(initial=0)
        where = int(places[slot, 0] == published)
        array = _carries(group, bytes_each, size, create=True)
        if array.shape[0] < len(places) * 2 * size:
            array.resize((len(places) * 2 * size, bytes_each))
        into = np.zeros((size, bytes_each), "uint8")
        into[block.lanes] = block.carry
        first = (2 * slot + where) * size
        array[first : first + size] = into
        places[slot, where], places[slot, 2] = steps_after(block), bytes_each

    def begun(self, members: np.ndarray, steps: int) -> list[Begun]:
        """Of the members those that have begun and need to go on to these steps."""
        have = self.steps[members]
        some = members[(have > 0) & (have < steps)]
        if not len(some):
            return []
        diverged_at: Any = open_group(self.at)["diverged_at"]
        judged = self._shapes.names.index(self._shapes.judged)
        some = some[_take(diverged_at, self._row[some])[:, judged] < 0]
        found, moved = list[Begun](), [some[:0]]
        slot = self._row[some] // self._size
        for which, k in sorted(
            set(zip(slot.tolist(), self.steps[some].tolist(), strict=True))
        ):
            own = some[(slot == which) & (self.steps[some] == k)]
            there = slice(which * self._size, (which + 1) * self._size)
            if (self._row_steps[there] == k).sum() == len(own):
                found.append(Begun(own, k, which, self._row[own] % self._size))
            else:  # others stay where they are
                moved.append(own)
        rest = np.concatenate(moved)
        each = np.unique(self.steps[rest]).tolist()
        return found + [Begun(rest[self.steps[rest] == k], k) for k in each]

    def carry(self, begun: Begun) -> np.ndarray | None:
        """Where they go on from; None if they are somewhere else by now.

        Raises:
          ValueError: the carries have been dropped.
        """
        rows, found = self._row[begun.members], None
        for slot in np.unique(rows // self._size).tolist():
            own = rows // self._size == slot
            packed = read_carry(
                self.at, slot, begun.steps, rows[own] % self._size, self._size
            )
            if packed is None:
                self.refresh()
                if (self.steps[begun.members] != begun.steps).any():
                    return None
                raise ValueError(
                    f"`store` {self.at.name} has no carries any more, from which its "
                    "members would go on; ask for no more steps than they have"
                )
            if found is None:
                found = np.zeros((len(rows), packed.shape[1]), "uint8")
            found[own] = packed
        return found

    def carry_of(self, member: int) -> np.ndarray | None:
        """That of one member, [1, bytes]; None if there is none."""
        row = int(self._row[member])
        if row < 0:
            return None
        slot, lane = divmod(row, self._size)
        steps = int(self._row_steps[row])
        return read_carry(self.at, slot, steps, np.array([lane]), self._size)

    def add_to_header(self, **more: Any) -> None:
        """Add what is new to some parts of the header."""
        if jax.process_index() == 0:
            with locked(self.at), explain_oserror(self.at):
                group = open_group(self.at, "r+")
                header: Any = group.attrs["sweep"]
                for name, new in more.items():
                    merged = isinstance(new, Mapping)
                    header[name] = {**header[name], **new} if merged else new
                group.update_attributes({"sweep": header})
                publish(self.at)
        broadcast_from_process_0(0)

    def to_dataset(self, steps: int, memory: int) -> xr.Dataset:
        """All that were asked for, in their order; dask's arrays if they are larger.

        Raises:
          Damaged: chunks cannot be read.
        """
        return select_rows(self.at, self._row, self._shapes, steps, memory)

    def give_up(self, slots: np.ndarray) -> None:
        """Let what is damaged be computed again."""
        if jax.process_index() == 0:
            with locked(self.at), explain_oserror(self.at):
                steps = read_column(open_group(self.at), "steps")
                rows = (slots[:, None] * self._size + np.arange(self._size)).ravel()
                steps[rows] = 0
                for chunk in np.unique(rows // _COLUMN_CHUNK).tolist():
                    _write_chunk(open_group(self.at, "r+"), "steps", steps, chunk)
        broadcast_from_process_0(0)
        self.refresh()


def create(
    at: Location, header: Mapping[str, Any], kinds: Mapping[str, str], shapes: Shapes
) -> None:
    """Make a store without members; what another has made meanwhile stays.

    Raises:
      OSError: it cannot be written.
    """
    header = {**header, "id": uuid.uuid4().hex}
    with explain_oserror(at):
        folder = at.folder
        if folder is None:
            return _create(at, header, kinds, shapes)
        # Made beside its place and moved there, so that it is whole or not at all.
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.parent / f".{folder.name}.{header['id']}.partial"
        _create(Location(str(beside), str(beside)), header, kinds, shapes)
        try:
            os.rename(beside, folder)
        except OSError:
            shutil.rmtree(beside)
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
    size, dims = header["batch_size"], shapes.dimensions()
    columns = {name: column_dtype(kind) for name, kind in kinds.items()}
    columns["steps"] = np.dtype("int32")
    arrays = {name: ((), dtype) for name, dtype in columns.items()} | shapes.arrays()
    for name, (shape, dtype) in arrays.items():
        chunks = (_COLUMN_CHUNK,) if name in columns else (size, *shape)
        if shapes.stepped and name in shapes.outputs:
            each = size * dtype.itemsize * int(np.prod(shape[1:]))
            steps = min(shapes.steps, max(1, _OUTPUT_CHUNK // each))
            chunks = (size, steps, *shape[1:])
        fill = {} if dtype.kind == "O" else {"fill_value": missing(dtype)}
        group.create_array(
            name,
            shape=(0, *shape),
            chunks=chunks,
            dtype=str if dtype.kind == "O" else dtype,
            dimension_names=dims.get(name, ("member",)),
            compressors=_codecs(),
            overwrite=True,
            **fill,
        )
    if shapes.stepped:  # of each slot the steps of its two carries, and their bytes
        group.create_array(
            "carries",
            shape=(0, 3),
            chunks=(_COLUMN_CHUNK, 3),
            dtype="int32",
            dimension_names=("slot", "of_carries"),
            compressors=_codecs(),
            overwrite=True,
        )
    names = group.create_array(
        "output",
        shape=(len(shapes.outputs),),
        dtype=str,
        dimension_names=("output",),
        overwrite=True,
    )
    names[:] = np.array(shapes.names, object)
    publish(at)


def _codecs() -> list[Any]:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return [ZstdCodec(level=0), Crc32cCodec()]


def read_header(at: Location, again: bool = True) -> dict[str, Any] | None:
    """Read what a store's attributes say of its sweep; None if there is no store yet.

    Raises:
      ValueError: something else is there, or what another version has written.
      OSError: it cannot be read.
    """
    from zarr.errors import ContainsArrayError, GroupNotFoundError

    path = at.folder
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(
            f"`store` must be a folder or a new path, got the file {at.name}"
        )
    group = None
    try:
        group = open_group(at)
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
    if header.get("format") != FORMAT:
        raise ValueError(
            f"`store` {at.name} has the format {header.get('format')}, and this "
            f"version of jax_rmsprop that of {FORMAT}; xarray.open_zarr reads it"
        )
    # Where nothing can be moved into its place, what was killed is begun anew.
    return header if "output" in group and "steps" in group else None


def select_rows(
    at: Location, row: np.ndarray, shapes: Shapes, steps: int, memory: int
) -> xr.Dataset:
    """The rows of a store at these positions; where that is -1 there is none.

    In memory, where they take no more than that many bytes; else dask's arrays.

    Raises:
      Damaged: chunks cannot be read.
    """
    import dask.array
    import xarray as xr

    arrays = shapes.arrays()
    group: Any = open_group(at)
    size: int = group["diverged_at"].chunks[0]
    bytes_each = sum(x.itemsize * int(np.prod(s)) for s, x in arrays.values())
    there = row >= 0
    dims, found = shapes.dimensions(), {}
    have = np.zeros(len(row), "int32")
    have[there] = read_column(group, "steps")[row[there]]
    for name, (shape, dtype) in arrays.items():
        array: Any = group[name]
        stepped = shapes.stepped and name in shapes.outputs
        fill = -1 if name == "diverged_at" else missing(dtype)
        if bytes_each * len(row) > memory and there.any():
            blocks = max(1, _BYTES_AT_ONCE // (bytes_each * size))
            chunks: Any = size * blocks, *shape
            array = dask.array.from_array(array, chunks=chunks)
            rows = array[np.where(there, row, row[there][0])]
            if not there.all():
                mask = there.reshape(-1, *(1,) * len(shape))
                rows = dask.array.where(mask, rows, fill)
        else:
            rows = np.full((len(row), *array.shape[1:]), fill, dtype)
            try:
                if there.any():
                    rows[there] = _take(array, row[there])
            except Exception as error:
                raise Damaged(_damaged(group, arrays, row[there] // size)) from error
        found[name] = (dims[name], rows[:, :steps] if stepped else rows)
    if shapes.stepped:  # who diverges later has not, so far
        dims_of, first = found["diverged_at"]
        found["diverged_at"] = dims_of, np.where(first < steps, first, -1)
    found["steps"] = ("member", np.minimum(have, steps))
    return xr.Dataset(found, coords={"output": shapes.names})


def _damaged(group: Any, names: Iterable[str], slots: np.ndarray) -> np.ndarray:
    """Those of the slots that cannot be read."""
    size, bad = group["diverged_at"].chunks[0], []
    for slot in np.unique(slots):
        try:
            for name in names:
                group[name][slot * size : (slot + 1) * size]
        except Exception:  # noqa: BLE001 - each codec has its own
            bad.append(slot)
    return np.array(bad, int)


def open_group(at: Location, mode: Any = "r") -> zarr.Group:
    """The store as it is, whatever its consolidated metadata say."""
    import zarr

    return zarr.open_group(at.target, mode=mode, use_consolidated=False)


def read_column(group: Any, name: str) -> np.ndarray:
    """A column; where a chunk of `steps` is damaged, nothing is there.

    Raises:
      OSError: another column is damaged.
    """
    array, parts = group[name], list[np.ndarray]()
    for chunk in range(-(-array.shape[0] // _COLUMN_CHUNK)):
        try:
            parts.append(np.asarray(array[_chunk(chunk)]))
        except ValueError as error:
            if name != "steps":
                raise OSError(
                    f"`store` is damaged at {name}: {in_one_line(error)}"
                ) from error
            parts.append(np.zeros(len(range(array.shape[0])[_chunk(chunk)]), "int32"))
    return np.concatenate(parts) if parts else np.asarray(array[:])


def _chunk(number: int) -> slice:
    """The rows of a chunk of the columns."""
    return slice(number * _COLUMN_CHUNK, (number + 1) * _COLUMN_CHUNK)


def _longer(column: np.ndarray, by: int, fill: Any = 0) -> np.ndarray:
    fill = "" if column.dtype == "O" else fill
    return np.concatenate([column, np.full(by, fill, column.dtype)])


def _write_chunk(group: Any, name: str, column: np.ndarray, chunk: int) -> None:
    group[name][_chunk(chunk)] = column[_chunk(chunk)]


def _resize(group: zarr.Group, members: int, steps: int) -> None:
    """Give every array these members, those that others have added, too.

    What one that was killed has made longer, before it said so, is cut again.
    """
    with quiet():
        arrays = [array for _, array in group.arrays()]
    for array in arrays:
        dims: Any = getattr(array.metadata, "dimension_names", None) or ()
        shape = tuple(
            members if dim == "member" else max(n, steps) if dim == "step" else n
            for dim, n in zip(dims, array.shape, strict=False)
        )
        if len(dims) == len(array.shape) and shape != array.shape:
            array.resize(shape)


def _take(array: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array; with what lies between them, if that is little."""
    first, last = int(rows.min()), int(rows.max())
    if last - first < 4 * len(rows) + array.chunks[0]:
        with contextlib.suppress(ValueError):  # what is damaged may lie between them
            return np.asarray(array[first : last + 1])[rows - first]
    return np.asarray(array.oindex[rows])


def steps_after(block: Block) -> int:
    """How many steps those members of a block have that have not ended."""
    outputs = [x for name, x in block.rows.items() if name != "diverged_at"]
    return block.begin + outputs[0].shape[1]


def _writing_all() -> Any:
    """Let zarr write a chunk of fillers, too: for it a NaN of any sign is one."""
    import zarr

    return zarr.config.set({"array.write_empty_chunks": True})


def _slot(block: Block) -> int:
    assert block.slot is not None
    return block.slot


def _rows(block: Block, size: int) -> np.ndarray:
    assert block.lanes is not None
    return _slot(block) * size + block.lanes


def _runs(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks; together those in neighbouring slots that begin and end alike."""
    runs = list[list[Block]]()
    for block in sorted(blocks, key=_slot):
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and block.begin == last.begin == 0
            and _slot(block) == _slot(last) + 1
            and steps_after(block) == steps_after(last)
        ):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _carries(group: Any, bytes_each: int, size: int, create: bool = False) -> Any:
    """The carries of so many bytes: of each slot two, one of which counts."""
    name = f"carry_{bytes_each}"
    if create and name not in group:
        at_once = max(1, min(size, _BYTES_AT_ONCE // max(1, bytes_each)))
        group.create_array(
            name,
            shape=(0, bytes_each),
            chunks=(at_once, bytes_each),
            dtype="uint8",
            compressors=_codecs()[1:],
            dimension_names=("carry", name),
        )
    return group[name] if name in group else None


def read_carry(
    at: Location, slot: int, step: int, lanes: np.ndarray, size: int
) -> np.ndarray | None:
    """The carries of some members of a slot after a step; None if there are none."""
    group = open_group(at)
    places: Any = group["carries"] if "carries" in group else None
    if places is None or places.shape[0] <= slot:
        return None
    place = np.asarray(places[slot])
    if step not in place[:2] or (array := _carries(group, int(place[2]), size)) is None:
        return None
    which = place[:2].tolist().index(step)
    return _take(array, (2 * slot + which) * size + lanes)


def delete_carries(at: Location) -> None:
    """Delete what members would go on from."""
    group: Any = open_group(at, "r+")
    with quiet():
        names = [name for name in group.array_keys() if name.startswith("carry_")]
    group["carries"].resize((0, 3))
    for name in names:
        del group[name]
    publish(at)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Let zarr not warn of what lies in the group's folder and is no part of it."""
    # What warnings are caught is one for all threads.
    with _publishing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def publish(at: Location) -> None:
    """Tell readers who ask for consolidated metadata how long the arrays are."""
    import zarr

    if getattr(at.target, "supports_consolidated_metadata", True):
        with quiet():  # nor that such metadata are not yet of the format's text
            zarr.consolidate_metadata(at.target)

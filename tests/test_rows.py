"""A store holds what arrays in memory would, whichever blocks come in which order.

A member's numbers and its end are functions of the member, as in a training, so what a
store must hold follows from how many steps each member has.
"""

import jax
import numpy as np
import pytest
import xarray as xr
import zarr

from jax_rmsprop.sweeps import _store
from jax_rmsprop.sweeps._location import locate
from jax_rmsprop.sweeps._members import parse_grid
from jax_rmsprop.sweeps._results import Block, InMemory, Shapes
from jax_rmsprop.sweeps._store import ZarrStore, create, delete_carries
from tests.sweeps import spoil

OUTPUTS = {
    "y": jax.ShapeDtypeStruct((5,), np.int32),
    "loss": jax.ShapeDtypeStruct((), np.float32),
}
MEMBERS, BATCH = 30, 3


@pytest.fixture(autouse=True)
def few_rows_in_a_chunk(monkeypatch):
    for name, size in {
        "_COLUMN_CHUNK": 4,  # rows; the others are bytes
        "_OUTPUT_CHUNK": 50,
        "_BATCHES_CHUNK": 128,
        "_CARRY_CHUNK": 14,
        "_BYTES_AT_ONCE": 400,
    }.items():
        monkeypatch.setattr(_store, name, size)


def end(member, steps):
    """The number of steps that a member runs: every fifth diverges."""
    return np.where(member % 5 == 2, np.minimum(steps, 1 + member // 5), steps)


def loss(member, step):
    """NaN at the last step of those that diverge, of either sign."""
    value = (member + step / 8).astype("float32")
    return np.where(end(member, step + 2) <= step, np.float32("-nan"), value)


def carry(member, step):
    """Seven bytes."""
    return (member[:, None] * 7 + step * 3 + np.arange(7)).astype("uint8")


def block(member, begin, until, stepped):
    """What a runner hands over: these members' steps from `begin` to `until`."""
    at = begin + np.arange(until - begin)
    losses = loss(member[:, None], at if stepped else at + 9)
    bad = np.isnan(losses)
    # Of a plain training it is an index of the output's own.
    first = np.where(bad.any(1), begin + bad.argmax(1) if stepped else 3, -1)
    y = np.stack([member[:, None] * at + i for i in range(5)], -1).astype("int32")
    steps = end(member, until) if stepped else np.ones(len(member))
    run = at < steps[:, None]
    losses = np.where(run, losses, np.float32("nan")) if stepped else losses[:, 0]
    rows = {
        "y": np.where(run[..., None], y, 0) if stepped else y[:, 0],
        "loss": losses,
        "diverged_at": np.stack([np.full(len(first), -1), first], -1).astype("int32"),
    }
    kept = carry(member, until) if stepped else None
    return Block(member, begin, until, steps.astype("int32"), rows, kept)


def expected(member, have, shapes):
    """A whole training's results, in memory, as far as each member has got."""
    memory = InMemory(MEMBERS, shapes)
    for i, steps in zip(member, have, strict=True):
        if steps:
            some = block(np.array([i]), 0, int(steps), shapes.stepped)
            memory.append(some)
    return memory.to_dataset(0).isel(member=member)


class Views:
    """Callers that share a store and ask for other members, from other numbers."""

    def __init__(self, at, steps, stepped):
        self.shapes = Shapes(OUTPUTS, stepped, steps)
        self.all = [np.arange(20), np.arange(MEMBERS - 1, 9, -1), np.array([25, 3])]
        grids = [
            parse_grid({"x": m / 2, "name": [f"no {i}" for i in m]}, True)
            for m in self.all
        ]
        if at.folder is None or not at.folder.exists():
            header = {"batch_size": BATCH, "format": 1}
            create(at, header, grids[0].kinds, self.shapes)
        self.stores = [ZarrStore(at, g.members()[0], self.shapes) for g in grids]

    def append(self, which, own, begin, until):
        """Append a block of members by their numbers in this view."""
        member = self.all[which][own]
        some = block(member, begin, until, self.shapes.stepped)
        some.members = own
        self.stores[which].append(some)
        return member

    def check(self, have, lazily=True):
        """Each view has what was appended, in memory and lazily."""
        for member, store in zip(self.all, self.stores, strict=True):
            store.refresh()
            np.testing.assert_array_equal(store.steps, have[member])
            wanted = expected(
                member, np.minimum(have[member], self.shapes.steps), self.shapes
            )
            for memory in (10**9, 0) if lazily else (10**9,):
                found = store.to_dataset(memory)
                in_memory = memory > 0 or not have[member].any()
                assert isinstance(found.loss.data, np.ndarray) == in_memory
                for name in ("steps", "y", "loss", "diverged_at"):
                    np.testing.assert_array_equal(found[name], wanted[name], name)
                    assert found[name].dtype == wanted[name].dtype
            begun = np.flatnonzero(have[member] > 0)
            if len(begun) and self.shapes.stepped:
                ended = np.isnan(loss(member, have[member] - 1))[begun]
                np.testing.assert_array_equal(store.ended(begun), ended)


def test_blocks_of_steps_in_any_order(tmp_path, rng):
    at, have, steps = locate(tmp_path / "a.zarr"), np.zeros(MEMBERS, int), 4
    views = Views(at, steps, True)
    views.check(have)
    for turn in range(24):
        if turn in (8, 16):  # others open it meanwhile: for more steps, for fewer
            steps = {8: 7, 16: 5}[turn]
            views = Views(at, steps, True)
        which = rng.integers(3)
        member = views.all[which]
        own = np.flatnonzero(rng.random(len(member)) < rng.choice([0.2, 0.6]))
        if not len(own):
            continue
        # Mostly from where one of them is.
        begin = int(rng.choice([*have[member[own]], rng.integers(steps)]))
        begin = min(begin, steps - 1)
        until = int(rng.integers(begin, steps)) + 1
        done = views.append(which, own, begin, until)
        # Steps are added to what is there, and fewer never replace more.
        new = end(done, until)
        fits = have[done] >= np.minimum(begin, new)
        have[done] = np.where(fits, np.maximum(have[done], new), have[done])
        views.check(have, lazily=turn % 6 == 0)
        found = views.stores[which].carry_of(own, until)
        # Those whose last carry but one it is can resume, too.
        assert found is not None or (have[done] != until).any()
        if found is not None:
            np.testing.assert_array_equal(found, carry(done, until))
    assert (have > 0).sum() > 20
    assert have.max() == 7
    # Anyone reads as many rows as there are, and the members' names with them.
    plain = xr.open_zarr(at.folder).load()
    there = plain.steps.values > 0
    found = dict(zip(plain.x.values[there] * 2, plain.steps.values[there], strict=True))
    assert found == {i: n for i, n in enumerate(have) if n}
    names = [f"no {i:.0f}" for i in plain.x.values[there] * 2]
    assert plain.name.values[there].tolist() == names
    # Rows come in whole batches; a carry is kept twice.
    assert len(there) % BATCH == 0
    group = _store.open_group(at)
    assert group["carry_7"].shape == (2, len(there), 7)
    delete_carries(at)
    assert views.stores[0].carry_of(np.arange(2), 1) is None
    views.check(have)


def test_blocks_of_a_plain_training(tmp_path, rng):
    at, have = locate(tmp_path / "a.zarr"), np.zeros(MEMBERS, int)
    views = Views(at, 1, False)
    for _ in range(8):
        which = rng.integers(3)
        own = np.flatnonzero(rng.random(len(views.all[which])) < 0.3)
        if len(own):
            have[views.append(which, own, 0, 1)] = 1
        views.check(have)
    assert have.any()
    assert "carried" not in _store.open_group(at)


def test_only_members_at_one_step_resume(tmp_path):
    views = Views(locate(tmp_path / "a.zarr"), 4, True)
    store, own = views.stores[0], np.array([0, 1, 3])
    views.append(0, own, 0, 2)
    views.append(0, own[::2], 2, 4)
    assert store.carry_of(own, 2) is not None  # the last but one is kept
    assert store.carry_of(own, 4) is None
    assert store.carry_of(np.array([4]), 2) is None  # it has not run
    assert store.carry(own, 2) is not None
    delete_carries(store.at)
    with pytest.raises(ValueError, match="has no carries any more"):
        store.carry(own[1:2], 2)
    assert store.carry(own, 2) is None  # one of them is elsewhere by now


def test_chunks(tmp_path):
    """Their sizes in bytes decide how many rows and steps share one."""
    at = locate(tmp_path / "a.zarr")
    Views(at, 40, True).append(0, np.arange(2), 0, 1)
    chunks = {name: array.chunks for name, array in _store.open_group(at).arrays()}
    assert chunks["loss"] == (BATCH, 50 // (BATCH * 4))
    assert chunks["y"] == (BATCH, 1, 5)  # which is more than 50 bytes
    assert chunks["steps"] == chunks["x"] == chunks["name"] == (4,)
    assert chunks["carried"] == (4, 3)
    assert chunks["carry_7"] == (1, 2, 7)  # as large as fits 14 bytes
    assert chunks["diverged_at"] == (BATCH, 2)
    plain = locate(tmp_path / "b.zarr")
    Views(plain, 1, False)
    chunks = {name: array.chunks for name, array in _store.open_group(plain).arrays()}
    # Of the largest output, 20 bytes a member, two batches fit 128 bytes.
    assert chunks["loss"] == (2 * BATCH,)
    assert chunks["y"] == (2 * BATCH, 5)
    assert chunks["diverged_at"] == (2 * BATCH, 2)


def test_what_is_read_at_once(tmp_path, monkeypatch):
    """In memory if it fits; else as many chunks together as a number of bytes has."""
    views, every = Views(locate(tmp_path / "a.zarr"), 1, False), np.arange(20)
    views.append(0, every, 0, 1)
    store = views.stores[0]
    assert isinstance(store.to_dataset(640).loss.data, np.ndarray)
    found = store.to_dataset(639)  # 32 bytes for each of 20 members are more
    assert len(found.loss.chunks[0]) == 2  # 2 chunks of 6 members take less than 400
    monkeypatch.setattr(_store, "_BYTES_AT_ONCE", 1)
    assert len(store.to_dataset(0).loss.chunks[0]) == 4


def test_who_looks_while_another_writes(tmp_path, monkeypatch):
    """Rows that have no steps yet are looked up again later."""
    views, resize = Views(locate(tmp_path / "a.zarr"), 4, True), _store._resize

    def looked_at(*arguments):
        found = resize(*arguments)
        views.stores[1].refresh()
        return found

    monkeypatch.setattr(_store, "_resize", looked_at)
    have = np.zeros(MEMBERS, int)
    have[views.append(0, np.arange(14, 18), 0, 2)] = 2
    views.check(have)


def test_steps_that_were_never_published_are_not_read(tmp_path):
    """A writer was killed between an output and `steps`."""
    at, have = locate(tmp_path / "a.zarr"), np.zeros(MEMBERS, int)
    views = Views(at, 4, True)
    for own, until in ((np.arange(20), 2), (np.arange(10), 4)):
        member = views.append(0, own, until - 2, until)
        have[member] = end(member, until)
    group = _store.open_group(at, "r+")
    group["loss"][10:20, 2:4] = 7.0
    views.check(have)


@pytest.mark.parametrize("column", ["steps", "x"])
def test_reading_writes_nothing(tmp_path, column):
    """Also where there is damage, which a writer mends."""
    at = locate(tmp_path / "a.zarr")
    Views(at, 4, True).append(0, np.arange(9), 0, 2)
    spoil(at.folder / column / "c/0")

    def content():
        return {p: p.read_bytes() for p in at.folder.rglob("*") if p.is_file()}

    before = content()
    views = Views(at, 4, True)
    have = np.zeros(MEMBERS, int)
    have[4:9] = end(np.arange(4, 9), 2)  # those of the other chunks
    views.check(have)
    if column == "steps":
        assert len(_store.read_columns(at, ["x"])["x"]) == 5
    assert content() == before
    views.append(0, np.arange(4), 0, 2)
    have[:4] = end(np.arange(4), 2)
    views.check(have)


@pytest.mark.parametrize("array", ["loss", "diverged_at", "x", "carried", "carry_7"])
def test_a_writer_mends_what_it_meets(tmp_path, array):
    """Its own rows are there at once; those of the damaged chunk have to run again."""
    at, have = locate(tmp_path / "a.zarr"), np.zeros(MEMBERS, int)
    views = Views(at, 4, True)
    own = np.array([0, 1, 3, 4, 5, 6, 8, 9, 10])
    have[views.append(0, own, 0, 2)] = 2
    # What is being written is longer than what is published.
    zarr_array = _store.open_group(at, "r+")[array]
    axis = 1 if array.startswith("carry_") else 0
    longer = [n + 3 * (i == axis) for i, n in enumerate(zarr_array.shape)]
    zarr_array.resize(tuple(longer))
    last = (len(own) - 1) // zarr_array.chunks[axis]
    place = ["1", str(last)] if axis else [str(last)]  # of the two carries, the second
    place += ["0"] * (zarr_array.ndim - len(place))
    spoil(at.folder.joinpath(array, "c", *place))
    views = Views(at, 4, True)  # which has to read the columns
    views.append(0, own[-2:], 0, 4)
    gone = own[last * zarr_array.chunks[axis] :]
    have[gone] = 0
    have[own[-2:]] = end(own[-2:], 4)
    views.check(have)
    views.append(0, gone, 0, 4)
    have[gone] = end(gone, 4)
    views.check(have)
    np.testing.assert_array_equal(
        views.stores[0].carry_of(own[-2:], 4), carry(own[-2:], 4)
    )


def test_damaged_rows_are_given_up(tmp_path):
    """Also if nobody knows any more how many steps they had."""
    at, have = locate(tmp_path / "a.zarr"), np.zeros(MEMBERS, int)
    views = Views(at, 4, True)
    own = np.array([0, 1, 3, 4, 5, 6])
    have[views.append(0, own, 0, 2)] = 2
    store = views.stores[0]
    for array in ("loss/c/0/0", "steps/c/0"):
        spoil(at.folder / array)
    with pytest.raises(_store.Damaged) as damaged:
        store.to_dataset(10**9)
    np.testing.assert_array_equal(damaged.value.rows, np.arange(4))
    store.give_up(damaged.value.rows)
    have[own[:4]] = 0
    views.check(have)


@pytest.mark.parametrize("array", ["carry_7/c/1/0/0", "carried/c/0/0"])
def test_a_damaged_carry_is_found_where_it_is_read(tmp_path, array):
    at, own = locate(tmp_path / "a.zarr"), np.array([0, 1, 3])
    views = Views(at, 4, True)
    views.append(0, own, 0, 2)
    # A writer that was killed has made this longer.
    _store.open_group(at, "r+")["carried"].resize((6, 3))
    chunk = at.folder / array
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(_store.Damaged) as damaged:
        views.stores[0].carry(own, 2)
    views.stores[0].give_up(damaged.value.rows)
    left = {"carry_7/c/1/0/0": [0, 0, 2], "carried/c/0/0": [0, 0, 0]}[array]
    np.testing.assert_array_equal(views.stores[0].steps[own], left)


def test_a_creation_that_was_killed_is_repeated():
    """Where nothing can be renamed, as in memory."""
    at, have = locate(zarr.storage.MemoryStore()), np.zeros(MEMBERS, int)
    Views(at, 4, True)
    assert _store.read_header(at) is not None
    del _store.open_group(at, "r+")["steps"]
    assert _store.read_header(at) is None
    views = Views(at, 4, True)  # which creates it again
    have[views.append(0, np.arange(2), 0, 2)] = 2
    views.check(have)

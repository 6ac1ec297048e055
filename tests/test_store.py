"""Stores: finished members are saved intact, and a store can grow."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

from jax_rmsprop import load_sweep
from jax_rmsprop.sweeps import _location, _store, _sweep
from tests.sweeps import (
    GRID,
    bits,
    interrupt_after,
    network,
    quiet,
    raises,
    result,
    run_with_limit,
    spoil,
    square,
)


def test_the_same_from_a_folder(tmp_path, together, compiled):
    store = tmp_path / "a" / "sweep.zarr"
    for _ in range(2):
        curves = quiet(network, GRID, batch_size=8, store=store)
        assert bits(curves) == bits(together)
        assert list(curves.data_vars) == list(together.data_vars)
    assert compiled == [8]  # the second call computes nothing
    assert curves.computed == 0
    for path in (store, str(store)):
        assert bits(load_sweep(path)) == bits(by_value(together))


def by_value(curves):
    """Sort the axes, like those of a store."""
    return curves.sortby([name for name in curves.coords if name != "output"])


def test_python_values_and_points_from_a_folder(tmp_path):
    def train(a, kind, flag):
        return {"loss": a * len(kind) + float(flag)}

    product = {"a": [1.0, 2.0], "kind": ["xy", "x"], "flag": [False, True]}
    points = {"a": [1.0, 2.0], "kind": ["xy", "x"], "flag": [True, False]}
    for grid, zipped in ((product, False), (points, True)):
        store = tmp_path / str(zipped)
        expected = quiet(train, grid, zipped=zipped)
        curves = quiet(train, grid, zipped=zipped, store=store)
        assert bits(curves) == bits(expected)
        assert bits(load_sweep(store)) == bits(by_value(expected))
        assert bits(quiet(train, grid, zipped=zipped, store=store)) == bits(expected)


def test_it_is_lazy_where_it_does_not_fit(tmp_path, monkeypatch, together):
    monkeypatch.setattr(_sweep, "free_memory", lambda: 1000)
    curves = quiet(network, GRID, batch_size=8, store=tmp_path / "sweep.zarr")
    assert curves.loss.chunks is not None
    assert bits(curves.compute()) == bits(together)
    # A combination that did not run has no result.
    more = {"gamma": GRID["gamma"], "learning_rate": [0.5], "seed": [7]}
    quiet(network, {n: x[:1] for n, x in more.items()}, store=tmp_path / "sweep.zarr")
    monkeypatch.setattr(_sweep, "free_memory", lambda: 1000)
    loaded = load_sweep(tmp_path / "sweep.zarr")
    assert loaded.loss.chunks is not None
    lacking = loaded.sel(learning_rate=0.5, seed=0)
    assert not lacking.finished.any()
    assert np.isnan(lacking.loss.compute()).all()


HARMS = ("cut", "emptied", "a bit", "another chunk")


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found_where_it_is_read(tmp_path, harm, monkeypatch):
    """Any reader finds it; a sweep that needs it recomputes it."""
    monkeypatch.setattr(_store, "_BATCHES_CHUNK", 1)  # a chunk for each batch

    def wave(x):
        return {"loss": jnp.sin(x * jnp.arange(100.0))}

    grid, one = {"x": np.linspace(1, 2, 60)}, jax.devices()[:1]
    store = tmp_path / "sweep.zarr"
    whole = quiet(wave, grid, batch_size=8, store=store, devices=one)
    chunk = store / "loss/c/2/0"
    content = chunk.read_bytes()
    if harm == "another chunk":
        content = (store / "loss/c/3/0").read_bytes()[:-1] + b"0"
    harmed = {"cut": content[: len(content) // 2], "emptied": b""}
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    chunk.write_bytes(harmed.get(harm, flipped))
    with pytest.raises(ValueError, match="."):
        xr.open_zarr(store).load()
    with pytest.raises(OSError, match=f"^`store` {store} is damaged: 8 members cannot"):
        load_sweep(store)
    # A sweep that does not need it is not affected.
    some = {"x": grid["x"][:16]}
    assert quiet(wave, some, store=store, devices=one).computed == 0
    curves = quiet(wave, grid, batch_size=8, store=store, devices=one)
    assert curves.computed == 8  # only that batch
    assert bits(curves) == bits(whole)
    assert bits(load_sweep(store)) == bits(whole)
    assert quiet(wave, grid, store=store).computed == 0


@pytest.mark.parametrize("array", ["loss", "diverged_at", "x", "steps"])
def test_damage_of_a_chunk_that_new_rows_share(tmp_path, array):
    """Whoever meets it when it writes mends it first."""
    quiet(square, {"x": np.arange(8.0)}, batch_size=4, store=tmp_path)
    chunk = next((tmp_path / array / "c").rglob("0*"))
    spoil(chunk if chunk.is_file() else chunk / "0")
    more = quiet(square, {"x": np.arange(20.0, 24)}, store=tmp_path)
    np.testing.assert_array_equal(more.loss, np.arange(20.0, 24) ** 2)
    again = quiet(square, {"x": np.arange(8.0)}, store=tmp_path)
    np.testing.assert_array_equal(again.loss, np.arange(8.0) ** 2)
    assert load_sweep(tmp_path).sizes["x"] == 12


def test_an_error_of_reading_that_passes_loses_nothing(tmp_path, monkeypatch):
    whole = quiet(square, {"x": np.arange(8.0)}, batch_size=4, store=tmp_path)
    take, times = _store._take, iter(range(1))

    def once(*arguments, **more):
        if next(times, None) is not None:
            raise ValueError("not now")
        return take(*arguments, **more)

    monkeypatch.setattr(_store, "_take", once)
    again = quiet(square, {"x": np.arange(8.0)}, store=tmp_path)
    assert again.computed == 0
    assert bits(again) == bits(whole)


def test_two_functions_of_one_name_at_once(tmp_path, monkeypatch):
    """The later one of two calls that began together is told."""

    def go(f):
        axes = {"x": [1.0], "f": [f]}
        return quiet(lambda x, f: {"loss": f(x)}, axes, store=tmp_path, batch_size=1)

    go(jnp.tanh)
    add, others = _store.ZarrStore.add_to_header, [lambda x: 2 * x]

    def after_another(self, **more):
        if others:
            go(others.pop())
        add(self, **more)

    monkeypatch.setattr(_store.ZarrStore, "add_to_header", after_another)
    mine = lambda x: 3 * x  # noqa: E731
    with pytest.raises(
        ValueError, match="for something else, which another call added"
    ):
        go(mine)
    assert go(mine).loss.item() == 3


@pytest.mark.parametrize("column", ["steps", "x"])
def test_a_damaged_column_is_as_nothing(tmp_path, column):
    store = tmp_path / "sweep.zarr"
    whole = quiet(square, {"x": np.arange(16.0)}, batch_size=4, store=store)
    chunk = store / column / "c/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    curves = quiet(square, {"x": np.arange(16.0)}, store=store)
    assert curves.computed == 16
    assert bits(curves) == bits(whole)
    assert bits(load_sweep(store)) == bits(whole)


def test_another_number_of_devices_goes_on(ctrl_c, tmp_path, together, monkeypatch):
    store = tmp_path / "sweep.zarr"
    interrupt_after(monkeypatch, 1)
    with pytest.warns(UserWarning, match="interrupted: 24 of 60 members"):
        quiet(network, GRID, batch_size=8, store=store, devices=jax.devices()[:3])
    monkeypatch.undo()
    curves = quiet(network, GRID, batch_size=8, store=store, devices=jax.devices()[:2])
    assert bits(curves) == bits(together)


@pytest.mark.parametrize("array", ["steps", "x", "loss"])
def test_who_is_killed_while_arrays_get_longer_has_lost_nothing(tmp_path, array):
    whole = quiet(square, {"x": np.arange(8.0)}, batch_size=4, store=tmp_path)
    zarr.open_group(tmp_path, use_consolidated=False)[array].resize((16,))
    assert load_sweep(tmp_path).loss.values.tolist() == whole.loss.values.tolist()
    again = quiet(square, {"x": np.arange(8.0)}, store=tmp_path)
    assert again.computed == 0
    assert bits(again) == bits(whole)
    more = quiet(square, {"x": np.arange(12.0)}, store=tmp_path)
    assert more.computed == 4
    np.testing.assert_array_equal(more.loss, np.arange(12.0) ** 2)
    assert bits(load_sweep(tmp_path)) == bits(more)


def test_axes_of_any_name(tmp_path):
    """Also names that a store uses, or might use, for something else."""
    grid = {"order": [1.0, 2.0], "run": [3.0], "grid": [0.5], "segments": [2.0]}

    def train(order, run, grid, segments):
        return {"loss": order * run * grid * segments}

    for _ in range(2):
        curves = quiet(train, grid, store=tmp_path)
        assert curves.loss.dims == tuple(grid)
        np.testing.assert_array_equal(curves.loss.values.ravel(), [3, 6])
    assert bits(load_sweep(tmp_path)) == bits(curves)


def refused(store, differs, *args, **kwargs):
    raises(
        ValueError,
        f"`store` {store} holds another sweep: {differs}",
        *args,
        store=store,
        **kwargs,
    )


def test_a_folder_of_another_sweep_is_refused(tmp_path, monkeypatch):
    store = tmp_path / "sweep.zarr"
    grid = {"x": [1.0, 2.0], "y": [1.0]}
    data = jnp.ones(3)

    def train(x, y):
        return {"loss": x.astype(float) * y * data}

    quiet(train, grid, store=store, batch_size=2)
    refused(
        store,
        "its axis x is float32, this one's is missing",
        lambda y, z: {"loss": y * z * data},
        {"y": [1.0], "z": [1.0, 2.0]},
        batch_size=2,
    )
    refused(
        store, "its axis x is float32, this one's is int32", train, grid | {"x": [1, 2]}
    )
    refused(
        store,
        "its output loss is float32[3], this one's is float32[]",
        lambda x, y: {"loss": x * y},
        grid,
    )
    refused(
        store,
        "its output loss is float32[3], this one's is missing",
        lambda x, y: {"error": x * y * data},
        grid,
    )
    another = "its `train` is another function, or closes over other data"
    refused(store, another, lambda x, y: {"loss": x + y * data}, grid)
    other = 2 * data
    refused(store, another, lambda x, y: {"loss": x.astype(float) * y * other}, grid)
    refused(
        store,
        another,
        jax.jit(lambda x, y: {"loss": x.astype(float) * y * other}),
        grid,
    )
    refused(store, "its `batch_size` is 2, this one's is 4", train, grid, batch_size=4)
    now = jax.__version__
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    refused(
        store,
        f"its jax is {now}, this one's is 0.0.1, so the bits may differ; `load_sweep` "
        "reads it",
        train,
        grid,
        batch_size=2,
    )
    assert load_sweep(store).loss.shape == (2, 1, 3)


def test_every_program_is_the_stores(tmp_path):
    """Also those that were traced to choose a batch size."""

    def training(factor):
        return lambda name, x: {"loss": x * (factor if name == "b" else 1)}

    axes = {"name": ["a", "b"], "x": [1.0]}
    quiet(training(2), axes, store=tmp_path, zipped=np.False_)
    refused(
        tmp_path,
        "its `train` is another function for name b, or closes over other data",
        training(3),
        axes | {"x": [1.0, 2.0]},
    )


def test_a_store_that_is_another_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    raises(
        ValueError,
        f"`store` must be a sweep or an empty folder, but {tmp_path} has thesis.tex",
        square,
        {"x": [1]},
        store=tmp_path,
    )
    zarr.create_group(tmp_path / "group")
    raises(
        ValueError,
        f"`store` must be a sweep, but {tmp_path / 'group'} is something else",
        square,
        {"x": [1]},
        store=tmp_path / "group",
    )
    with pytest.raises(ValueError, match="nothing does not exist; beside it are"):
        load_sweep(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no finished members"):
        load_sweep(tmp_path / "empty")


def test_a_store_whose_attributes_cannot_be_read(tmp_path, monkeypatch):
    quiet(square, {"x": [1]}, store=tmp_path)
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=f"^`store` {tmp_path} cannot be read: "):
        load_sweep(tmp_path)

    def refuse(*arguments):
        raise PermissionError("not yours")

    monkeypatch.setattr(_store, "open_group", refuse)
    with pytest.raises(PermissionError, match="^not yours$"):
        load_sweep(tmp_path)


def test_a_store_that_cannot_be_written():
    # A path where not even the superuser can create folders.
    with pytest.raises(
        OSError, match=r"`store` /proc/sweep.zarr cannot be written: \w"
    ):
        quiet(square, {"x": [1]}, store="/proc/sweep.zarr")


def test_an_empty_folder_is_a_new_store(tmp_path):
    curves = quiet(square, {"x": [1, 2]}, store=tmp_path)
    np.testing.assert_array_equal(curves.loss, [1, 4])


@pytest.mark.slow
def test_a_full_disk(tmp_path, start):
    """Files above a few kilobytes cannot be written at first, then they can."""
    store = tmp_path / "sweep.zarr"
    failed = result(*start(store, 20_000, target=run_with_limit))
    assert failed.startswith(
        f"`store` {store} cannot be written: File too large; its contents are kept"
    )
    assert int(load_sweep(store).finished.sum()) == 8
    # Batches that fit are intact.
    assert result(*start(store, -1, target=run_with_limit)) == (16, 8)


@pytest.mark.slow
def test_100_000_members_in_bounded_memory(tmp_path):
    """400 megabytes of results; the process never holds a quarter of them.

    It holds the members themselves, and a few copies of the blocks that it appends.
    """
    code = (
        "import resource, sys, jax.numpy as jnp\n"
        "from jax_rmsprop import sweep\n"
        "from jax_rmsprop.sweeps import _sweep\n"
        "_sweep.free_memory = lambda: 0\n"
        "def train(x):\n"
        "    return {'loss': x + jnp.arange(1000.0), 'last': x}\n"
        "def peak():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def run(n, store):\n"
        "    return sweep(train, {'x': jnp.arange(float(n))}, batch_size=500,"
        " store=store, progress=False)\n"
        "run(2000, sys.argv[1] + '/small').last.sum().compute()\n"
        "before = peak()\n"
        "curves = run(100_000, sys.argv[1] + '/large')\n"
        "assert curves.loss.shape == (100_000, 1000)\n"
        "assert float(curves.loss[99_999, 999]) == 99_999 + 999\n"
        "assert (curves.last == curves.x).all().compute()\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 100, done.stdout


# It grows


def test_it_is_an_ordinary_dataset(tmp_path, together, monkeypatch):
    monkeypatch.setattr(_store, "_BATCHES_CHUNK", 2 * 8 * 60)
    store = tmp_path / "sweep.zarr"
    quiet(network, GRID, batch_size=8, store=store)
    plain = xr.open_zarr(store)
    assert set(plain.coords) == {*GRID, "output"}
    assert set(plain.data_vars) == {
        *("loss", "end.v", "end.seed", "diverged_at", "steps")
    }
    assert plain.loss.dims == ("member", "loss_dim_0")
    assert plain.gamma.dims == ("member",)
    assert plain.loss.chunks[0] == (16,) * 4  # two batches
    # 60 members in blocks of 8; the padding of the last one is not finished.
    np.testing.assert_array_equal(plain.steps, np.arange(64) < 60)
    rows = plain.isel(member=plain.steps.values > 0).load()
    for i in (0, 17, 59):
        row = rows.isel(member=i)
        whole = together.sel({name: row[name].item() for name in GRID})
        np.testing.assert_array_equal(row.loss, whole.loss)
    assert plain.attrs["sweep"]["batch_size"] == 8
    assert plain.attrs["sweep"]["outputs"]["loss"] == "float32[15]"
    # Its arrays, opened directly, have the same lengths.
    alone = xr.open_zarr(store, consolidated=False)
    assert alone.sizes == plain.sizes


AXES = {"gamma": [0, 2, 1, 3, 4], "learning_rate": [2, 0, 1], "seed": [3, 0, 1, 2]}


@pytest.mark.parametrize(
    "axis",
    ["gamma", *(pytest.param(n, marks=pytest.mark.slow) for n in list(GRID)[1:])],
)
def test_more_values_on_any_axis(axis, tmp_path, together):
    """Each member once, with the bits of a store computed in one call."""
    store, one = tmp_path / "sweep.zarr", jax.devices()[:1]
    known: list = []
    for which in AXES[axis]:
        known.append(which)
        values = {axis: [GRID[axis][i] for i in known]}
        curves = quiet(network, GRID | values, batch_size=8, store=store, devices=one)
        assert curves.computed == 60 // len(GRID[axis])
        assert bits(curves) == bits(together.isel({axis: known}))
    assert bits(load_sweep(store)) == bits(by_value(together))
    assert int(xr.open_zarr(store).steps.sum()) == 60


def test_a_subset_and_the_axes_in_another_order(tmp_path, together):
    store = tmp_path / "sweep.zarr"
    quiet(network, GRID, batch_size=8, store=store)
    some = {"seed": [2, 0], "gamma": GRID["gamma"][1:3], "learning_rate": [0.001]}
    curves = quiet(network, some, store=store)
    assert curves.computed == 0
    assert curves.loss.dims[:3] == tuple(some)
    expected = together.isel(seed=[2, 0], gamma=[1, 2], learning_rate=[1])
    assert bits(curves) == bits(expected.transpose("seed", "gamma", ...))


def test_points_beside_a_grid(tmp_path, together):
    store = tmp_path / "sweep.zarr"
    quiet(network, GRID | {"seed": [0, 1]}, batch_size=8, store=store)
    points = {
        "gamma": [GRID["gamma"][1], GRID["gamma"][2], 0.75, GRID["gamma"][1]],
        "learning_rate": [0.01, 0.001, 0.5, 0.01],
        "seed": [1, 3, 0, 1],  # stored, new, new, the first again
    }
    curves = quiet(network, points, zipped=True, store=store)
    assert curves.computed == 2
    assert curves.loss.dims == ("member", "loss_dim_0")
    at = {"gamma": [1, 2], "learning_rate": [0, 1], "seed": [1, 3]}
    at = {name: xr.DataArray(i, dims="member") for name, i in at.items()}
    expected = together.isel(at)
    np.testing.assert_array_equal(curves.loss[:2], expected.loss)
    assert curves.finished.all()
    np.testing.assert_array_equal(curves.loss[3], curves.loss[0])
    assert load_sweep(store).sizes["member"] == 32
    assert quiet(network, GRID, store=store).computed == 29


def test_more_python_values(tmp_path):
    def train(a, kind):
        return {"loss": a * len(kind)}

    store = tmp_path / "sweep.zarr"
    quiet(train, {"a": [1.0], "kind": ["x", "xy"]}, store=store)
    curves = quiet(train, {"a": [1.0, 2.0], "kind": ["xyz", "xy"]}, store=store)
    assert curves.computed == 3
    np.testing.assert_array_equal(curves.loss, [[3, 2], [6, 4]])
    found = load_sweep(store)
    np.testing.assert_array_equal(found.finished, [[True] * 3, [False, True, True]])
    # The same name for another value is another training.
    refused(
        store,
        "its `train` is another function for kind xy, or closes over other data",
        lambda a, kind: {"loss": a * 3},
        {"a": [1.0], "kind": ["xy"]},
    )


def test_a_member_is_its_numbers_however_they_are_written(tmp_path):
    store = tmp_path / "sweep.zarr"
    quiet(square, {"x": [0.1, 0.5]}, store=store)
    curves = quiet(square, {"x": np.array([0.1], "float32")}, store=store)
    assert curves.computed == 0


def test_a_store_that_is_made_at_that_moment(tmp_path, monkeypatch):
    """Another process moves it into place between two checks of the folder."""
    store, opened = tmp_path / "sweep.zarr", zarr.open_group

    def too_early(*arguments, **options):
        monkeypatch.setattr(zarr, "open_group", opened)
        quiet(square, {"x": [1.0]}, store=store)
        raise FileNotFoundError

    monkeypatch.setattr(zarr, "open_group", too_early)
    curves = quiet(square, {"x": [1.0, 2.0]}, store=store)
    assert curves.computed == 1


def test_two_make_the_same_store(tmp_path, monkeypatch):
    """The first one stays, and nothing that another wrote is deleted."""
    store, create = tmp_path / "sweep.zarr", _store.create
    first = []

    def after_another(at, *rest):
        create(at, *rest)
        first.append(_store.read_header(at)["id"])
        create(at, *rest)

    monkeypatch.setattr(_store, "create", after_another)
    curves = quiet(square, {"x": [1.0, 2.0]}, store=store)
    np.testing.assert_array_equal(curves.loss, [1, 4])
    assert _store.read_header(_location.locate(store))["id"] == first[0]
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.zarr", ".sweep.zarr.lock"}

"""Stores other than folders: fsspec's in memory, and S3's on a local server.

The guarantees of stores are tested on folders (test_sweep); here without locks and
renames.
"""

import uuid

import jax
import numpy as np
import pytest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, MemoryStore

from jax_rmsprop import load_sweep
from jax_rmsprop.sweeps import _location, _run, _store
from tests.helpers import require
from tests.sweeps import GRID, bits, network, quiet, square

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def server():
    """The URL of an S3 server on loopback."""
    require("s3fs")
    require("moto")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(server, monkeypatch):
    """An environment with credentials for the server, and a bucket."""
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield bucket
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["memory", "a zarr store", "s3", "s3 with options"])
def store(request):
    """A new store, given as a URL or an object."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/a.zarr"
    if request.param == "a zarr store":
        return MemoryStore()
    bucket = request.getfixturevalue("credentials")
    if request.param == "s3":
        return f"s3://{bucket}/runs/a.zarr"
    options = {
        "key": "key",
        "secret": "secret",
        "endpoint_url": request.getfixturevalue("server"),
        "asynchronous": True,
    }
    return FsspecStore.from_url(f"s3://{bucket}/a.zarr", storage_options=options)


class Killed(BaseException):
    """Simulates the end of a process during a batch."""


def killed_after(n, monkeypatch):
    """End the sweep after n written blocks."""
    append, left = _store.ZarrStore.append, iter(range(n))

    def counted(self, blocks):
        if blocks and next(left, None) is None:
            raise Killed
        append(self, blocks)

    monkeypatch.setattr(_run, "SECONDS_BETWEEN_APPENDS", 0)
    monkeypatch.setattr(_store.ZarrStore, "append", counted)


def test_killed_and_resumed(store, together, monkeypatch):
    with monkeypatch.context() as patched:
        killed_after(3, patched)
        with pytest.raises(Killed):
            quiet(network, GRID, batch_size=8, store=store, devices=ONE)
    part = load_sweep(store)
    assert int(part.finished.sum()) == 24
    curves = quiet(network, GRID, batch_size=8, store=store, devices=ONE)
    assert curves.computed == 36
    assert bits(curves) == bits(together)
    assert bits(load_sweep(store)) == bits(together.sortby(list(GRID)))


def test_torn_chunks_are_computed_again(store, monkeypatch):
    """Such stores have no atomic rename, so checksums detect torn chunks."""
    import zarr

    monkeypatch.setattr(_store, "_BATCHES_CHUNK", 1)  # a chunk for each batch
    grid = {"x": np.arange(1.0, 33)}
    expected = quiet(square, grid, store=store, batch_size=4)
    root = zarr.open_group(_location.locate(store).target, mode="r+")
    torn = root["loss"]
    whole = sync(
        torn.store_path.store.get(torn.path + "/c/1", default_buffer_prototype())
    )
    half = default_buffer_prototype().buffer.from_bytes(whole.to_bytes()[:-3])
    sync(torn.store_path.store.set(torn.path + "/c/1", half))
    again = quiet(square, grid, store=store, batch_size=4)
    assert again.computed == 4
    assert bits(again) == bits(expected)
    assert bits(load_sweep(store)) == bits(expected)


def test_it_grows_and_refuses_another_sweep(store):
    quiet(square, {"x": [1.0, 2.0]}, store=store, batch_size=1)
    curves = quiet(square, {"x": [1.0, 3.0]}, store=store)
    assert curves.computed == 1
    np.testing.assert_array_equal(load_sweep(store).loss, [1, 4, 9])
    with pytest.raises(ValueError, match="holds another sweep: its `train` is") as no:
        quiet(lambda x: {"loss": x + 1}, {"x": [1.0]}, store=store)
    assert str(no.value).startswith(f"`store` {_location.locate(store).name} holds")


def test_something_else_is_refused(store):
    import zarr

    zarr.create_array(_location.locate(store).target, shape=(3,), dtype="int32")
    with pytest.raises(ValueError, match="^`store` must be a sweep, but .* is some"):
        quiet(square, {"x": [1.0]}, store=store)


def test_nothing_is_there_yet(store):
    with pytest.raises(ValueError, match="^`store` .* has no finished members$"):
        load_sweep(store)


def test_one_place_by_several_names():
    name = uuid.uuid4().hex
    expected = quiet(square, {"x": [1.0, 2.0]}, store=f"memory://{name}/a")
    for other in (f"memory:///{name}/a", f"memory://{name}/a/"):
        assert bits(load_sweep(other)) == bits(expected)
        assert _location.locate(other).name == f"memory:///{name}/a"


def test_a_local_file_system_of_fsspecs_is_a_folder(tmp_path):
    import zarr.storage

    expected = quiet(square, {"x": [1.0, 2.0]}, store=tmp_path / "a.zarr")
    store = zarr.storage.FsspecStore.from_url(f"local://{tmp_path}/a.zarr")
    for other in (store, f"local://{tmp_path}/a.zarr"):
        assert _location.locate(other).folder == tmp_path / "a.zarr"
        assert bits(load_sweep(other)) == bits(expected)


def test_a_zip_file_is_refused(tmp_path):
    import zarr.storage

    store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    with pytest.raises(ValueError, match="^`store` must be able to delete files, got"):
        quiet(square, {"x": [1.0]}, store=store)


@pytest.mark.parametrize("call", ["sweep", "load"])
def test_a_bucket_that_is_not_there_is_one_line(credentials, call):
    store = f"s3://no-{credentials}/a.zarr"
    with pytest.raises((OSError, ValueError)) as caught:
        quiet(square, {"x": [1.0]}, store=store) if call == "sweep" else load_sweep(
            store
        )
    assert str(caught.value).count("\n") == 0
    assert store in str(caught.value)


def test_no_credentials_are_one_line(credentials, monkeypatch):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match="^`store` s3://.* cannot be") as caught:
        quiet(square, {"x": [1.0]}, store=f"s3://{credentials}/a.zarr")
    assert "\n" not in str(caught.value)

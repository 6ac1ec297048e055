"""Every way to write a path is the same location."""

import pytest

from jax_rmsprop import load_sweep
from tests.sweeps import bits, quiet, raises, square


@pytest.mark.parametrize(
    "way", ["~", "relative", "file", "link", "slash", "zarr", "Path"]
)
def test_every_way_to_write_a_path_is_one_place(way, tmp_path, monkeypatch):
    import zarr.storage

    real = tmp_path / "home" / "runs of Jürgen"
    real.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    store = {
        "~": "~/runs of Jürgen/a.zarr",
        "relative": "runs of Jürgen/../runs of Jürgen/a.zarr",
        "file": (real / "a.zarr").as_uri(),
        "link": str(tmp_path / "link" / "a.zarr"),
        "slash": f"{real}/a.zarr/",
        "zarr": zarr.storage.LocalStore(real / "a.zarr"),
        "Path": real / "a.zarr",
    }[way]
    (tmp_path / "link").symlink_to(real)
    expected = quiet(square, {"x": [1.0, 2.0]}, store=store, batch_size=1)
    assert {p.name for p in real.iterdir()} == {"a.zarr", ".a.zarr.lock"}
    assert [p.name for p in (tmp_path / "home").iterdir()] == [real.name]
    if way != "relative":
        monkeypatch.chdir(tmp_path)
    for again in (store, real / "a.zarr"):
        assert bits(load_sweep(again)) == bits(expected)
    curves = quiet(square, {"x": [3.0, 2.0]}, store=store, batch_size=1)
    assert curves.computed == 1


@pytest.mark.parametrize(
    ("store", "error", "message"),
    [
        ("a.zip", ValueError, "`store` must be a folder, got 'a.zip'"),
        (3, TypeError, "`store` must be a path, a URL or a zarr store, got 3"),
        ({}, TypeError, "`store` must be a path, a URL or a zarr store, got {}"),
        ("nowhere://a", ValueError, "`store` nowhere://a: Protocol not known: nowhere"),
        ("dropbox://a", ModuleNotFoundError, "`store` dropbox://a: "),
        ("simplecache::memory://a", ValueError, "`store` must be a plain URL, got"),
    ],
)
def test_a_store_that_is_nowhere(store, error, message):
    for call in (load_sweep, lambda s: quiet(square, {"x": [1.0]}, store=s)):
        with pytest.raises(error) as caught:
            call(store)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_a_store_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="^`store` .*typo.zarr does not exist$"):
        load_sweep(tmp_path / "typo.zarr")
    quiet(square, {"x": [1]}, store=tmp_path / "runs.zarr")
    with pytest.raises(ValueError, match=r"exist; beside it are \['runs.zarr'\]$"):
        load_sweep(tmp_path / "typo.zarr")


def test_a_store_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    raises(
        ValueError,
        f"`store` must be in a folder, but {path} is a file",
        square,
        {"x": [1]},
        store=path / "a.zarr",
    )
    raises(
        ValueError,
        f"`store` must be a folder or a new path, got the file {path}",
        square,
        {"x": [1]},
        store=path,
    )

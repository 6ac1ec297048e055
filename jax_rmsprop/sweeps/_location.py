"""Locate a store: a folder, or anything zarr reaches through fsspec."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from jax_rmsprop._validate import expected

if TYPE_CHECKING:
    import zarr.storage


@dataclasses.dataclass(frozen=True)
class Location:
    """The location of a store.

    Attributes:
      name: its name in messages.
      target: what zarr and xarray open: a folder's absolute path, or a zarr store.
    """

    name: str
    target: Any

    @property
    def folder(self) -> Path | None:
        """The folder, if the store is in a local file system."""
        return Path(self.target) if isinstance(self.target, str) else None


def locate(store: Any) -> Location:
    """The location of a store given as a path, a URL or a zarr store.

    Raises:
      TypeError: neither a path, a URL nor a zarr store.
      ValueError: a store that zarr cannot overwrite, or an unknown kind of URL.
      ModuleNotFoundError: fsspec lacks a package for such a URL.
    """
    import zarr.abc.store
    import zarr.storage

    if isinstance(store, str | os.PathLike):
        path = os.fsdecode(store)
        if "://" not in path or path.startswith("file://"):
            return _local(unquote(urlsplit(path).path) if "://" in path else path)
        return _remote(_opened(path))
    if isinstance(store, zarr.storage.LocalStore):
        return _local(os.fspath(store.root))
    if isinstance(store, zarr.storage.FsspecStore):
        return _remote(store)
    if isinstance(store, zarr.abc.store.Store):
        if not store.supports_deletes:  # such as a zip file
            raise ValueError(expected("store", "able to delete files", store))
        return Location(str(store), store)
    raise TypeError(expected("store", "a path, a URL or a zarr store", store))


def _local(path: str) -> Location:
    if path.endswith(".zip"):
        raise ValueError(expected("store", "a folder", path))
    absolute = str(Path(path).expanduser().resolve())
    for parent in Path(absolute).parents:
        if parent.is_file():
            raise ValueError(f"`store` must be in a folder, but {parent} is a file")
    return Location(absolute, absolute)


def _opened(url: str) -> zarr.storage.FsspecStore:
    """Open a URL with fsspec, with the credentials of the environment."""
    import zarr.storage

    if "::" in url:
        raise ValueError(expected("store", "a plain URL", url))
    try:
        return zarr.storage.FsspecStore.from_url(url)
    except ImportError as error:
        raise ModuleNotFoundError(f"`store` {url}: {error}") from None
    except ValueError as error:
        raise ValueError(f"`store` {url}: {error}") from None


def _remote(store: zarr.storage.FsspecStore) -> Location:
    import fsspec.implementations.local

    # zarr wraps synchronous file systems.
    files: Any = getattr(store.fs, "sync_fs", store.fs)
    if isinstance(files, fsspec.implementations.local.LocalFileSystem):
        return _local(store.path)
    return Location(files.unstrip_protocol(store.path), store)


# Folders whose locks have been tested.
_tried = set[Path]()


@contextlib.contextmanager
def locked(at: Location) -> Generator[None]:
    """Keep other processes and threads from writing to the store, for a short time.

    It locks a file beside the folder, opened for writing; a killed process releases
    its lock. Stores other than folders cannot be locked.

    Raises:
      OSError: the file system grants no lock.
    """
    folder = at.folder
    if folder is None:
        yield
        return
    import filelock

    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", is_singleton=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if folder not in _tried:
            second = filelock.FileLock(lock.lock_file, timeout=0, is_singleton=False)
            with contextlib.suppress(filelock.Timeout):
                second.acquire()
                raise OSError("the file system gives a lock to two at once")
            _tried.add(folder)
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or in_one_line(error)
        raise OSError(
            f"`store` {at.name} cannot be locked: {why}; use a folder on a file "
            "system with locks, or a URL such as 's3://...', and let one call write at "
            "a time"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_oserror(at: Location, *others: type[Exception]) -> Generator[None]:
    """Re-raise write errors in one line that names the store and how to continue.

    Remote file systems also raise errors other than OSError; `others` pass unchanged.
    """
    try:
        yield
    except others:
        raise
    except Exception as error:
        if at.folder is not None and not isinstance(error, OSError):
            raise
        why = getattr(error, "strerror", None) or in_one_line(error)
        message = f"`store` {at.name} cannot be written: {why}; its contents are kept"
        number = getattr(error, "errno", None)
        raise OSError(*([message] if number is None else [number, message])) from error


def in_one_line(error: Exception) -> str:
    """An error's message in one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__

"""Locate a store: a folder, or whatever zarr reaches through fsspec."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from jax_rmsprop._validate import short_repr

if TYPE_CHECKING:
    import zarr.storage


@dataclasses.dataclass(frozen=True)
class Location:
    """The one place of a store, to every line that touches it.

    Attributes:
      name: for messages.
      target: what zarr and xarray take: a folder's absolute path, or a zarr store.
    """

    name: str
    target: Any

    @property
    def folder(self) -> Path | None:
        """The folder, if the store is one of this machine."""
        return Path(self.target) if isinstance(self.target, str) else None


def locate(store: Any) -> Location:
    """The location of a store, however a person writes it.

    Raises:
      TypeError: neither a path, a URL nor a zarr store.
      ValueError: what zarr cannot write piece by piece, or an unknown kind of URL.
      ModuleNotFoundError: what fsspec needs for such a URL is not installed.
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
        if not store.supports_deletes:  # a zip file's, which only grows
            raise ValueError(f"`store` must be a folder or the like, got {store}")
        return Location(str(store), store)
    raise TypeError(
        f"`store` must be a path, a URL or a zarr store, got {short_repr(store)}"
    )


def _local(path: str) -> Location:
    if path.endswith(".zip"):
        raise ValueError(f"`store` must be a folder, got {path!r}")
    absolute = str(Path(path).expanduser().resolve())
    for parent in Path(absolute).parents:
        if parent.is_file():
            raise ValueError(f"`store` must be in a folder, but {parent} is a file")
    return Location(absolute, absolute)


def _opened(url: str) -> zarr.storage.FsspecStore:
    """Find fsspec's file system for a URL; credentials are the environment's."""
    import zarr.storage

    if "::" in url:
        raise ValueError(f"`store` must be a plain URL, got {url!r}")
    try:
        return zarr.storage.FsspecStore.from_url(url)
    except ImportError as error:
        raise ModuleNotFoundError(f"`store` {url}: {error}") from None
    except ValueError as error:
        raise ValueError(f"`store` {url}: {error}") from None


def _remote(store: zarr.storage.FsspecStore) -> Location:
    import fsspec.implementations.local

    # zarr wraps what is not asynchronous.
    files: Any = getattr(store.fs, "sync_fs", store.fs)
    if isinstance(files, fsspec.implementations.local.LocalFileSystem):
        return _local(store.path)
    return Location(files.unstrip_protocol(store.path), store)


# Folders whose locks are locks.
_tried = set[Path]()


@contextlib.contextmanager
def locked(at: Location) -> Generator[None]:
    """Let no other process or thread write to the store within it, which is short.

    A file beside the folder is locked, opened for writing; the lock of a process that
    is killed goes with it. What is no folder cannot be locked.

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
            f"`store` {at.name} cannot be locked: {why}; use a folder of a file system "
            "with locks, or a URL such as file-like stores have ('s3://...'), and let "
            "one call at a time write there"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_oserror(at: Location, *others: type[Exception]) -> Generator[None]:
    """Re-raise errors of writing in one line that names the store and how to go on.

    A file system of another machine has its own errors, besides OSError; some `others`
    are none of these.
    """
    try:
        yield
    except others:
        raise
    except Exception as error:
        if at.folder is not None and not isinstance(error, OSError):
            raise
        why = getattr(error, "strerror", None) or in_one_line(error)
        message = f"`store` {at.name} cannot be written: {why}; what it has stays there"
        number = getattr(error, "errno", None)
        raise OSError(*([message] if number is None else [number, message])) from error


def in_one_line(error: Exception) -> str:
    """Write an error's message in one line, or else its name."""
    return " ".join(str(error).split()) or type(error).__name__

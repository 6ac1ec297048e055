"""The cache of compiled programs in `.cache/jax`, kept between runs.

JAX writes an entry in place, so a killed process may leave half of one, and the next
run would get a warning. So a run first deletes entries that do not decompress, and
processes that will be killed only read the cache.
"""

import contextlib
import os
import sys
import time
import zlib
from pathlib import Path

import jax

# One for each environment, whose libraries decide how entries are compressed.
FOLDER = Path(__file__).parents[1] / ".cache" / "jax" / Path(sys.prefix).name
_MONTH = 30 * 24 * 3600
READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def use():
    """Cache the programs of this process and of those that it starts."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER))
    seconds = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # If JAX is already imported, it has read the environment.
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


def only_read():
    """Only read the cache in this process, which will be killed."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)


def clean(folder):
    """Delete entries that are corrupt, or unread for a month."""
    for entry in Path(folder).glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            unread = time.time() - entry.stat().st_atime
            if unread > _MONTH or not _is_whole(entry.read_bytes()):
                entry.unlink()


def _is_whole(entry):
    try:
        _decompress(entry)
    except Exception:  # noqa: BLE001 - each library has its own
        return False
    return True


def _decompress(entry):
    """Decompress with the library that JAX uses: the first of these installed."""
    with contextlib.suppress(ImportError):
        from compression import zstd  # since Python 3.14

        return zstd.decompress(entry)
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard.ZstdDecompressor().decompress(entry)
    return zlib.decompress(entry)

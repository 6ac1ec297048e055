"""The cache of compiled programs, kept from run to run in `.cache/jax`.

JAX writes an entry in place, so a process that is killed may leave half of one, of
which the next run would be warned. So a run first throws away what does not decompress,
and processes that are going to be killed read the cache and write nothing.
"""

import contextlib
import os
import sys
import time
import zlib
from pathlib import Path

import jax

# Each environment has its own, since its libraries decide how entries are compressed.
FOLDER = Path(__file__).parents[1] / ".cache" / "jax" / Path(sys.prefix).name
_MONTH = 30 * 24 * 3600
READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def use():
    """Let this process, and those that it starts, keep what they compile."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER))
    seconds = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # JAX has read the environment if something has imported it before.
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


def only_read():
    """Let this process, which is going to be killed, write nothing there."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)


def clean(folder):
    """Throw away entries that are torn, or that nobody has read for a month."""
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
    """Decompress by the library that JAX takes: the first of these that is there."""
    with contextlib.suppress(ImportError):
        from compression import zstd  # since Python 3.14

        return zstd.decompress(entry)
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard.ZstdDecompressor().decompress(entry)
    return zlib.decompress(entry)

"""The environment of every test: four CPU devices, strict types, a cache, 2 GB."""

import ctypes
import gc
import os
import re
import resource
import signal
import sys
from pathlib import Path

import hypothesis
import jax
import numpy as np
import psutil
import pytest

from tests import cache
from tests.helpers import flag

os.environ.setdefault("MPLBACKEND", "Agg")
cache.use()
jax.config.update("jax_num_cpu_devices", 4)
# A leak of one type or shape into another is an error, not a promotion.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run; `--hypothesis-profile=thorough` for the weekly one.
hypothesis.settings.register_profile(
    "quick", deadline=None, derandomize=True, max_examples=15
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=100)
hypothesis.settings.load_profile("quick")


# Processes. A worker caches what it compiles, which would grow to several GB.

# The imports of the real libraries alone take 1.2 GB.
MOST_BYTES = (2.5 if os.environ.get("REQUIRE_FRAMEWORKS") else 2) * 2**30
_ENOUGH_BYTES = 3 * 2**28  # after a module
_ALMOST_MOST_BYTES = 6 * 2**28  # after a test
_MORE_BYTES = 2**28  # than what was left the last time


class _Doctests:
    """Run examples under JAX's own defaults, as whoever pastes them does."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """For those of the package, which are not beside this file."""
        if not isinstance(item, pytest.DoctestItem):
            return (yield)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return (yield)


def pytest_configure(config):
    """Clean the cache once, in the process that starts the others."""
    config.pluginmanager.register(_Doctests())
    if not hasattr(config, "workerinput"):
        cache.clean(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """After a module, clear JAX's caches if they are large."""
    yield
    _forget_above(_ENOUGH_BYTES)


@pytest.fixture(autouse=True)
def _forget_in_time():
    """After a test, clear them if they are close to the limit."""
    yield
    _forget_above(_ALMOST_MOST_BYTES)


_left = [0]


def _forget_above(limit):
    process = psutil.Process()
    if process.memory_info().rss > max(limit, _left[0] + _MORE_BYTES):
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # glibc keeps freed memory, fragmented
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        _left[0] = process.memory_info().rss


_peaks = []


def pytest_testnodedown(node):
    """Record the peak memory of an xdist worker."""
    _peaks.append(getattr(node, "workeroutput", {}).get("peak", 0))


def _peak_bytes():
    """The peak memory of this process."""
    if sys.platform == "linux":  # `ru_maxrss` includes the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pytest_sessionfinish(session):
    """Fail if a process of the tests exceeded a small machine's memory."""
    peak = _peak_bytes()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak
    elif max(peak, *_peaks, 0) > MOST_BYTES:
        sizes = ", ".join(f"{n / 2**30:.1f} GB" for n in (peak, *_peaks))
        sys.stderr.write(f"\ntoo much memory for a process of the tests: {sizes}\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# Numbers.


@pytest.fixture
def x64():
    """Make float64 the default, for one test."""
    with flag("jax_enable_x64", True):
        yield


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def standard_promotion():
    """JAX's default promotion, for code that does not promise the strict one."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Of sweeps.


@pytest.fixture(scope="session")
def alone():
    """The results at batch size 1, where every row is a plain training."""
    from tests.sweeps import GRID, network, quiet

    return quiet(network, GRID, batch_size=1)


@pytest.fixture(scope="session")
def together():
    """The results at batch size 8."""
    from tests.sweeps import GRID, network, quiet

    return quiet(network, GRID, batch_size=8)


@pytest.fixture
def compiled(monkeypatch):
    """The compiled batch sizes."""
    from jax_rmsprop.sweeps import _batch

    sizes = []
    build = _batch.CompiledBatch.__init__

    def counted(self, traced, mesh, size):
        sizes.append(size)
        build(self, traced, mesh, size)

    monkeypatch.setattr(_batch.CompiledBatch, "__init__", counted)
    return sizes


@pytest.fixture
def start():
    """Start processes that sweep, and kill those still running at the end."""
    from tests.sweeps import forks, run

    running = []

    def start(*arguments, target=run, **options):
        answer, theirs = forks().Pipe(duplex=False)
        process = forks().Process(
            target=target, args=(theirs, *arguments), kwargs=options, daemon=True
        )
        process.start()
        theirs.close()
        running.append(process)
        return process, answer

    yield start
    for process in running:
        process.kill()
        process.join()


@pytest.fixture
def ctrl_c():
    """Set the action of Ctrl-C, regardless of how the tests were started."""
    found = signal.getsignal(signal.SIGINT)

    def does(handler):
        signal.signal(signal.SIGINT, handler)

    does(signal.default_int_handler)
    yield does
    signal.signal(signal.SIGINT, found)

"""The tests' own tools: the cache of compiled programs, and combinations of options."""

import itertools
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tests import cache, mutants
from tests.helpers import axis, every, pairs

ROOT = Path(__file__).parents[1]


def test_pairs_meet_in_fewer_combinations():
    axes = [axis("a", 1, 2, 3), axis("b", 1, 2), axis("c", 1, 2), axis("d", 1, 2, 3)]
    few = pairs(*axes)
    assert len(few) < len(every(*axes)) / 2
    for one, other in itertools.combinations(axes, 2):
        for a, b in itertools.product(one, other):
            assert any(
                a.items() <= row.items() and b.items() <= row.items() for row in few
            )


def test_torn_entries_of_the_cache_are_thrown_away(tmp_path):
    compress = zlib.compress
    try:
        import zstandard
    except ImportError:
        pass
    else:
        compress = zstandard.ZstdCompressor().compress
    whole = compress(bytes(1000))
    for name, content in {"whole": whole, "torn": whole[:-3], "empty": b""}.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    os.utime(tmp_path / "whole-cache")
    cache.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-cache"]


@pytest.mark.slow
def test_a_run_after_one_that_was_killed(tmp_path):
    """It deletes the half-written entries of the cache."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_equations.py",
        "-k",
        "scaled",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    run = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL}
    killed = subprocess.Popen(command, **run)
    while not any(tmp_path.iterdir()):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    torn = list(tmp_path.glob("*-cache"))
    for entry in torn:
        entry.write_bytes(entry.read_bytes()[:100])
    assert subprocess.run(command, **run).returncode == 0
    assert all(len(entry.read_bytes()) > 100 for entry in torn if entry.exists())


def test_mutants_change_one_thing_at_a_time():
    source = "def f(x):\n    return min(x + 1, 2) if x > 0 else -x\n"
    found = [each.source for each in mutants.mutants(source)]
    for line in (
        "min(x - 1, 2) if x > 0 else -x",
        "min(x + 2, 2) if x > 0 else -x",
        "max(x + 1, 2) if x > 0 else -x",
        "min(x + 1, 2) if x >= 0 else -x",
        "min(x + 1, 2) if x > 0 else x",
        "-x if x > 0 else min(x + 1, 2)",
    ):
        assert f"def f(x):\n    return {line}" in found
    assert len(found) == len(set(found))

"""Stores of many members: opening, growing, and what keeping the results costs."""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.sweeps import here, problems
from benchmarks.timing import table
from jax_rmsprop import sweep

MEMBERS = 100_000


def scalar(gamma, seed):
    """Next to no training: what is left is the store's."""
    return {"loss": gamma * seed.astype("float32"), "accuracy": gamma}


def opened(store, seeds, members=MEMBERS):
    """The seconds of a call that has this grid, and how many members it computed."""
    grid = {"gamma": np.linspace(0, 1, members // 100), "seed": range(seeds)}
    began = time.perf_counter()
    curves = sweep(scalar, grid, store=store, devices=here(), progress=False)
    return time.perf_counter() - began, curves.computed


def rate(members, store):
    """Members a second of the regression, and this process' peak of memory in MB."""
    import resource

    train = problems()["linear regression, airfoil"]
    grid = {
        "gamma": np.linspace(0.5, 0.999, 10),
        "seed": np.arange(members // 10, dtype="int32"),
    }
    curves = sweep(train, grid, store=store, devices=here(), progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return members / curves.run_seconds, peak


def in_another_process(members):
    """The same, by itself: a process' peak of memory never falls."""
    code = (
        "import sys, tempfile\n"
        "from benchmarks.stores import rate\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    print(*rate(int(sys.argv[1]), folder + '/a.zarr'))"
    )
    words = [sys.executable, "-c", code, str(members)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def stores():
    """A hundred thousand members; `MEMBERS_OF_A_LARGE_STORE` sets the last rows'."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/a.zarr"
        first, _ = opened(store, 100)
        again = [opened(store, 100)[0] for _ in range(3)]
        more, computed = opened(store, 101)
    fresh = f"{computed} members"
    with tempfile.TemporaryDirectory() as folder:
        alone, _ = opened(f"{folder}/a.zarr", 1, computed * 100)
    check = statistics.median(again)
    large = int(os.environ.get("MEMBERS_OF_A_LARGE_STORE", MEMBERS))
    few, many = in_another_process(1000), in_another_process(large)
    rows = [
        (f"seconds to fill a store with {MEMBERS:,} members", f"{first:.1f}", ""),
        ("seconds to open it and check all", f"{check:.1f}", "< 5"),
        (
            "growing it by one seed / opening it and a new store of those members",
            f"{more / (check + alone):.2f}, {fresh}",
            "<= 1",
        ),
        (
            f"members a second of {large:,} regressions with a store / of 1,000",
            f"{many[0] / few[0]:.2f}",
            ">= 0.9",
        ),
        ("members a second", f"{many[0]:.0f}, {few[0]:.0f}", ""),
        ("peak of memory, MB", f"{many[1]:.0f}, {few[1]:.0f}", "bounded"),
    ]
    return table("Stores", rows)

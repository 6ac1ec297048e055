"""A cluster's workers compared to as many devices of one process."""

import statistics
import subprocess
import sys
import time

import distributed
import jax.numpy as jnp

from benchmarks.sweeps import grid, problems
from benchmarks.timing import table
from jax_rmsprop import sweep

MEMBERS = 1024


def devices_rate(members, repeats):
    """Members per second of the digits network on all CPU devices of this process."""
    train, points = problems()["network, digits"], grid(members)
    rates = []
    for _ in range(repeats + 1):
        curves = sweep(train, points, zipped=True, batch_size=64, progress=False)
        rates.append(members / curves.run_seconds)
    return statistics.median(rates[1:])


def two_devices(members, repeats=3):
    """The same in a process with two devices."""
    code = (
        "import sys, jax\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "from benchmarks.cluster import devices_rate\n"
        "print(devices_rate(*map(int, sys.argv[1:])))"
    )
    words = [sys.executable, "-c", code, str(members), str(repeats)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def cluster():
    """Two single-threaded workers: the overhead of a task, the time of the first."""
    train, points = problems()["network, digits"], grid(MEMBERS)
    options = {"zipped": True, "progress": False}

    def small(x):
        return {"loss": x * jnp.ones(())}

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as workers,
        distributed.Client(workers) as client,
    ):
        options |= {"client": client}

        def seconds(function, points, **more):
            began = time.perf_counter()
            sweep(function, points, **(options | more))
            return time.perf_counter() - began

        # Each call recompiles on each worker: the run time is a longer call's minus a
        # shorter one's.
        few = {name: x[:128] for name, x in points.items()}
        ours, first = [], []
        for _ in range(3):
            base = seconds(train, few, batch_size=64)
            whole = seconds(train, points, batch_size=64)
            ours.append((MEMBERS - 128) / (whole - base))
            one = {name: x[:1] for name, x in points.items()}
            first.append(
                seconds(train, one, batch_size=64)
                - seconds(train, one, batch_size=64, client=None)
            )
        many, fewer = {"x": jnp.arange(520.0)}, {"x": jnp.arange(20.0)}
        each = [
            (
                seconds(small, many, batch_size=1, zipped=False)
                - seconds(small, fewer, batch_size=1, zipped=False)
            )
            / 500
            for _ in range(3)
        ]
    theirs = two_devices(MEMBERS)
    rate = statistics.median(ours)
    rows = [
        (
            "network, digits: members a second of two workers / of two devices",
            f"{rate / theirs:.2f}",
            ">= 0.9",
        ),
        ("members a second", f"{rate:.0f}, {theirs:.0f}", ""),
        (
            "milliseconds a task, of next to nothing",
            f"{1e3 * statistics.median(each):.1f}",
            "<= 20",
        ),
        (
            "seconds until the first result, beyond those of one process",
            f"{statistics.median(first):.1f}",
            "<= 3",
        ),
    ]
    return table("A dask cluster of two workers with one thread each", rows)

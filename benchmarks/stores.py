"""Stores of many members: the cost of opening, growing and saving."""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sweeps import here, problems
from benchmarks.timing import medians_of, table
from jax_rmsprop import Training, sweep

MEMBERS = 100_000


def scalar(gamma, seed):
    """A trivial training, to measure the store."""
    return {"loss": gamma * seed.astype("float32"), "accuracy": gamma}


def opened(store, seeds, members=MEMBERS):
    """The seconds of a sweep over this grid, and the number of computed members."""
    grid = {"gamma": np.linspace(0, 1, members // 100), "seed": range(seeds)}
    began = time.perf_counter()
    curves = sweep(scalar, grid, store=store, devices=here(), progress=False)
    return time.perf_counter() - began, curves.computed


def rate(members, store):
    """Members per second of the regression, and this process' peak memory in MB."""
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
    """The same in a new process, since peak memory never falls."""
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
    """A hundred thousand members; in the last rows `MEMBERS_OF_A_LARGE_STORE`."""
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
        ("seconds to open it and read what was asked for", f"{check:.2f}", "<= 0.5"),
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


def long_trainings(steps=40, members=8, size=256):
    """Steps of at least 50 ms compared to one scan of them, and the cost of saving."""

    def init(seed):
        return jax.random.normal(jax.random.key(seed), (size * size,)).reshape(
            size, size
        )

    def step(x, seed):
        x = jax.lax.fori_loop(0, 12, lambda _, y: jnp.tanh(y @ y / size), x)
        return x, {"loss": (x**2).mean()}

    def in_one_scan(seed):
        return {
            "loss": jax.lax.scan(
                lambda x, _: (lambda c, y: (c, y["loss"]))(*step(x, seed)),
                init(seed),
                length=steps,
            )[1]
        }

    axes = {"seed": range(members)}
    options = {"batch_size": members, "devices": here(), "progress": False}
    calls = {
        "steps": lambda: (
            sweep(Training(init, step), axes, steps=steps, **options).run_seconds
        ),
        "scan": lambda: sweep(in_one_scan, axes, **options).run_seconds,
    }
    seconds = medians_of(calls, rounds=5)

    # A carry of 1 MB, saved after each step or never.
    heavy = Training(
        lambda seed: jnp.full(2**18, seed, "float32"),
        lambda x, seed: (x + 1, {"loss": x[0]}),
    )
    many = {"seed": range(128)}

    def saving(every):
        with tempfile.TemporaryDirectory() as folder:
            return sweep(
                heavy,
                many,
                steps=6,
                store=f"{folder}/a.zarr",
                save_every=every,
                **options | {"batch_size": 128},
            ).run_seconds

    each = medians_of({"all": lambda: saving(0.0), "end": lambda: saving(60.0)}, 3)

    with tempfile.TemporaryDirectory() as folder:
        store, random = f"{folder}/a.zarr", np.random.default_rng(0)

        def more(count):
            points = {"a": 0.9 * random.random(count), "b": 0.9 * random.random(count)}
            began = time.perf_counter()
            curves = sweep(
                lambda a, b: {"loss": a + b * jnp.arange(500.0)},
                points,
                zipped=True,
                store=store,
                **options | {"batch_size": 64},
            )
            assert curves.computed == count
            return time.perf_counter() - began

        for _ in range(4):
            more(50_000)
        grown = statistics.median(more(64) for _ in range(5))
    rows = [
        (
            f"a Training of {steps} steps of {1e3 * seconds['scan'] / steps:.0f} ms / "
            "one scan",
            f"{seconds['steps'] / seconds['scan']:.3f}",
            "<= 1.05",
        ),
        (
            "seconds to save the carries of 128 members, 1 MB each",
            f"{(each['all'] - each['end']) / 5:.2f}",
            "<= 3, 5% of a minute",
        ),
        ("seconds to add 64 members to 200,000 of 500 steps", f"{grown:.2f}", "<= 0.5"),
    ]
    return table("Trainings of many steps", rows)

"""Sweeps on a dask cluster whose workers join, leave and are killed.

Scheduler and workers are processes of this machine, over loopback.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from jax_rmsprop import Training, load_sweep, successive_halving
from jax_rmsprop.sweeps import _cluster, _run
from tests import cache
from tests.helpers import free_port
from tests.sweeps import GRID, bits, long_training, network, quiet, raises, square

distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).parents[1]
# The number of workers to kill, one after every eight finished batches.
KILLS = int(os.environ.get("KILLS", "3"))


class Cluster:
    """A scheduler and its workers, each a process."""

    def __init__(self):
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._scheduler = self._start(
            "dask_scheduler", "--host", self.address, "--no-dashboard"
        )
        self.workers = []

    def _start(self, command, *words):
        code = f"from distributed.cli.{command} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | cache.READ_ONLY | {"PYTHONPATH": str(ROOT)},
        )

    def add_worker(self, *words):
        """Start a worker with one thread, which is not restarted."""
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", *words)
        worker = self._start("dask_worker", self.address, *options)
        self.workers.append(worker)
        return worker

    def replace_worker(self):
        """Kill the oldest worker with -9, and start another one."""
        worker = self.workers.pop(0)
        worker.kill()
        worker.wait()
        self.add_worker()

    def close(self):
        """Kill all processes."""
        for process in (*self.workers, self._scheduler):
            process.kill()
            process.wait()


@contextlib.contextmanager
def two_workers():
    """A cluster of two workers, and a client of it."""
    cluster = Cluster()
    try:
        cluster.add_worker()
        cluster.add_worker()
        with distributed.Client(cluster.address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            yield cluster, client
    finally:
        cluster.close()


@pytest.fixture(
    scope="module",
    params=["threads", pytest.param("processes", marks=pytest.mark.slow)],
)
def client(request):
    """A client of two workers that are not killed, in this process or in their own."""
    if request.param == "processes":
        with two_workers() as (_, client):
            yield client
    else:
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
        with distributed.Client(processes=False, **options) as client:
            yield client


@pytest.fixture
def own():
    """A cluster for one test, and its client."""
    with two_workers() as both:
        yield both


def long_network(gamma, learning_rate, seed):
    """A training whose batches take a good part of a second."""
    return network(gamma, learning_rate, seed, steps=10_000)["loss"][::1000]


SEEDS = 5 * (KILLS + 1)  # of 15 members, in batches of eight
LONG_GRID = GRID | {"seed": range(SEEDS)}


@pytest.mark.slow
def test_the_bits_of_one_process(client, tmp_path, together):
    for store in (None, tmp_path / "a.zarr"):
        curves = quiet(network, GRID, batch_size=8, client=client, store=store)
        assert bits(curves) == bits(together)
        assert curves.computed == 60
        assert curves.devices >= 1
    # Finished members stay, regardless of who computed them.
    for options in ({"client": client}, {}):
        seeds = range(4 + len(options))
        curves = quiet(network, GRID | {"seed": seeds}, store=store, **options)
        assert curves.computed == 15 * len(options)
        assert bits(curves.isel(seed=slice(4))) == bits(together)


def test_what_the_training_closes_over(client, tmp_path):
    """Large data, random keys, Python values, gammas near 1."""
    data, key = jnp.arange(100_000.0), jax.random.key(3)

    def train(x, kind):
        noise = jax.random.normal(key, (3,))
        return {"loss": (data[: len(kind)].sum() * x + noise).astype("bfloat16")}

    grid = {"x": [1.0, 2.0, 3.0], "kind": ["ab", "abcd"]}
    there = quiet(train, grid, client=client, store=tmp_path)
    assert bits(there) == bits(quiet(train, grid))


@pytest.mark.slow
def test_workers_are_killed_and_join(own, tmp_path, monkeypatch):
    cluster, client = own
    store = tmp_path / "a.zarr"
    cluster.add_worker()  # a third one joins
    first = set(cluster.workers)
    done, batches = _run.Progress.done, itertools.count(1)

    def counted(self, *arguments):
        done(self, *arguments)
        if next(batches) in range(8, 8 * KILLS + 1, 8):
            cluster.replace_worker()

    monkeypatch.setattr(_run.Progress, "done", counted)
    curves = quiet(long_network, LONG_GRID, batch_size=8, client=client, store=store)
    monkeypatch.undo()
    assert curves.finished.all()
    assert len(cluster.workers) == 3
    assert len(first - set(cluster.workers)) == min(KILLS, 3)
    assert int(xr.open_zarr(store).steps.sum()) == curves.finished.size  # no repeats
    some = {"seed": [0, SEEDS - 1], "gamma": GRID["gamma"][:2]}
    again = quiet(long_network, LONG_GRID | some, store=store)
    assert again.computed == 0
    assert bits(again) == bits(quiet(long_network, LONG_GRID | some, batch_size=8))


@pytest.mark.slow
def test_the_caller_is_killed(own, tmp_path):
    """The same call resumes on the same workers."""
    cluster, client = own
    store = tmp_path / "a.zarr"
    code = (
        "import distributed, sys\n"
        "from tests.sweeps import quiet\n"
        "from tests.test_cluster import LONG_GRID, long_network\n"
        "client = distributed.Client(sys.argv[1])\n"
        "quiet(long_network, LONG_GRID | {'seed': range(10)}, batch_size=8,\n"
        "      client=client, store=sys.argv[2])\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code, cluster.address, str(store)],
        cwd=ROOT,
        env=os.environ | cache.READ_ONLY,
    )
    finished = 0
    while finished == 0:
        assert caller.poll() is None
        time.sleep(0.1)
        with contextlib.suppress(ValueError, FileNotFoundError):
            finished = int(load_sweep(store).finished.sum())
    caller.kill()
    caller.wait()
    grid = LONG_GRID | {"seed": range(10)}
    curves = quiet(long_network, grid, client=client, store=store)
    assert curves.finished.all()
    assert curves.computed < 150
    assert int(xr.open_zarr(store).steps.sum()) == 150
    assert bits(curves) == bits(quiet(long_network, grid, batch_size=8))


def test_trainings_of_many_steps(client, tmp_path):
    """Saved and resumed on workers and here, with the bits of this process."""
    axes, heard = {"rate": [0.03, 0.1, 1e30], "seed": range(3)}, []
    whole = quiet(long_training, axes, steps=6, batch_size=4)
    options = {"batch_size": 4, "store": tmp_path / "a.zarr"}
    for steps, more in ((3, {"client": client, "save_every": 0.0}), (4, {})):
        quiet(long_training, axes, steps=steps, **options, **more)
    found = quiet(
        long_training, axes, steps=6, client=client, on_step=heard.append, **options
    )
    for name in ("loss", "noise", "steps", "diverged_at"):
        np.testing.assert_array_equal(found[name], whole[name])
    assert {int(batch.step[-1]) for batch in heard} == {4, 5}
    rungs = {"steps": [1, 3], "keep": 0.5, "batch_size": 4, "progress": False}
    here = successive_halving(long_training, axes, **rungs)
    there = successive_halving(long_training, axes, client=client, **rungs)
    np.testing.assert_array_equal(here.loss, there.loss)
    np.testing.assert_array_equal(here.rung, there.rung)


def test_one_member_that_raises_on_a_worker(client):
    equinox = pytest.importorskip("equinox")

    def train(x):
        return {"loss": equinox.error_if(x * 1, x == 3, "it exploded")}

    # Such a training calls back to its process, so it cannot be sent.
    with pytest.raises(TypeError, match="^`train` cannot be sent to workers: "):
        quiet(train, {"x": [1.0, 3.0]}, client=client, batch_size=2)


def test_a_cluster_without_workers_says_so():
    class Empty:
        def scheduler_info(self, **_):
            return {"workers": {}}

    class Bar:
        said = ""

        def set_description(self, what):
            self.said = what

    bar = Bar()
    alone = _cluster.Alone(Empty(), None, bar)
    alone._seen -= 61
    alone._looked -= 61
    with pytest.warns(UserWarning, match="^`client` has had no worker for 61 s; th"):
        alone.look()
    assert bar.said == "no worker for 61 s"
    alone = _cluster.Alone(Empty(), 30.0, bar)
    alone._seen -= 61
    alone._looked -= 61
    with pytest.raises(RuntimeError, match="^`client` has had no worker for 61 s; fin"):
        alone.look()


def test_a_training_that_raises_on_a_worker(client, tmp_path):
    def train(x):
        # More memory than the machine has.
        return {"loss": jnp.cumsum(x * jnp.ones((2**20, 2**20)), 0)[-1, -1]}

    with pytest.raises(RuntimeError, match="^`train` raised ") as caught:
        quiet(train, {"x": [1.0]}, client=client, batch_size=1, store=tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_what_runs_again_is_stored_once(tmp_path, monkeypatch):
    """A worker's error in a later part of a task whose first part has come back."""
    run_order = _cluster.run_order

    def fails_once(job, order):  # it is pickled, so what it counts is the module's
        if order.carry is not None and not _cluster.failed:
            _cluster.failed = True
            return _cluster.Done("", [], None, "it failed")
        return run_order(job, order)

    monkeypatch.setattr(_cluster, "failed", False, raising=False)
    monkeypatch.setattr(_cluster, "run_order", fails_once)
    training = Training(lambda x: x, lambda c, x: (c + x, {"loss": c}))
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.Client(processes=False, **options) as client:
        axes = {"x": [1.0, 2.0, 3.0, 4.0]}
        options = {"steps": 4, "batch_size": 4, "save_every": 0.0, "store": tmp_path}
        found = quiet(training, axes, client=client, **options)
    assert _cluster.failed
    assert found.finished.all()
    assert (xr.open_zarr(tmp_path).steps > 0).sum() == 4


def test_a_training_that_calls_back_cannot_be_sent(client):
    def train(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return {"loss": jax.pure_callback(lambda x: x, shape, x)}

    with pytest.raises(TypeError, match="^`train` cannot be sent to workers: ") as no:
        quiet(train, {"x": [1.0]}, client=client)
    assert "\n" not in str(no.value)


@pytest.mark.slow
def test_a_store_that_is_no_folder(client, together):
    url = f"memory://{time.time_ns()}/a.zarr"
    curves = quiet(network, GRID, batch_size=8, client=client, store=url)
    assert bits(curves) == bits(together)
    assert load_sweep(url).finished.all()


@pytest.mark.slow
def test_a_worker_of_another_jax(tmp_path):
    script = tmp_path / "older.py"
    script.write_text("import jax\njax.__version__ = '0.0.1'\n")
    cluster = Cluster()
    try:
        cluster.add_worker("--preload", str(script))
        with distributed.Client(cluster.address, timeout=60) as client:
            with pytest.raises(ValueError, match="^`client` has a worker tcp://") as no:
                quiet(square, {"x": [1.0]}, client=client)
    finally:
        cluster.close()
    assert str(no.value).endswith(
        f" with jax 0.0.1, but the caller has {jax.__version__}; finished members are "
        "kept"
    )


def test_ctrl_c(client, monkeypatch, ctrl_c):
    """Finished members are returned, and the rest are not computed."""
    done = _run.Progress.done

    def interrupted(self, *arguments):
        done(self, *arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_run.Progress, "done", interrupted)
    with pytest.warns(UserWarning, match="interrupted: 8 of 60 members are finished"):
        curves = quiet(network, GRID, batch_size=8, client=client)
    assert int(curves.finished.sum()) == 8


def test_bad_clients(client, monkeypatch):
    grid = {"x": [1.0]}
    raises(
        TypeError,
        "`client` must be a dask.distributed.Client that is not asynchronous, got str",
        square,
        grid,
        client="tcp://127.0.0.1:8786",
    )
    raises(
        ValueError,
        "`devices` must be None with a `client`, whose workers decide",
        square,
        grid,
        client=client,
        devices=jax.devices(),
    )
    monkeypatch.setitem(sys.modules, "distributed", None)
    raises(
        ModuleNotFoundError,
        "distributed is missing: pip install 'jax-rmsprop[cluster]'",
        square,
        grid,
        client=client,
    )

"""A sweep on the workers of a dask cluster, which may come, go and be killed.

A task is a batch, or some of its steps. Its rows come back, and the caller alone keeps
them. Dask runs it again where its worker died, and nothing here keeps watch.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_rmsprop.sweeps._batch import (
    Rows,
    as_rows,
    batched,
    of_all,
    pack,
    unpack,
    versions_of,
)
from jax_rmsprop.sweeps._location import in_one_line
from jax_rmsprop.sweeps._run import SECONDS_BETWEEN_APPENDS, Runner, Task, finite
from jax_rmsprop.sweeps._training import Traced

if TYPE_CHECKING:
    import distributed

_LARGE_GRAPH = "distributed.admin.large-graph-warning-threshold"
# How often in a row a batch may lose its worker, each time as often as dask allows.
_ATTEMPTS = 5
_KEPT = "what is finished is kept, and the same call goes on from there"
# After how many seconds without a worker to say so.
SECONDS_ALONE = 60.0


class Program(NamedTuple):
    """A training for a batch, exported; it closes over some of the job's arrays."""

    begin: bytes
    advance: bytes
    arrays: list[int]
    carry: list[tuple[tuple[int, ...], str]]


class Job(NamedTuple):
    """A sweep, as it is sent to each worker once: nothing in it depends on JAX's types.

    Attributes:
      name: of this call, and of no other.
      versions: what a worker must have, and the kind of its devices.
      programs: for each group.
      arrays: what the programs close over, each once.
      outputs: their names, in the program's order.
      judged: which of them says whether a member has ended.
    """

    name: str
    versions: dict[str, Any]
    programs: list[Program]
    arrays: list[np.ndarray]
    outputs: list[str]
    judged: str


class Order(NamedTuple):
    """What a worker is to run.

    Attributes:
      group: the number of the program.
      numbers: the hyperparameters of a whole batch.
      members: how many of it count.
      steps: how many to run.
      carry: where they go on from; None if they begin.
      seconds: after how long to come back, with the steps that are done.
    """

    group: int
    numbers: list[np.ndarray]
    members: int
    steps: int
    carry: np.ndarray | None
    seconds: float


class Done(NamedTuple):
    """What a task comes back with: its rows, step by step, or what it raised."""

    device: str
    rows: list[Rows]
    carry: np.ndarray | None
    error: str


def check_client(client: Any, devices: Any) -> None:
    """Check that it is a client of dask, and alone in saying where to run.

    Raises:
      TypeError: it is not.
      ValueError: there are `devices`, too, or several processes of `jax.distributed`.
    """
    import distributed

    if not isinstance(client, distributed.Client) or client.asynchronous:
        raise TypeError(
            "`client` must be a dask.distributed.Client that is not asynchronous, got "
            f"{type(client).__name__}"
        )
    if devices is not None:
        raise ValueError("`devices` must be None with a `client`, whose own are used")
    if jax.process_count() > 1:
        raise ValueError("`client` must be None where jax.distributed is in use")


class ClusterRunner(Runner):
    """Runs tasks on a cluster's workers.

    Attributes:
      devices: which have taken part.
    """

    def __init__(
        self,
        client: distributed.Client,
        wait: float | None,
        traced: Sequence[Traced],
        versions: Mapping[str, Any],
        *arguments: Any,
    ):
        """Take the cluster, the programs, and what any runner takes."""
        super().__init__(*arguments)
        self._client, self.devices = client, set[str]()
        self._alone = _Alone(client, wait, self._progress)
        self._job = _job(traced, self._size, versions, self._shapes.judged)

    def _run_all(self) -> None:
        """Run the tasks.

        Raises:
          RuntimeError: a task lost its worker again and again, or all are gone.
          ValueError: a worker has other versions; it is named.
          OSError: the store cannot be written.
        """
        import distributed

        client, attempts = self._client, 0
        # The job is a task, too: a worker that lacks it gets it from another, and it
        # is computed again where all that had it are gone.
        shared: Any = None
        waiting: dict[Any, tuple[Task, np.ndarray | None]] = {}
        completed = distributed.as_completed(
            loop=client.loop, with_results=True, raise_errors=False
        )

        def submit(task: Task, carry: np.ndarray | None) -> None:
            nonlocal shared
            if shared is None or shared.status in ("error", "cancelled", "lost"):
                shared = self._share()
            lanes = task.lanes(self._size)
            order = Order(
                task.group,
                [x[lanes] for x in task.numbers],
                len(task.members),
                task.end - task.step,
                None if carry is None else carry[lanes],
                self._save_every,
            )
            future = client.submit(run_order, shared, order, pure=False)
            waiting[future] = task, carry
            completed.add(future)

        try:
            while (self._tasks or waiting) and not self._progress.stopped:
                while self._tasks:
                    task, carry = self._tasks.pop(0), None
                    if task.begin:
                        carry = self._results.carry(task.members, task.begin)
                        if carry is None:  # others have gone on with them
                            self._tasks += self._planned(task)
                            continue
                    submit(task, carry)
                found = completed.next_batch(block=False)
                if not found:
                    self._alone.look()
                    time.sleep(0.01)
                for future, done in found:
                    task, carry = waiting.pop(future)
                    if future.status != "finished":
                        attempts += 1
                        _check_lost(future, attempts)
                        submit(task, carry)
                        continue
                    attempts = 0
                    self.devices.add(done.device)
                    if done.error:
                        self._split([task], done.error)
                    elif self._came_back(task, done):
                        submit(task, done.carry)
                    if self._progress.stopped:
                        break
        finally:
            client.cancel(list(waiting))

    def _share(self) -> Any:
        """Send the job; data that the training closes over may be large."""
        import dask.config

        with dask.config.set({_LARGE_GRAPH: 1e15}):
            return self._client.submit(_receive, self._job, pure=False)

    def _came_back(self, task: Task, done: Done) -> bool:
        """Keep what a worker has run; whether it is to go on."""
        for rows in done.rows:
            self._hear(task, rows)
        more = task.step < task.end and not task.ended.all()
        if not self._shapes.stepped:
            self._collect(task.block(False))
            if self._due(SECONDS_BETWEEN_APPENDS):
                self._flush()
        elif self._saves or not more:
            self._keep_task(task, done.carry)
        return more


class _Alone:
    """Says when a cluster has no workers."""

    def __init__(self, client: Any, wait: float | None, progress: Any):
        self._client, self._wait, self._progress = client, wait, progress
        self._seen = self._looked = time.monotonic()
        self._said = False

    def look(self) -> None:
        """Look, once in a second.

        Raises:
          RuntimeError: there were none for as long as one would wait.
        """
        now = time.monotonic()
        if now - self._looked < 1:
            return
        self._looked = now
        if self._client.scheduler_info(n_workers=-1)["workers"]:
            self._seen, self._said = now, False
        alone = now - self._seen
        none = f"`client` has had no worker for {alone:.0f} s"
        if self._wait is not None and alone >= self._wait:
            raise RuntimeError(f"{none}; {_KEPT}")
        if alone >= SECONDS_ALONE:
            self._progress.say(f"no worker for {alone:.0f} s")
            if not self._said:
                warnings.warn(f"{none}; the sweep waits for some", stacklevel=2)
            self._said = True


def _check_lost(future: Any, attempts: int) -> None:
    """Let a task that lost its worker be run again; raise what a task raised."""
    import distributed

    if future.status == "error":
        error = future.exception()
        if isinstance(error, WrongWorker):
            raise ValueError(in_one_line(error)) from None
        if not isinstance(error, distributed.KilledWorker):
            what = f"{type(error).__name__}: {in_one_line(error)}"
            raise RuntimeError(f"a worker raised {what}; {_KEPT}") from None
    if attempts >= _ATTEMPTS:
        what = "the workers died again and again while they computed"
        raise RuntimeError(f"{what}; {_KEPT}")


class WrongWorker(ValueError):
    """A worker has other versions than the caller."""


def _receive(job: Job) -> Job:
    return job


def run_order(job: Job, order: Order) -> Done:
    """Run a batch on this worker; its rows go back.

    Raises:
      WrongWorker: this worker has other versions than the caller.
    """
    worker = _worker(job)
    device = worker.devices.get()
    name = f"{_address()} {device}"
    try:
        rows, carry = worker.run(order, device)
    except jax.errors.JaxRuntimeError as error:
        return Done(name, [], None, in_one_line(error))
    finally:
        worker.devices.put(device)
    return Done(name, rows, carry, "")


class _Worker:
    """What a worker keeps of a sweep: its devices and programs."""

    def __init__(self, job: Job):
        check_worker(job.versions)
        self._job, self._programs = job, dict[Any, Any]()
        self._lock = threading.Lock()
        # A thread takes a device, and another one another.
        self.devices = queue.SimpleQueue[Any]()
        for device in jax.local_devices():
            self.devices.put(device)

    def _program(self, group: int, device: Any) -> Any:
        with self._lock:
            if (group, device) not in self._programs:
                program = self._job.programs[group]
                consts = [self._job.arrays[i] for i in program.arrays]
                begin, advance = (
                    jax.jit(jax.export.deserialize(bytearray(each)).call)
                    for each in (program.begin, program.advance)
                )
                placed = jax.device_put(consts, device)
                self._programs[group, device] = begin, advance, placed
            return self._programs[group, device]

    def run(self, order: Order, device: Any) -> tuple[list[Rows], np.ndarray | None]:
        """The rows of each step, and where to go on from."""
        job, began = self._job, time.monotonic()
        begin, advance, consts = self._program(order.group, device)
        numbers = jax.device_put(order.numbers, device)
        if order.carry is None:
            carry = begin(consts, *numbers)
        else:
            specs = [
                jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
                for shape, dtype in job.programs[order.group].carry
            ]
            carry = jax.device_put(unpack(order.carry, specs), device)
        found, ended = list[Rows](), np.zeros(order.members, bool)
        for _ in range(order.steps):
            carry, outputs = advance(consts, carry, *numbers)
            rows = as_rows(job.outputs, outputs)
            found.append({name: x[: order.members] for name, x in rows.items()})
            ended |= ~finite(found[-1][job.judged])
            if ended.all() or time.monotonic() - began >= order.seconds:
                break
        return found, pack(carry)[: order.members] if carry else None


# Those of the last sweeps, of which several may take turns.
_workers: dict[str, _Worker] = {}
_workers_lock = threading.Lock()
_WORKERS = 4


def _worker(job: Job) -> _Worker:
    """This process' own, made for the first task of a sweep."""
    with _workers_lock:
        if job.name not in _workers:
            _workers[job.name] = _Worker(job)
            for oldest in list(_workers)[:-_WORKERS]:
                del _workers[oldest]
        return _workers[job.name]


def check_worker(versions: Mapping[str, Any]) -> None:
    """Check that this process computes the bits that the caller's would.

    Raises:
      WrongWorker: naming this worker, and what is another here.
    """
    ours = versions_of(jax.devices()[0]) | _x64()
    for name, wanted in versions.items():
        if ours.get(name) != wanted:
            raise WrongWorker(
                f"`client` has a worker {_address()} with {name} {ours.get(name)}, but "
                f"the caller has {wanted}; what is finished is kept"
            )


def _x64() -> dict[str, Any]:
    return {"jax_enable_x64": jax.config.read("jax_enable_x64")}


def _address() -> str:
    import distributed

    return distributed.get_worker().address


def _job(
    traced: Sequence[Traced], size: int, versions: Mapping[str, Any], judged: str
) -> Job:
    """Export what a worker needs.

    Raises:
      TypeError: a program cannot be exported, as with callbacks to this process.
    """
    arrays: dict[int, Any] = {}
    programs: list[Program] = []
    for each in traced:
        arrays |= {id(x): x for x in each.consts}
        where = [list(arrays).index(id(x)) for x in each.consts]
        programs.append(_exported(each, size, where))
    return Job(
        uuid.uuid4().hex,
        {**versions, **_x64()},
        programs,
        [np.asarray(jnp.asarray(x)) for x in arrays.values()],
        list(traced[0].outputs),
        judged,
    )


def _exported(traced: Traced, size: int, where: list[int]) -> Program:
    """The programs of a batch, for any process with the same versions."""
    begin, advance = batched(traced, size)
    consts = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.consts]
    carry = of_all(traced.carry_specs, size)
    numbers = of_all(traced.init.in_avals, size)
    platforms = [jax.devices()[0].platform]
    try:
        programs = [
            jax.export.export(jax.jit(f), platforms=platforms)(*arguments).serialize()
            for f, arguments in (
                (begin, (consts, *numbers)),
                (advance, (consts, carry, *numbers)),
            )
        ]
    except (NotImplementedError, ValueError) as error:
        raise TypeError(
            f"`train` cannot be sent to workers: {in_one_line(error)}"
        ) from error
    kinds = [(x.shape, str(x.dtype)) for x in traced.carry_specs]
    return Program(bytes(programs[0]), bytes(programs[1]), where, kinds)

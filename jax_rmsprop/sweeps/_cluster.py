"""A sweep on the workers of a dask cluster, which may join, leave and be killed.

A task is a batch, or some of its steps. It returns its rows, and the caller alone
stores them. If its worker dies, dask runs it again; nothing here monitors workers.
"""

from __future__ import annotations

import dataclasses
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

from jax_rmsprop.sweeps import _batch
from jax_rmsprop.sweeps._batch import Rows
from jax_rmsprop.sweeps._location import in_one_line
from jax_rmsprop.sweeps._run import SECONDS_BETWEEN_APPENDS, Runner, Task, finite
from jax_rmsprop.sweeps._training import Traced

if TYPE_CHECKING:
    import distributed

_LARGE_GRAPH = "distributed.admin.large-graph-warning-threshold"
# Lost workers in a row before giving up, each after as many retries as dask allows.
_ATTEMPTS = 5
_KEPT = "finished members are kept; repeat the call to resume"
# Seconds without a worker before a warning.
SECONDS_ALONE = 60.0


class Program(NamedTuple):
    """An exported batch of a training; `arrays` indexes the job's arrays it uses."""

    begin: bytes
    advance: bytes
    arrays: list[int]
    carry: list[tuple[tuple[int, ...], str]]


class Job(NamedTuple):
    """A sweep, sent to each worker once, without objects of JAX.

    Attributes:
      name: a unique name of this call.
      versions: the versions and the kind of device that a worker must have.
      programs: one for each group.
      arrays: the arrays that the programs close over, without duplicates.
      outputs: the names of the outputs, in the program's order.
      judged: the output that ends a member when it is not finite.
    """

    name: str
    versions: dict[str, Any]
    programs: list[Program]
    arrays: list[np.ndarray]
    outputs: list[str]
    judged: str


class Order(NamedTuple):
    """A task for a worker, a whole batch with its padding.

    Attributes:
      group: the number of the program.
      numbers: the hyperparameters.
      steps: the number of steps to run.
      carry: the packed carries to resume from; None at step 0.
      seconds: the time after which to return the steps done so far.
    """

    group: int
    numbers: list[np.ndarray]
    steps: int
    carry: np.ndarray | None
    seconds: float


class Done(NamedTuple):
    """The result of a task: its rows, step by step, or its error."""

    device: str
    rows: list[Rows]
    carry: np.ndarray | None
    error: str


def check_client(client: Any, devices: Any) -> None:
    """Check that `client` is a dask client, and nothing else chooses the devices.

    Raises:
      TypeError: it is not a dask client.
      ValueError: there are also `devices`, or several processes of `jax.distributed`.
    """
    import distributed

    if not isinstance(client, distributed.Client) or client.asynchronous:
        raise TypeError(
            "`client` must be a dask.distributed.Client that is not asynchronous, got "
            f"{type(client).__name__}"
        )
    if devices is not None:
        raise ValueError("`devices` must be None with a `client`, whose workers decide")
    if jax.process_count() > 1:
        raise ValueError("`client` must be None if jax.distributed is in use")


@dataclasses.dataclass
class ClusterRunner(Runner):
    """Runs tasks on a cluster's workers.

    Attributes:
      client: the cluster.
      wait: the seconds without a worker before an error; None for never.
      traced: the trainings of all groups.
      versions: what a worker must have.
      devices: the devices that have run a task.
    """

    client: distributed.Client
    wait: float | None
    traced: Sequence[Traced]
    versions: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Export the programs."""
        super().__post_init__()
        self.devices = set[str]()
        self._alone = Alone(self.client, self.wait, self.progress.bar)
        self._job = _job(self.traced, self.size, self.versions, self.shapes.judged)

    def _run_all(self) -> None:
        """Run the tasks.

        Raises:
          RuntimeError: a task lost its worker several times in a row, or all are gone.
          ValueError: naming a worker with other versions.
          OSError: the store cannot be written.
        """
        import dask.config
        import distributed

        client, attempts = self.client, 0
        # The job is a task, too: a worker that lacks it fetches it from another, and
        # dask recomputes it if all workers that had it are gone.
        shared: Any = None
        waiting: dict[Any, tuple[Task, np.ndarray | None]] = {}
        completed = distributed.as_completed(
            loop=client.loop, with_results=True, raise_errors=False
        )

        def submit(task: Task, carry: np.ndarray | None) -> None:
            nonlocal shared
            if shared is None or shared.status in ("error", "cancelled", "lost"):
                with dask.config.set({_LARGE_GRAPH: 1e15}):
                    shared = client.submit(_receive, self._job, pure=False)
            lanes, steps = task.lanes(self.size), task.end - task.step
            numbers = [column[lanes] for column in self.numbers.values()]
            order = Order(task.group, numbers, steps, carry, self.save_every)
            future = client.submit(run_order, shared, order, pure=False)
            waiting[future] = task, carry
            completed.add(future)

        try:
            while (self._tasks or waiting) and not self.progress.stopped:
                while self._tasks:
                    task, carry = self._tasks.pop(0), None
                    if task.begin:
                        carry = self.results.carry(task.lanes(self.size), task.begin)
                    if task.begin and carry is None:  # others have continued them
                        self._tasks += self._planned(task, task.members)
                    else:
                        submit(task, carry)
                found = completed.next_batch(block=False)
                if not found:
                    self._alone.look()
                    if self._blocks and self._due(SECONDS_BETWEEN_APPENDS):
                        self._flush()
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
                    if self.progress.stopped:
                        break
        finally:
            client.cancel(list(waiting))

    def _came_back(self, task: Task, done: Done) -> bool:
        """Store a worker's results; return whether the task continues."""
        own = slice(len(task.members))
        for rows in done.rows:
            self._hear(task, {name: x[own] for name, x in rows.items()})
        more = not task.done
        if self._saves or not more:
            carry = done.carry if self._saves else None
            self._collect(task, None if carry is None else carry[own])
        if self._due(SECONDS_BETWEEN_APPENDS):
            self._flush()
        return more


class Alone:
    """Warns or raises if a cluster has no workers."""

    def __init__(self, client: Any, wait: float | None, bar: Any):
        """Begin to count the seconds."""
        self._client, self._wait, self._bar, self._said = client, wait, bar, False
        self._seen = self._looked = time.monotonic()

    def look(self) -> None:
        """Count the workers, once a second.

        Raises:
          RuntimeError: there was none for `wait` seconds.
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
            self._bar.set_description(f"no worker for {alone:.0f} s")
            if not self._said:
                warnings.warn(f"{none}; the sweep waits for one", stacklevel=2)
            self._said = True


def _check_lost(future: Any, attempts: int) -> None:
    """Accept a task that lost its worker, to be rerun; re-raise other errors."""
    import distributed

    if future.status == "error":
        error = future.exception()
        if isinstance(error, WrongWorker):
            raise ValueError(in_one_line(error)) from None
        if not isinstance(error, distributed.KilledWorker):
            what = f"{type(error).__name__}: {in_one_line(error)}"
            raise RuntimeError(f"a worker raised {what}; {_KEPT}") from None
    if attempts >= _ATTEMPTS:
        what = f"lost the worker of a task {attempts} times in a row"
        raise RuntimeError(f"{what}; {_KEPT}")


class WrongWorker(ValueError):
    """A worker's versions differ from the caller's."""


def _receive(job: Job) -> Job:
    return job


def run_order(job: Job, order: Order) -> Done:
    """Run a batch on this worker, and return its rows.

    Raises:
      WrongWorker: this worker's versions differ from the caller's.
    """
    worker = _worker(job)
    device = worker.devices.get()
    name = f"{_address()} {device}"
    try:
        return Done(name, *worker.run(order, device), "")
    except jax.errors.JaxRuntimeError as error:
        return Done(name, [], None, in_one_line(error))
    finally:
        worker.devices.put(device)


class _Worker:
    """A worker's devices and programs for a sweep."""

    def __init__(self, job: Job):
        check_worker(job.versions)
        self._job, self._programs = job, dict[Any, Any]()
        self._lock = threading.Lock()
        # Each thread takes a device of its own.
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
        """The rows of each step, and the packed carries."""
        job, began = self._job, time.monotonic()
        begin, advance, consts = self._program(order.group, device)
        numbers = jax.device_put(order.numbers, device)
        if order.carry is None:
            carry = begin(consts, *numbers)
        else:
            kinds = job.programs[order.group].carry
            specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]
            carry = jax.device_put(_batch.unpack(order.carry, specs), device)
        found, ended = list[Rows](), False
        for _ in range(order.steps):
            carry, outputs = advance(consts, carry, *numbers)
            found.append(_batch.as_rows(job.outputs, outputs))
            ended |= ~finite(found[-1][job.judged])
            if np.all(ended) or time.monotonic() - began >= order.seconds:
                break
        return found, _batch.pack(carry) if carry else None


# Those of the last few sweeps, which may alternate.
_workers: dict[str, _Worker] = {}
_workers_lock = threading.Lock()
_WORKERS = 4


def _worker(job: Job) -> _Worker:
    """This process' worker, created by the first task of a sweep."""
    with _workers_lock:
        if job.name not in _workers:
            _workers[job.name] = _Worker(job)
            for oldest in list(_workers)[:-_WORKERS]:
                del _workers[oldest]
        return _workers[job.name]


def check_worker(versions: Mapping[str, Any]) -> None:
    """Check that this process computes the same bits as the caller's.

    Raises:
      WrongWorker: naming this worker, and the version that differs.
    """
    ours = _batch.versions_of(jax.devices()[0]) | _x64()
    for name, wanted in versions.items():
        if ours.get(name) != wanted:
            raise WrongWorker(
                f"`client` has a worker {_address()} with {name} {ours.get(name)}, but "
                f"the caller has {wanted}; finished members are kept"
            )


def _x64() -> dict[str, Any]:
    return {"jax_enable_x64": jax.config.read("jax_enable_x64")}


def _address() -> str:
    import distributed

    return distributed.get_worker().address


def _job(
    traced: Sequence[Traced], size: int, versions: Mapping[str, Any], judged: str
) -> Job:
    """Export the programs and arrays that a worker needs.

    Raises:
      TypeError: a program cannot be exported, such as one that calls back.
    """
    arrays = {id(x): x for each in traced for x in each.consts}
    place = {key: i for i, key in enumerate(arrays)}
    programs = [
        _exported(each, size, [place[id(x)] for x in each.consts]) for each in traced
    ]
    outputs, versions = list(traced[0].outputs), {**versions, **_x64()}
    consts = [np.asarray(jnp.asarray(x)) for x in arrays.values()]
    return Job(uuid.uuid4().hex, versions, programs, consts, outputs, judged)


def _exported(traced: Traced, size: int, where: list[int]) -> Program:
    """Export a batch's programs, for any process with the same versions."""
    begin, advance = _batch.batched(traced, size)
    consts = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.consts]
    carry, numbers = (
        _batch.of_all(x, size) for x in (traced.carry_specs, traced.init.in_avals)
    )

    def export(function: Any, *arguments: Any) -> bytes:
        program = jax.export.export(
            jax.jit(function), platforms=[jax.devices()[0].platform]
        )
        return bytes(program(*arguments).serialize())

    kinds = [(x.shape, str(x.dtype)) for x in traced.carry_specs]
    try:
        first = export(begin, consts, *numbers)
        return Program(first, export(advance, consts, carry, *numbers), where, kinds)
    except (NotImplementedError, ValueError) as error:
        raise TypeError(
            f"`train` cannot be sent to workers: {in_one_line(error)}"
        ) from error

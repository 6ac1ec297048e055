"""A sweep on the workers of a dask cluster, which may come, go and be killed.

A task is a batch. Dask runs it again where its worker died, and nothing here keeps
watch: a batch that was computed twice is found by its members, and kept once.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_rmsprop._sweep._grid import Members
from jax_rmsprop._sweep._location import Location, in_one_line
from jax_rmsprop._sweep._program import (
    Rows,
    addressable_rows,
    batched,
    versions_of,
)
from jax_rmsprop._sweep._run import (
    Appender,
    Progress,
    Task,
    count_diverged,
    with_diverged_at,
)
from jax_rmsprop._sweep._table import Block, Memory, Store, is_here
from jax_rmsprop._sweep._trace import OutputSpecs, Traced, is_key, without_key

if TYPE_CHECKING:
    import distributed

_LARGE_GRAPH = "distributed.admin.large-graph-warning-threshold"
# How often in a row a batch may lose its worker, each time as often as dask allows.
_ATTEMPTS = 5


class Job(NamedTuple):
    """A sweep, as it is sent to each worker once: nothing in it depends on JAX's types.

    Attributes:
      name: of this call, and of no other.
      size: the members of a batch.
      versions: what a worker must have, and the kind of its devices.
      programs: for each combination its program, exported for a batch, and which of
        `arrays` it closes over.
      arrays: what the programs close over, each once.
      outputs: the shape and dtype of each output of a member.
      folder: the store's; None if there is none that a worker could write to.
      header: what the store's attributes say of it.
      members: those that are asked for.
    """

    name: str
    size: int
    versions: dict[str, Any]
    programs: list[tuple[bytes, list[int]]]
    arrays: list[np.ndarray]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    folder: str | None
    header: Mapping[str, Any]
    members: Members


class Done(NamedTuple):
    """What a task comes back with.

    Attributes:
      device: which one has run it.
      diverged: of how many members some number is not finite.
      rows: the results; None if the worker has written them to the store.
    """

    device: str
    diverged: int
    rows: Rows | None


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


def make_job(
    traced: Sequence[Traced],
    size: int,
    versions: Mapping[str, Any],
    table: Memory | Store,
    members: Members,
    outputs: OutputSpecs,
) -> Job:
    """Export what a worker needs.

    Raises:
      TypeError: a program cannot be exported, as with callbacks to this process.
    """
    arrays: dict[int, Any] = {}
    programs: list[tuple[bytes, list[int]]] = []
    platform = jax.devices()[0].platform
    for each in traced:
        consts = list(each.jaxpr.consts)
        arrays |= {id(x): x for x in consts}
        where = [list(arrays).index(id(x)) for x in consts]
        programs.append((_exported(each, size, platform), where))
    folder, header = None, {}
    if isinstance(table, Store) and table.at.folder is not None:
        folder, header = table.at.target, table.header
    return Job(
        uuid.uuid4().hex,
        size,
        {**versions, **_x64()},
        programs,
        [np.asarray(_plain(x)) for x in arrays.values()],
        {name: (x.shape, str(x.dtype)) for name, x in outputs.items()},
        folder,
        header,
        members,
    )


def run_on_cluster(
    client: distributed.Client,
    tasks: Sequence[Task],
    job: Job,
    table: Memory | Store,
    progress: Progress,
) -> int:
    """Compute what is missing on a cluster's workers.

    Returns:
      How many devices have taken part.

    Raises:
      RuntimeError: a task raised an error, or lost its worker again and again.
      ValueError: a worker has other versions; it is named.
      OSError: the store cannot be written.
    """
    import dask.config
    import distributed

    began = time.perf_counter()
    appender, devices, attempts = Appender(table, progress), set[str](), 0
    # The job is a task, too: a worker that lacks it gets it from another, and it is
    # computed again where all that had it are gone.
    shared: Any = None
    waiting: dict[Any, Task] = {}

    def submit(task: Task) -> Any:
        nonlocal shared
        if shared is None or shared.status in ("error", "cancelled", "lost"):
            # Data that the training closes over may be large, and go once.
            with dask.config.set({_LARGE_GRAPH: 1e15}):
                shared = client.submit(_receive, job, pure=False)
        future = client.submit(run_task, shared, task, pure=False)
        waiting[future] = task
        return future

    completed = distributed.as_completed(
        [submit(task) for task in tasks], with_results=True, raise_errors=False
    )
    try:
        for future, result in completed:
            task = waiting.pop(future)
            if future.status == "finished":
                attempts = 0
                devices.add(result.device)
                if result.rows is None:
                    progress.done(len(task.members), result.diverged)
                    appender.refresh()
                else:
                    appender.add([Block(task.members, result.rows)])
            else:
                attempts += 1
                _check_lost(future, attempts)
                completed.add(submit(task))
            if progress.stopped:
                break
    finally:
        client.cancel(list(waiting))
        appender.flush()
        progress.run_seconds = time.perf_counter() - began
    if not waiting and not table.finished.all():
        raise OSError(
            f"`store` {job.folder} lacks what the workers have written to it, as if "
            "theirs were a copy of it"
        )
    return len(devices)


def _check_lost(future: Any, attempts: int) -> None:
    """Let a task that lost its worker be run again; raise what a task raised."""
    import distributed

    if future.status == "error":
        error = future.exception()
        if isinstance(error, ValueError | OSError) and str(error).startswith("`"):
            raise type(error)(in_one_line(error)) from None
        if not isinstance(error, distributed.KilledWorker):
            raise RuntimeError(
                f"a worker raised {type(error).__name__}: {in_one_line(error)}; "
                "what is finished is kept, and the same call goes on from there"
            ) from None
    if attempts >= _ATTEMPTS:
        raise RuntimeError(
            "the workers died again and again while they computed; what is finished is "
            "kept, and the same call goes on from there"
        )


def _receive(job: Job) -> Job:
    return job


def run_task(job: Job, task: Task) -> Done:
    """Run a batch on this worker; the results go to the store, or back.

    Raises:
      ValueError: this worker has other versions than the caller.
    """
    worker = _worker(job)
    device = worker.devices.get()
    try:
        rows = worker.run(task, device)
    finally:
        worker.devices.put(device)
    diverged, name = count_diverged(rows), f"{_address()} {device}"
    if worker.store is None:
        return Done(name, diverged, rows)
    worker.store.append([Block(task.members, rows)])
    return Done(name, diverged, None)


class _Worker:
    """What a worker keeps of a sweep: its devices, programs and the store."""

    def __init__(self, job: Job):
        check_worker(job.versions)
        self._job, self._programs = job, dict[Any, Any]()
        self._lock = threading.Lock()
        # A thread takes a device, and another one another.
        self.devices = queue.SimpleQueue[Any]()
        for device in jax.local_devices():
            self.devices.put(device)
        self.store: Store | None = None
        if job.folder is not None:
            at = Location(job.folder, job.folder)
            outputs = {
                name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
                for name, (shape, dtype) in job.outputs.items()
            }
            if is_here(at, job.header):
                self.store = Store(at, job.header, job.members, outputs, check=False)

    def run(self, task: Task, device: Any) -> Rows:
        """The results of a task's members."""
        with self._lock:
            if (task.combination, device) not in self._programs:
                program, where = self._job.programs[task.combination]
                consts = [jax.device_put(self._job.arrays[i], device) for i in where]
                call = jax.jit(jax.export.deserialize(bytearray(program)).call)
                self._programs[task.combination, device] = call, consts
            call, consts = self._programs[task.combination, device]
        numbers = task.filled_up(self._job.size)
        outputs = call(consts, *jax.device_put(numbers, device))
        rows = {
            name: addressable_rows(x)[: len(task.members)]
            for name, x in zip(self._job.outputs, outputs, strict=True)
        }
        return with_diverged_at(rows)


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
      ValueError: naming this worker, and what is another here.
    """
    ours = versions_of(jax.devices()[0]) | _x64()
    for name, wanted in versions.items():
        if ours.get(name) != wanted:
            raise ValueError(
                f"`client` has a worker {_address()} with {name} {ours.get(name)}, but "
                f"the caller has {wanted}; what is finished is kept"
            )


def _x64() -> dict[str, Any]:
    return {"jax_enable_x64": jax.config.read("jax_enable_x64")}


def _address() -> str:
    import distributed

    return distributed.get_worker().address


def _exported(traced: Traced, size: int, platform: str) -> bytes:
    """The program of a batch, for any process with the same versions."""
    consts, batch = list(traced.jaxpr.consts), batched(traced, size)

    def plain_batch(plain: list[Any], *numbers: Any) -> list[Any]:
        own = [
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(const))
            if is_key(const)
            else x
            for x, const in zip(plain, consts, strict=True)
        ]
        return batch(own, *numbers)

    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_plain, consts)]
    numbers = [
        jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in traced.jaxpr.in_avals
    ]
    try:
        export = jax.export.export(jax.jit(plain_batch), platforms=[platform])
        return bytes(export(plain, *numbers).serialize())
    except (NotImplementedError, ValueError) as error:
        raise TypeError(
            f"`train` cannot be sent to workers: {in_one_line(error)}"
        ) from error


def _plain(x: Any) -> Any:
    """An array that a file or a message can hold: of random keys their data."""
    return jnp.asarray(without_key(x))

"""The loop over batches: plan what is missing, run it, show progress."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop.sweeps._batch import (
    CompiledBatch,
    Rows,
    broadcast_from_process_0,
    file_dtype,
    pack,
)
from jax_rmsprop.sweeps._location import in_one_line
from jax_rmsprop.sweeps._members import Combination
from jax_rmsprop.sweeps._results import Block, Results, Shapes, missing
from jax_rmsprop.sweeps._training import Traced

# Small blocks are collected and stored together, after this time or size.
SECONDS_BETWEEN_APPENDS = 1.0
_BYTES_BETWEEN_APPENDS = 10_000_000


@dataclasses.dataclass
class Task:
    """Members that one device runs side by side.

    Attributes:
      group: the number of their program.
      members: their numbers.
      begin: the number of steps at their last save.
      end: the step up to which they run.
      numbers: their hyperparameters, in the program's order.
      steps: the number of steps of each member so far.
      ended: which members have a judged output that is not finite.
      rows: the outputs of each step since the last save.
      history: the outputs of each step of this call, if there is an `on_step`.
    """

    group: int
    members: np.ndarray
    begin: int
    end: int
    numbers: list[np.ndarray]
    rows: list[Rows] = dataclasses.field(init=False, default_factory=list)
    history: list[Rows] = dataclasses.field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Start all members at `begin`."""
        self.steps = np.full(len(self.members), self.begin, "int32")
        self.ended = np.zeros(len(self.members), bool)

    @property
    def step(self) -> int:
        """The number of steps of the members that have not ended."""
        return self.begin + len(self.rows)

    def lanes(self, size: int) -> np.ndarray:
        """The member in each lane of a batch; the last one fills the rest."""
        return np.minimum(np.arange(size), len(self.members) - 1)

    def add(self, rows: Rows, judged: str) -> None:
        """Add the outputs of a step, and note which members it ends."""
        self.rows.append(rows)
        self.steps[~self.ended] = self.step
        self.ended |= ~finite(rows[judged])

    def block(self, stepped: bool, carry: np.ndarray | None = None) -> Block:
        """The outputs since the last save."""
        rows = {n: np.stack([r[n] for r in self.rows], 1) for n in self.rows[0]}
        first = []
        for values in rows.values():
            if stepped:
                run = self.begin + np.arange(values.shape[1]) < self.steps[:, None]
                bad = ~finite(values, 2) & run
            else:  # along the output's leading axis; a scalar has the index 0
                bad = ~finite(values[:, 0], min(2, values.ndim - 1))
                bad = bad.reshape(len(bad), -1)
            first.append(np.where(bad.any(1), self.begin + bad.argmax(1), -1))
        rows["diverged_at"] = np.stack(first, -1).astype("int32")
        return Block(self.members, self.begin, self.steps.copy(), rows, carry)


def plan(
    results: Results,
    number: int,
    group: Combination,
    some: np.ndarray,
    end: int,
    size: int,
) -> list[Task]:
    """Batch the members of a group that have steps left to run."""
    some = some[results.steps[some] < end]
    begun = some[results.steps[some] > 0]
    if len(begun):
        some = np.setdiff1d(some, begun[results.ended(begun)])
    tasks: list[Task] = []
    for begin in np.unique(results.steps[some]).tolist():
        alike = some[results.steps[some] == begin]
        for members in np.split(alike, range(size, len(alike), size)):
            at = np.searchsorted(group.members, members)
            numbers = [x[at] for x in group.numbers.values()]
            tasks.append(Task(number, members, begin, end, numbers))
    return tasks


class Progress:
    """Progress bar, counters and the stop flag.

    Attributes:
      stopped: whether to end after the current step.
      ran: the numbers of the members that this call has run.
      judged: the name of the output to show.
      compile_seconds: time spent compiling.
      run_seconds: time spent running batches and storing their results.
    """

    def __init__(self, bar: Any):
        """Store the bar (a tqdm)."""
        self.stopped, self.judged, self.ran = False, "", set[int]()
        self.compile_seconds, self.run_seconds = 0.0, 0.0
        self._bar, self._diverged, self._median = bar, 0, dict[str, str]()

    @property
    def computed(self) -> int:
        """The number of members that this call has run."""
        return len(self.ran)

    def say(self, what: str) -> None:
        """Set the bar's description."""
        self._bar.set_description(what)

    def compiled(self, size: int, seconds: float) -> None:
        """Add the seconds of a compilation, and show the batch size."""
        self.compile_seconds += seconds
        self.say(f"{size} at once")
        self._bar.unpause()  # so that its rate leaves out compiling

    def there(self, steps: int) -> None:
        """Count steps that are already stored."""
        self._bar.update(steps)

    def stepped(self, judged: np.ndarray) -> None:
        """Count a step of some members, and show the median of their judged output."""
        self._bar.update(len(judged))
        values = np.asarray(judged, float) if judged.dtype.kind != "c" else abs(judged)
        values = values.reshape(len(values), -1)[:, -1]
        if np.isfinite(values).any():
            middle = float(np.median(values[np.isfinite(values)]))
            self._median = {self.judged: f"{middle:.3g}"}
        self._show()

    def done(self, members: np.ndarray, diverged: int) -> None:
        """Note computed members, and count those of them that diverged."""
        self.ran.update(members.tolist())
        self._diverged += diverged
        self._show()

    def _show(self) -> None:
        lost = {"diverged": self._diverged}
        self._bar.set_postfix(self._median | lost, refresh=False)


class Programs:
    """Compile the programs of a sweep, and cache the last one."""

    def __init__(self, traced: Callable[[int], Traced], mesh: Mesh, progress: Progress):
        """Store the function that traces a group's training, and the mesh."""
        self._traced, self._mesh, self._progress = traced, mesh, progress
        self._last: tuple[Any, Any] = None, None

    def devices(self, group: int) -> int:
        """The number of devices that run a group's members.

        It is 1 if the training calls back to this process or has a mesh of its own.
        """
        traced = self._traced(group)
        return 1 if traced.calls_back or traced.has_mesh else self._mesh.size

    def get(self, group: int, size: int, members: int) -> CompiledBatch:
        """The program of a group for a batch size, with at most `members` members.

        A training that calls back is not run for padding.
        """
        traced, mesh = self._traced(group), self._mesh
        if traced.calls_back:
            size = min(size, members)
        if self.devices(group) < mesh.size:
            mesh = Mesh(mesh.local_mesh.devices.flat[:1], mesh.axis_names)
        if self._last[0] != (group, size):
            self._last = None, None  # free its arrays
            self._progress.say(f"compiling for {size} at once")
            program = CompiledBatch(traced, mesh, size)
            self._progress.compiled(size, program.seconds)
            self._last = (group, size), program
        return self._last[1]


class Runner:
    """Runs tasks on the devices of a mesh, and stores their results."""

    def __init__(
        self,
        results: Results,
        groups: Sequence[Combination],
        shapes: Shapes,
        programs: Programs,
        progress: Progress,
        size: int,
        save_every: float,
        on_step: Callable[[Task], None] | None,
    ):
        """Store the programs, the results to fill, and the callback of each step."""
        self._results, self._groups, self._shapes = results, groups, shapes
        self._programs, self._progress, self._size = programs, progress, size
        self._save_every, self._on_step = save_every, on_step
        self._saves = shapes.stepped and results.keeps_carries
        self._blocks, self._bytes, self._kept = list[Block](), 0, time.perf_counter()
        self._raised = list[tuple[Task, str]]()
        # The last dispatched step: its tasks, its program, its outputs.
        self._pending: tuple[list[Task], CompiledBatch, list[Any]] | None = None

    def run(self, tasks: list[Task]) -> None:
        """Run the tasks.

        Raises:
          RuntimeError: the training raised an error, for all members.
        """
        self._tasks, began = tasks, time.perf_counter()
        compiled = self._progress.compile_seconds
        try:
            self._run_all()
        except BaseException:
            # A broadcast from here would not match those of the other processes.
            if jax.process_count() == 1:
                self._flush()
            raise
        self._flush()
        seconds = time.perf_counter() - began
        compiling = self._progress.compile_seconds - compiled
        self._progress.run_seconds = seconds - compiling
        self._flag()

    def _run_all(self) -> None:
        tasks, progress = self._tasks, self._progress
        while tasks and not progress.stopped:
            batch = _take(tasks, self._programs.devices(tasks[0].group))
            members = max(len(task.members) for task in batch)
            program = self._programs.get(batch[0].group, self._size, members)
            if progress.stopped:
                break
            self._run(batch, program)
            if not self._shapes.stepped and self._due(SECONDS_BETWEEN_APPENDS):
                if len(self._flush()):
                    tasks[:] = _beside_others(tasks, self._results.steps)
            if not tasks:
                self._settle()
        self._settle()

    def _run(self, batch: list[Task], program: CompiledBatch) -> None:
        begin, end, stepped = batch[0].begin, batch[0].end, self._shapes.stepped
        packed = [self._results.carry(t.members, begin) for t in batch if begin]
        if any(each is None for each in packed):  # others have continued them
            self._tasks[:0] = [t for task in batch for t in self._planned(task)]
            return

        # Devices without a task repeat the last one.
        def together(arrays: Sequence[Any]) -> np.ndarray:
            each = [
                x[t.lanes(program.size)] for x, t in zip(arrays, batch, strict=True)
            ]
            return np.concatenate(each + each[-1:] * (program.devices - len(each)))

        each = zip(*(task.numbers for task in batch), strict=True)
        numbers = [program.place(together(x)) for x in each]
        try:
            if begin:
                carry = program.resume(together(packed))
            else:
                carry = program.begin(numbers)
            for _ in range(begin, end):
                carry, outputs = program.step(carry, numbers)
                self._settle()
                self._pending = batch, program, outputs
                if self._progress.stopped or all(t.ended.all() for t in batch):
                    break
                if self._saves and self._due(self._save_every):
                    self._settle()
                    self._keep(batch, program, carry)
            if stepped:
                self._settle()
                self._keep(batch, program, carry)
        except jax.errors.JaxRuntimeError as error:
            if stepped:
                self._pending = None
            self._split(batch, in_one_line(error))

    def _settle(self) -> None:
        """Wait for the outputs of the last dispatched step."""
        if self._pending is None:
            return
        (batch, program, outputs), self._pending = self._pending, None
        try:
            rows = program.rows(outputs)
        except jax.errors.JaxRuntimeError as error:
            if self._shapes.stepped:
                raise
            return self._split(batch, in_one_line(error))
        for task, part in _parts(batch, program):
            self._hear(task, {name: x[part] for name, x in rows.items()})
            if not self._shapes.stepped:
                self._collect(task.block(False))

    def _hear(self, task: Task, rows: Rows) -> None:
        """Add a step to a task, and report it."""
        if task.ended.all():  # dispatched before that was known
            return
        task.add(rows, self._shapes.judged)
        self._progress.stepped(rows[self._shapes.judged])
        if self._on_step is not None:
            task.history.append(rows)
            self._on_step(task)

    def _collect(self, block: Block) -> None:
        """Collect the block of a finished task, to store it with others."""
        lost = (block.rows["diverged_at"] >= 0).any(-1)
        self._progress.done(block.members, int(lost.sum()))
        self._blocks.append(block)
        self._bytes += sum(x.nbytes for x in block.rows.values())

    def _keep(self, batch: list[Task], program: CompiledBatch, carry: Any) -> None:
        """Store the steps of a batch together with its carries."""
        packed = pack(carry) if self._saves else None
        for task, part in _parts(batch, program):
            self._keep_task(task, None if packed is None else packed[part])

    def _keep_task(self, task: Task, carry: np.ndarray | None) -> None:
        if task.rows:
            self._blocks.append(task.block(True, carry))
            self._flush()
            task.begin, task.rows = task.step, []
            if task.begin == task.end or task.ended.all():
                self._progress.done(task.members, int(task.ended.sum()))

    def _due(self, seconds: float) -> bool:
        """Whether it is time to store the collected blocks."""
        due = time.perf_counter() - self._kept >= seconds
        due |= self._bytes >= _BYTES_BETWEEN_APPENDS
        return bool(broadcast_from_process_0(due))

    def _flush(self) -> np.ndarray:
        """Store the collected blocks; return the members that others ran meanwhile."""
        blocks, self._blocks = self._blocks, []
        before = self._results.steps.copy()
        try:
            self._results.append(joined(blocks))
        except OSError:
            if len(blocks) < 2 or jax.process_count() > 1:
                raise
            for block in blocks:  # a full disk may have room for some
                self._results.append(block)
        self._bytes, self._kept = 0, time.perf_counter()
        new = np.maximum(self._results.steps - before, 0)
        for block in blocks:
            new[block.members] = 0
        self._progress.there(int(new.sum()))
        return np.flatnonzero(new)

    def _split(self, batch: list[Task], message: str) -> None:
        """Replace the tasks of a batch by their halves, to find the failing member."""
        self._tasks[:0] = [
            half for task in batch for half in self._halves(task, message)
        ]

    def _halves(self, task: Task, message: str) -> list[Task]:
        """Halve a task that raised; a single member is noted as raising instead.

        Raises:
          RuntimeError: the cause is not a member.
        """
        if jax.process_count() > 1 or "RESOURCE_EXHAUSTED" in message:
            raise RuntimeError(f"`train` raised {message[:300]}")
        if len(task.members) == 1:
            self._raised.append((task, message[:200]))
            return []
        halves = np.array_split(task.members, 2)
        return [t for half in halves for t in self._planned(task, half)]

    def _planned(self, task: Task, some: np.ndarray | None = None) -> list[Task]:
        """New tasks for a task's members, from their current steps."""
        some = task.members if some is None else some
        group = self._groups[task.group]
        return plan(self._results, task.group, group, some, task.end, len(some))

    def _flag(self) -> None:
        """Store members that raised as diverged, so that they do not run again."""
        if not self._raised:
            return
        (first, message), others = self._raised[0], len(self._raised) - 1
        numbers = zip(self._groups[first.group].numbers, first.numbers, strict=True)
        point = ", ".join(f"{name} {x[0]:.6g}" for name, x in numbers)
        more = f" and {others} others" if others else ""
        if not self._progress.computed:
            raise RuntimeError(f"`train` raised for {point}{more}: {message}")
        for task, _ in self._raised:
            begin = int(self._results.steps[task.members[0]])
            rows = {
                n: np.full((1, task.end - begin, *x.shape), missing(n, dtype), dtype)
                for n, x in self._shapes.outputs.items()
                for dtype in [file_dtype(x.dtype)]
            }
            rows["diverged_at"] = np.full((1, len(rows)), begin, "int32")
            block = Block(task.members, begin, np.full(1, task.end, "int32"), rows)
            self._collect(block)
            self._flush()
        warnings.warn(
            f"`train` raised for {point}{more}, flagged as diverged: {message}",
            stacklevel=2,
        )


def joined(blocks: Sequence[Block]) -> Block | None:
    """Join blocks of the same steps into one."""
    if not blocks:
        return None
    members, steps = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("members", "steps")
    )
    names = blocks[0].rows
    rows = {n: np.concatenate([block.rows[n] for block in blocks]) for n in names}
    return Block(members, blocks[0].begin, steps, rows, blocks[0].carry)


def _parts(batch: list[Task], program: CompiledBatch) -> list[tuple[Task, slice]]:
    """Each task, with the slice of its members among those of all devices."""
    return [
        (task, slice(i * program.size, i * program.size + len(task.members)))
        for i, task in enumerate(batch)
    ]


def _take(tasks: list[Task], devices: int) -> list[Task]:
    """Pop the next tasks to run side by side, at most one for each device."""

    def kind(task: Task) -> tuple[int, int, int]:
        return task.group, task.begin, task.end

    alike = itertools.takewhile(lambda t: kind(t) == kind(tasks[0]), tasks)
    batch = list(itertools.islice(alike, devices))
    del tasks[: len(batch)]
    return batch


def _beside_others(tasks: list[Task], steps: np.ndarray) -> list[Task]:
    """The remaining tasks in random order, since other calls compute the same sweep.

    So two calls rarely take the same batch, without communicating.
    """
    seed = int(broadcast_from_process_0(np.random.default_rng().integers(2**31)))
    left = [t for t in tasks if (steps[t.members] < t.end).any()]
    order = np.random.default_rng(seed).permutation(len(left))
    rank = {left[i].group: n for n, i in reversed(list(enumerate(order)))}
    return sorted((left[i] for i in order), key=lambda task: rank[task.group])


def finite(values: np.ndarray, axes: int = 1) -> np.ndarray:
    """Whether all values are finite, for each index of the leading axes."""
    return np.asarray(np.isfinite(values.reshape(*values.shape[:axes], -1)).all(-1))


@contextlib.contextmanager
def finish_batch_on_sigint(progress: Progress) -> Generator[None]:
    """Make the first Ctrl-C end the sweep after the current batch.

    Exceptions: several processes, since the others would wait for this one; a signal
    that the parent ignores, as a shell does for background jobs; and a handler that is
    not Python's, which could not be restored.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not main or jax.process_count() > 1 or before in (signal.SIG_IGN, None):
        yield
        return

    def stop(*_: Any) -> None:
        progress.stopped = True
        signal.signal(signal.SIGINT, before)  # the second one raises immediately

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

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
from jax_rmsprop.sweeps._members import Columns
from jax_rmsprop.sweeps._results import Block, Results, Shapes, missing
from jax_rmsprop.sweeps._training import Traced

# Finished blocks are collected and stored together, after this time or size.
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
      steps: the number of steps of each member so far.
      ended: which members have a judged output that is not finite.
      rows: the outputs of each step since the last save.
      history: the outputs of the `heard` steps of this call, if there is an `on_step`.
    """

    group: int
    members: np.ndarray
    begin: int
    end: int

    def __post_init__(self) -> None:
        """Start all members at `begin`."""
        self.steps = np.full(len(self.members), self.begin, "int32")
        self.ended = np.zeros(len(self.members), bool)
        self.rows, self.history, self.heard = list[Rows](), Rows(), 0

    @property
    def step(self) -> int:
        """The number of steps of the members that have not ended."""
        return self.begin + len(self.rows)

    @property
    def done(self) -> bool:
        """Whether no member has a step left to run."""
        return self.step == self.end or bool(self.ended.all())

    def lanes(self, size: int) -> np.ndarray:
        """The member in each lane of a batch; the last one fills the rest."""
        return self.members[np.minimum(np.arange(size), len(self.members) - 1)]

    def add(self, rows: Rows, judged: str) -> None:
        """Add the outputs of a step, and note which members it ends."""
        self.rows.append(rows)
        self.steps[~self.ended] = self.step
        self.ended |= ~finite(rows[judged])

    def block(self, stepped: bool, carry: np.ndarray | None) -> Block:
        """The outputs since the last save."""
        run = self.begin + np.arange(len(self.rows)) < self.steps[:, None]
        rows, first = dict[str, np.ndarray](), list[np.ndarray]()
        for name in self.rows[0]:
            values = np.stack([each[name] for each in self.rows], 1)
            if stepped:
                bad = run & ~finite(values, 2)
                values[~run] = missing(name, values.dtype)
            else:  # along the output's leading axis; a scalar has the index 0
                values = values[:, 0]
                bad = ~finite(values, min(2, values.ndim)).reshape(len(values), -1)
            rows[name] = values
            first.append(np.where(bad.any(1), self.begin + bad.argmax(1), -1))
        rows["diverged_at"] = np.stack(first, -1).astype("int32")
        steps = self.steps.copy()
        return Block(self.members, self.begin, self.step, steps, rows, carry)


def plan(
    results: Results, group: int, some: np.ndarray, end: int, size: int
) -> list[Task]:
    """Batch the members of a group that have steps left to run."""
    some = some[results.steps[some] < end]
    begun = some[results.steps[some] > 0]
    if len(begun):
        some = np.setdiff1d(some, begun[results.ended(begun)])
    tasks: list[Task] = []
    for begin in np.unique(results.steps[some])[::-1].tolist():  # first who has begun
        alike = some[results.steps[some] == begin]
        parts = np.split(alike, range(size, len(alike), size))
        tasks += [Task(group, members, begin, end) for members in parts]
    return tasks


class Progress:
    """Progress bar, counters and the stop flag.

    Attributes:
      bar: a tqdm.
      stopped: whether to end after the current step.
      ran: the numbers of the members that this call has run.
      judged: the name of the output to show.
      compile_seconds: time spent compiling.
      run_seconds: time spent running batches and storing their results.
    """

    def __init__(self, bar: Any):
        """Store the bar."""
        self.bar, self.stopped, self.judged, self.ran = bar, False, "", set[int]()
        self.compile_seconds, self.run_seconds = 0.0, 0.0
        self._diverged, self._median = 0, dict[str, str]()

    def compiled(self, size: int, seconds: float) -> None:
        """Add the seconds of a compilation, and show the batch size."""
        self.compile_seconds += seconds
        self.bar.set_description(f"{size} at once")
        self.bar.unpause()  # so that its rate leaves out compiling

    def stepped(self, judged: np.ndarray) -> None:
        """Count a step of some members, and show the median of their judged output."""
        self.bar.update(len(judged))
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
        self.bar.set_postfix(self._median | lost, refresh=False)


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
            self._progress.bar.set_description(f"compiling for {size} at once")
            program = CompiledBatch(traced, mesh, size)
            self._progress.compiled(size, program.seconds)
            self._last = (group, size), program
        return self._last[1]


@dataclasses.dataclass
class Runner:
    """Runs tasks on the devices of a mesh, and stores their results.

    Attributes:
      results: what to fill.
      numbers: the numeric hyperparameters of all members, in the programs' order.
      shapes: the shapes of a member's results.
      programs: the programs of all groups.
      progress: the bar and counters.
      size: the number of members that a device runs at once.
      save_every: the seconds between saves of members that have steps left.
      on_step: called after each step of a task.
    """

    results: Results
    numbers: Columns
    shapes: Shapes
    programs: Programs
    progress: Progress
    size: int
    save_every: float
    on_step: Callable[[Task], None] | None

    def __post_init__(self) -> None:
        """Begin without tasks."""
        self._saves = self.shapes.stepped and self.results.keeps_carries
        self._tasks, self._raised = list[Task](), list[tuple[int, str]]()
        self._blocks, self._bytes, self._kept = list[Block](), 0, time.perf_counter()
        self._error: BaseException | None = None
        # The last dispatched step: its tasks, its program, its outputs.
        self._pending: tuple[list[Task], CompiledBatch, list[Any]] | None = None

    def run(self, tasks: list[Task]) -> None:
        """Run the tasks.

        Raises:
          RuntimeError: the training raised an error, for all members.
        """
        self._tasks, began = tasks, time.perf_counter()
        compiled = self.progress.compile_seconds
        try:
            self._run_all()
        except BaseException:
            # A broadcast from here would not match those of the other processes.
            if jax.process_count() == 1:
                self._flush()
            raise
        self._flush()
        if self._error is not None:
            raise self._error
        compiling = self.progress.compile_seconds - compiled
        self.progress.run_seconds += time.perf_counter() - began - compiling
        self._flag()

    def _run_all(self) -> None:
        tasks = self._tasks
        while tasks and not self.progress.stopped:
            batch = _take(tasks, self.programs.devices(tasks[0].group))
            members = max(len(task.members) for task in batch)
            program = self.programs.get(batch[0].group, self.size, members)
            if self.progress.stopped:
                break
            self._run(batch, program)
            if self._due(SECONDS_BETWEEN_APPENDS) and self._flush():
                tasks[:] = _beside_others(tasks, self.results.steps)
            if not tasks:
                self._settle()
        self._settle()

    def _run(self, batch: list[Task], program: CompiledBatch) -> None:
        begin, end = batch[0].begin, batch[0].end
        # Devices without a task repeat the last one.
        every = [*batch, *batch[-1:] * (program.devices - len(batch))]
        members = [task.lanes(program.size) for task in every]
        packed: list[Any] = [self.results.carry(x, begin) for x in members if begin]
        if any(each is None for each in packed):  # others have continued them
            again = (self._planned(task, task.members) for task in batch)
            self._tasks[:0] = itertools.chain.from_iterable(again)
            return
        lanes = np.concatenate(members)
        numbers = [program.place(column[lanes]) for column in self.numbers.values()]
        try:
            if begin:
                carry = program.resume(np.concatenate(packed))
            else:
                carry = program.begin(numbers)
            for step in range(begin, end):
                carry, outputs = program.step(carry, numbers)
                if not self._settle() and step > begin:
                    return
                self._pending = batch, program, outputs
                if self.progress.stopped or all(task.done for task in batch):
                    break
                if self._saves and step + 1 < end and self._due(self.save_every):
                    if not self._settle(carry, save=True):
                        return
                    self._flush()
            if self.shapes.stepped:
                self._settle(carry, save=True)
        except jax.errors.JaxRuntimeError as error:
            if self._pending is not None and self._pending[0] is batch:
                self._pending = None
            self._split(batch, in_one_line(error))

    def _settle(self, carry: Any = None, save: bool = False) -> bool:
        """Wait for the outputs of the last dispatched step.

        Args:
          carry: the carry after it.
          save: whether to keep what members that have steps left have run.

        Returns:
          False if it raised an error, and its members are to run again.
        """
        if self._pending is None:
            return True
        (batch, program, outputs), self._pending = self._pending, None
        try:
            rows = program.rows(outputs)
        except jax.errors.JaxRuntimeError as error:
            self._split(batch, in_one_line(error))
            return False
        packed = pack(carry) if save and self._saves else None
        for i, task in enumerate(batch):
            part = slice(i * program.size, i * program.size + len(task.members))
            self._hear(task, {name: x[part] for name, x in rows.items()})
            if task.done or save:
                self._collect(task, None if packed is None else packed[part])
        return True

    def _hear(self, task: Task, rows: Rows) -> None:
        """Add a step to a task, and report it."""
        if task.ended.all():  # dispatched before that was known
            return
        task.add(rows, self.shapes.judged)
        self.progress.stepped(rows[self.shapes.judged])
        if self.on_step is None or self._error is not None:
            return
        for name, x in rows.items():
            if name not in task.history:
                shape = len(x), task.end - task.step + 1, *x.shape[1:]
                task.history[name] = np.empty(shape, x.dtype)
            task.history[name][:, task.heard] = x
        task.heard += 1
        try:
            self.on_step(task)
        except BaseException as error:  # end as at Ctrl-C, then raise it
            self._error, self.progress.stopped = error, True

    def _collect(self, task: Task, carry: np.ndarray | None) -> None:
        """Collect what a task has run since the last save, to store it with others."""
        if not task.rows:
            return
        block, lost = task.block(self.shapes.stepped, carry), task.ended
        if not self.shapes.stepped:
            lost = (block.rows["diverged_at"] >= 0).any(-1)
        if task.done:
            self.progress.done(task.members, int(lost.sum()))
        self._blocks.append(block)
        self._bytes += sum(x.nbytes for x in block.rows.values())
        self._bytes += 0 if carry is None else carry.nbytes
        task.begin, task.rows = task.step, []

    def _due(self, seconds: float) -> bool:
        """Whether it is time to store the collected blocks."""
        due = time.perf_counter() - self._kept >= seconds
        due |= self._bytes >= _BYTES_BETWEEN_APPENDS
        return bool(broadcast_from_process_0(due))

    def _flush(self) -> bool:
        """Store the collected blocks; return whether others ran members meanwhile."""
        blocks, self._blocks = self._blocks, []
        before = self.results.steps.copy()
        for alike in joinable(blocks) or [[]]:
            try:
                self.results.append(joined(alike))
            except OSError:
                if len(alike) < 2 or jax.process_count() > 1:
                    raise
                for block in alike:  # a full disk may have room for some
                    self.results.append(block)
        self._bytes, self._kept = 0, time.perf_counter()
        new = np.maximum(self.results.steps - before, 0)
        for block in blocks:
            new[block.members] = 0
        self.progress.bar.update(int(new.sum()))
        return bool(new.any())

    def _split(self, batch: list[Task], message: str) -> None:
        """Replace a task that raised by its halves, to find the failing member.

        Raises:
          RuntimeError: the cause is not a member.
        """
        # A training that calls back, and may raise, has one device.
        alone = len(batch) == 1 and jax.process_count() == 1
        if not alone or "RESOURCE_EXHAUSTED" in message:
            raise RuntimeError(f"`train` raised {message[:300]}")
        self._flush()  # they run from what is stored
        task = batch[0]
        if len(task.members) == 1:
            self._raised.append((int(task.members[0]), message[:200]))
            return
        halves = np.array_split(task.members, 2)
        self._tasks[:0] = [t for half in halves for t in self._planned(task, half)]

    def _planned(self, task: Task, some: np.ndarray) -> list[Task]:
        """New tasks for some members of a task, from their current steps."""
        return plan(self.results, task.group, some, task.end, self.size)

    def _flag(self) -> None:
        """Store members that raised as diverged, so that they do not run again."""
        if not self._raised:
            return
        (first, message), others = self._raised[0], len(self._raised) - 1
        point = ", ".join(f"{n} {x[first]:.6g}" for n, x in self.numbers.items())
        more = f" and {others} others" if others else ""
        if not self.progress.ran:
            raise RuntimeError(f"`train` raised for {point}{more}: {message}")
        for member, _ in self._raised:
            begin = int(self.results.steps[member])
            task = Task(0, np.array([member]), begin, begin + 1)
            row = {
                n: np.full((1, *x.shape), missing(n, dtype), dtype)
                for n, x in self.shapes.outputs.items()
                for dtype in [file_dtype(x.dtype)]
            }
            task.add(row, self.shapes.judged)
            block = task.block(self.shapes.stepped, None)
            block.rows["diverged_at"][:] = begin
            self.progress.done(task.members, 1)
            self._blocks.append(block)
            self._flush()
        text = f"`train` raised for {point}{more}, flagged as diverged: {message}"
        warnings.warn(text, stacklevel=2)


def joinable(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group blocks of the same steps, and of carries of one size."""
    groups = dict[Any, list[Block]]()
    for block in blocks:
        size = None if block.carry is None else block.carry.shape[1]
        groups.setdefault((block.begin, block.end, size), []).append(block)
    return list(groups.values())


def joined(blocks: Sequence[Block]) -> Block | None:
    """Join blocks of the same steps into one."""
    if not blocks:
        return None
    first = blocks[0]
    members, steps = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("members", "steps")
    )
    rows = {n: np.concatenate([block.rows[n] for block in blocks]) for n in first.rows}
    carries: list[Any] = [block.carry for block in blocks]
    carry = None if first.carry is None else np.concatenate(carries)
    return Block(members, first.begin, first.end, steps, rows, carry)


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

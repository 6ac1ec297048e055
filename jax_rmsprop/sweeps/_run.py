"""The loop over batches: what is missing, on which device, and how far it is."""

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

# Many small blocks are kept at once: those of so long, or so large.
SECONDS_BETWEEN_APPENDS = 1.0
_BYTES_BETWEEN_APPENDS = 10_000_000


@dataclasses.dataclass
class Task:
    """Members that one device runs side by side.

    Attributes:
      group: the number of their program.
      members: which they are.
      begin: how many steps they have where they were kept last.
      end: to which step they are run.
      numbers: their hyperparameters, in the program's order.
      steps: how many steps each has now.
      ended: whose judged output is not finite any more.
      rows: what each step has given since they were kept last.
      history: what each step has given in this call, if anybody hears of it.
    """

    group: int
    members: np.ndarray
    begin: int
    end: int
    numbers: list[np.ndarray]
    rows: list[Rows] = dataclasses.field(init=False, default_factory=list)
    history: list[Rows] = dataclasses.field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """All run, and have the steps that they begin with."""
        self.steps = np.full(len(self.members), self.begin, "int32")
        self.ended = np.zeros(len(self.members), bool)

    @property
    def step(self) -> int:
        """How many steps those have that have not ended."""
        return self.begin + len(self.rows)

    def lanes(self, size: int) -> np.ndarray:
        """Who is in each lane of a batch: the last one again and again."""
        return np.minimum(np.arange(size), len(self.members) - 1)

    def add(self, rows: Rows, judged: str) -> None:
        """Take what a step has given, for some the last one."""
        self.rows.append(rows)
        self.steps[~self.ended] = self.step
        self.ended |= ~finite(rows[judged])

    def block(self, stepped: bool, carry: np.ndarray | None = None) -> Block:
        """What there is since they were kept last."""
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
    """The batches of those members of a group that need to go on, or to begin."""
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
    """What a person sees of a sweep, and whether to end it.

    Attributes:
      stopped: whether to end after the step at hand.
      computed: members that this call has run.
      judged: the output that is shown.
      compile_seconds: spent compiling.
      run_seconds: spent running batches and keeping their results.
    """

    def __init__(self, bar: Any):
        """Take what shows it (a tqdm)."""
        self.stopped, self.computed, self.judged = False, 0, ""
        self.compile_seconds, self.run_seconds = 0.0, 0.0
        self._bar, self._diverged, self._median = bar, 0, dict[str, str]()

    def say(self, what: str) -> None:
        """Say what goes on."""
        self._bar.set_description(what)

    def compiled(self, size: int, seconds: float) -> None:
        """Say that a program is compiled."""
        self.compile_seconds += seconds
        self.say(f"{size} at once")
        self._bar.unpause()  # steps a second are those of the running

    def there(self, steps: int) -> None:
        """Count steps that nobody need compute any more."""
        self._bar.update(steps)

    def stepped(self, judged: np.ndarray) -> None:
        """Count a step of some members, and show their median of the judged output."""
        self._bar.update(len(judged))
        values = np.asarray(judged, float) if judged.dtype.kind != "c" else abs(judged)
        values = values.reshape(len(values), -1)[:, -1]
        if np.isfinite(values).any():
            middle = float(np.median(values[np.isfinite(values)]))
            self._median = {self.judged: f"{middle:.3g}"}
        self._show()

    def done(self, members: int, diverged: int) -> None:
        """Count members that have been computed, and how many of them diverged."""
        self.computed += members
        self._diverged += diverged
        self._show()

    def _show(self) -> None:
        lost = {"diverged": self._diverged}
        self._bar.set_postfix(self._median | lost, refresh=False)


class Programs:
    """The compiled programs of a sweep, of which the last one used stays."""

    def __init__(self, traced: Callable[[int], Traced], mesh: Mesh, progress: Progress):
        """Take what traces the training of a group."""
        self._traced, self._mesh, self._progress = traced, mesh, progress
        self._last: tuple[Any, Any] = None, None

    def devices(self, group: int) -> int:
        """How many devices run a group's members at once.

        Who calls back to this process, or places arrays by itself, has one.
        """
        traced = self._traced(group)
        return 1 if traced.calls_back or traced.has_mesh else self._mesh.size

    def get(self, group: int, size: int, members: int) -> CompiledBatch:
        """The program of a group for a batch size, and at most so many members.

        Who calls back is not computed again to fill a batch up.
        """
        traced, mesh = self._traced(group), self._mesh
        if traced.calls_back:
            size = min(size, members)
        if self.devices(group) < mesh.size:
            mesh = Mesh(mesh.local_mesh.devices.flat[:1], mesh.axis_names)
        if self._last[0] != (group, size):
            self._last = None, None  # its arrays make room
            self._progress.say(f"compiling for {size} at once")
            program = CompiledBatch(traced, mesh, size)
            self._progress.compiled(size, program.seconds)
            self._last = (group, size), program
        return self._last[1]


class Runner:
    """Runs tasks on the devices of a mesh, and keeps what they give."""

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
        """Take the programs, where the results go, and who hears of each step."""
        self._results, self._groups, self._shapes = results, groups, shapes
        self._programs, self._progress, self._size = programs, progress, size
        self._save_every, self._on_step = save_every, on_step
        self._saves = shapes.stepped and results.keeps_carries
        self._blocks, self._bytes, self._kept = list[Block](), 0, time.perf_counter()
        self._raised = list[tuple[Task, str]]()
        # The step that was begun last: of which tasks, by which program, its outputs.
        self._pending: tuple[list[Task], CompiledBatch, list[Any]] | None = None

    def run(self, tasks: list[Task]) -> None:
        """Run the tasks.

        Raises:
          RuntimeError: what runs raised an error, for all members.
        """
        self._tasks, began = tasks, time.perf_counter()
        compiled = self._progress.compile_seconds
        try:
            self._run_all()
        except BaseException:
            # What one of several processes would say now is no answer to the others.
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
        if any(each is None for each in packed):  # others have gone on with them
            self._tasks[:0] = [t for task in batch for t in self._planned(task)]
            return

        # Devices without a task of their own do the last one once more.
        def together(arrays: Sequence[Any]) -> np.ndarray:
            each = [
                x[t.lanes(program.size)] for x, t in zip(arrays, batch, strict=True)
            ]
            return np.concatenate(each + each[-1:] * (program.devices - len(each)))

        each = zip(*(task.numbers for task in batch), strict=True)
        numbers = [program.place(together(x)) for x in each]
        try:
            resumed = program.resume(together(packed)) if begin else None
            carry = program.begin(numbers) if resumed is None else resumed
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
        """Take the outputs of the step that was begun last."""
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
        """Take a step of a task, and tell of it."""
        if task.ended.all():  # it was begun before that was known
            return
        task.add(rows, self._shapes.judged)
        self._progress.stepped(rows[self._shapes.judged])
        if self._on_step is not None:
            task.history.append(rows)
            self._on_step(task)

    def _collect(self, block: Block) -> None:
        """Keep what is whole, by itself or with others."""
        lost = (block.rows["diverged_at"] >= 0).any(-1)
        self._progress.done(len(block.members), int(lost.sum()))
        self._blocks.append(block)
        self._bytes += sum(x.nbytes for x in block.rows.values())

    def _keep(self, batch: list[Task], program: CompiledBatch, carry: Any) -> None:
        """Keep the steps of a batch together with where it goes on from."""
        packed = pack(carry) if self._saves else None
        for task, part in _parts(batch, program):
            self._keep_task(task, None if packed is None else packed[part])

    def _keep_task(self, task: Task, carry: np.ndarray | None) -> None:
        if task.rows:
            self._blocks.append(task.block(True, carry))
            self._flush()
            task.begin, task.rows = task.step, []
            if task.begin == task.end or task.ended.all():
                self._progress.done(len(task.members), int(task.ended.sum()))

    def _due(self, seconds: float) -> bool:
        """Whether it is time to keep what there is."""
        due = time.perf_counter() - self._kept >= seconds
        due |= self._bytes >= _BYTES_BETWEEN_APPENDS
        return bool(broadcast_from_process_0(due))

    def _flush(self) -> np.ndarray:
        """Keep what there is; return which members others have run meanwhile."""
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
        """Run the two halves of a batch by themselves, to find who has raised."""
        self._tasks[:0] = [
            half for task in batch for half in self._halves(task, message)
        ]

    def _halves(self, task: Task, message: str) -> list[Task]:
        """Two halves of a task that has raised; none of a single member, which did.

        Raises:
          RuntimeError: it is no member that has raised.
        """
        if jax.process_count() > 1 or "RESOURCE_EXHAUSTED" in message:
            raise RuntimeError(f"`train` raised {message[:300]}")
        if len(task.members) == 1:
            self._raised.append((task, message[:200]))
            return []
        halves = np.array_split(task.members, 2)
        return [t for half in halves for t in self._planned(task, half)]

    def _planned(self, task: Task, some: np.ndarray | None = None) -> list[Task]:
        """A task's members, from where they are now."""
        some = task.members if some is None else some
        group = self._groups[task.group]
        return plan(self._results, task.group, group, some, task.end, len(some))

    def _flag(self) -> None:
        """Keep those that have raised as diverged, so that they are not run again."""
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
    """Blocks that begin and end alike as one."""
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
    """Each task, and where its members are among those of all devices."""
    return [
        (task, slice(i * program.size, i * program.size + len(task.members)))
        for i, task in enumerate(batch)
    ]


def _take(tasks: list[Task], devices: int) -> list[Task]:
    """Take the next tasks that run side by side, at most one for each device."""

    def kind(task: Task) -> tuple[int, int, int]:
        return task.group, task.begin, task.end

    alike = itertools.takewhile(lambda t: kind(t) == kind(tasks[0]), tasks)
    batch = list(itertools.islice(alike, devices))
    del tasks[: len(batch)]
    return batch


def _beside_others(tasks: list[Task], steps: np.ndarray) -> list[Task]:
    """What is left where others compute the same: in an order of its own.

    By chance two processes rarely take the same batch, and need not talk.
    """
    seed = int(broadcast_from_process_0(np.random.default_rng().integers(2**31)))
    left = [t for t in tasks if (steps[t.members] < t.end).any()]
    order = np.random.default_rng(seed).permutation(len(left))
    rank = {left[i].group: n for n, i in reversed(list(enumerate(order)))}
    return sorted((left[i] for i in order), key=lambda task: rank[task.group])


def finite(values: np.ndarray, axes: int = 1) -> np.ndarray:
    """Whether all is finite, for each index of the leading axes."""
    return np.asarray(np.isfinite(values.reshape(*values.shape[:axes], -1)).all(-1))


@contextlib.contextmanager
def finish_batch_on_sigint(progress: Progress) -> Generator[None]:
    """Let the first Ctrl-C within it end the sweep after the batch at hand.

    Not where others would wait for this process: there it just ends. Nor where a parent
    has switched the signal off, as a shell does for what it starts in the background;
    nor where the handler is not Python's, which could not be put back.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not main or jax.process_count() > 1 or before in (signal.SIG_IGN, None):
        yield
        return

    def stop(*_: Any) -> None:
        progress.stopped = True
        signal.signal(signal.SIGINT, before)  # the second one ends it at once

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

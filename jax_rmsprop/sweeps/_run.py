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
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop.sweeps._batch import (
    CompiledBatch,
    Rows,
    broadcast_from_process_0,
    file_dtype,
    on_host,
    pack,
)
from jax_rmsprop.sweeps._location import in_one_line
from jax_rmsprop.sweeps._members import Columns
from jax_rmsprop.sweeps._results import Begun, Block, Results, Shapes, missing
from jax_rmsprop.sweeps._training import Traced

# Many small blocks are kept at once: those of so long, or so large.
SECONDS_BETWEEN_APPENDS = 1.0
_BYTES_BETWEEN_APPENDS = 10_000_000


class Group(NamedTuple):
    """Members that share a program.

    Attributes:
      members: their numbers, ascending.
      numbers: their hyperparameters, by name in sorted order.
    """

    members: np.ndarray
    numbers: Columns


@dataclasses.dataclass
class Task:
    """Members that one device runs side by side.

    Attributes:
      group: the number of their program.
      begun: which they are, and the step from which they go on.
      end: the step to which.
      numbers: their hyperparameters, in the program's order.
      steps: how many steps each has now.
      ended: whose judged output is not finite any more.
      rows: what each step has given since they were kept last.
      history: what each step has given in this call, if anybody hears of it.
    """

    group: int
    begun: Begun
    end: int
    numbers: list[np.ndarray]
    steps: np.ndarray = dataclasses.field(init=False)
    ended: np.ndarray = dataclasses.field(init=False)
    rows: list[Rows] = dataclasses.field(init=False, default_factory=list)
    history: list[Rows] = dataclasses.field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """All run, and have the steps that they begin with."""
        self.steps = np.full(len(self.begun.members), self.begun.steps, "int32")
        self.ended = np.zeros(len(self.begun.members), bool)

    def filled_up(self, size: int) -> np.ndarray:
        """Who is in each lane of a batch: the last one again and again."""
        return np.minimum(np.arange(size), len(self.begun.members) - 1)

    def add(self, rows: Rows, step: int, judged: str) -> None:
        """Take what a step has given, for some the last one."""
        self.rows.append(rows)
        self.steps[~self.ended] = step + 1
        self.ended |= ~finite(rows[judged])

    def block(self, stepped: bool, carry: np.ndarray | None = None) -> Block:
        """What there is since they were kept last."""
        rows = {
            name: np.stack([r[name] for r in self.rows], 1) for name in self.rows[0]
        }
        first = []
        for values in rows.values():
            if not stepped:
                first.append(first_nonfinite(values[:, 0]))
                continue
            bad = ~finite(values, 2)
            bad &= self.begun.steps + np.arange(bad.shape[1]) < self.steps[:, None]
            at = np.where(bad.any(1), self.begun.steps + bad.argmax(1), -1)
            first.append(at.astype("int32"))
        rows["diverged_at"] = np.stack(first, -1)
        members, begin, slot, lanes = self.begun
        return Block(members, begin, self.steps.copy(), rows, carry, slot, lanes)

    def kept(self, block: Block) -> None:
        """Go on from what has been kept."""
        step = self.begun.steps + len(self.rows)
        self.begun = Begun(self.begun.members, step, block.slot, block.lanes)
        self.rows = []


def plan(
    results: Results, group: int, members: Group, some: np.ndarray, end: int, size: int
) -> list[Task]:
    """The batches of those members of a group that need to go on, or to begin."""
    fresh = some[results.steps[some] == 0]
    begun = [Begun(fresh, 0)] if len(fresh) else []
    tasks: list[Task] = []
    for each in [*begun, *results.begun(some, end)]:
        for start in range(0, len(each.members), size):
            part = slice(start, start + size)
            lanes = None if each.lanes is None else each.lanes[part]
            own = each._replace(members=each.members[part], lanes=lanes)
            at = np.searchsorted(members.members, own.members)
            numbers = [members.numbers[name][at] for name in sorted(members.numbers)]
            tasks.append(Task(group, own, end, numbers))
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

    def stepped(self, task: Task, judged: Any) -> None:
        """Count a step of some members, and show their median of the judged output."""
        self._bar.update(len(task.begun.members))
        values = np.asarray(judged, float) if judged.dtype.kind != "c" else abs(judged)
        values = values.reshape(len(values), -1)[:, -1]
        if np.isfinite(values).any():
            middle = float(np.median(values[np.isfinite(values)]))
            self._median = {self.judged: f"{middle:.3g}"}
        self._show()

    def _show(self) -> None:
        self._bar.set_postfix(
            self._median | {"diverged": self._diverged}, refresh=False
        )

    def done(self, blocks: Sequence[Block]) -> None:
        """Count members that have been computed, and of how many a number is lost."""
        for block in blocks:
            self.computed += len(block.members)
            self._diverged += int((block.rows["diverged_at"] >= 0).any(-1).sum())
        self._show()


class Keeper:
    """Collects what has been computed, and keeps it now and then."""

    def __init__(self, results: Results, progress: Progress):
        """Take where the results go."""
        self.results, self._progress = results, progress
        self._blocks: list[Block] = []
        self._bytes, self.last = 0, time.perf_counter()

    def add(self, blocks: Sequence[Block]) -> None:
        """Take the results of some batches."""
        self._blocks += blocks
        for block in blocks:
            self._bytes += sum(x.nbytes for x in block.rows.values())

    def due(self, seconds: float) -> bool:
        """Whether it is time to keep what there is."""
        due = time.perf_counter() - self.last >= seconds
        due |= self._bytes >= _BYTES_BETWEEN_APPENDS
        return bool(broadcast_from_process_0(due))

    def flush(self) -> np.ndarray:
        """Keep what there is; return which members others have run meanwhile."""
        blocks, self._blocks = self._blocks, []
        before = self.results.steps.copy()
        try:
            self.results.append(blocks)
        except OSError:
            if len(blocks) < 2 or jax.process_count() > 1:
                raise
            for block in blocks:  # a full disk may have room for some
                self.results.append([block])
        self._bytes, self.last = 0, time.perf_counter()
        new = np.maximum(self.results.steps - before, 0)
        for block in blocks:
            new[block.members] = 0
        self._progress.there(int(new.sum()))
        return np.flatnonzero(new)


class Programs:
    """The compiled programs of a sweep, of which the last one used stays."""

    def __init__(self, traced: Callable[[int], Traced], mesh: Mesh, progress: Progress):
        """Take what traces the training of a group."""
        self._traced, self._mesh, self._progress = traced, mesh, progress
        self._last: tuple[Any, CompiledBatch | None] = (), None

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
        which = group, size
        if self._last[0] != which:
            self._last = (), None  # its arrays make room
            self._progress.say(f"compiling for {size} at once")
            program = CompiledBatch(traced, mesh, size)
            self._progress.compiled(size, program.seconds)
            self._last = which, program
        assert self._last[1] is not None
        return self._last[1]


@dataclasses.dataclass
class Running:
    """Tasks at work, one on each device."""

    tasks: list[Task]
    program: CompiledBatch
    numbers: list[Any]
    failed: bool = False

    def parts(self) -> list[tuple[Task, slice]]:
        """Each task, and where its members are among those of all devices."""
        starts = range(0, len(self.tasks) * self.program.size, self.program.size)
        return [
            (task, slice(start, start + len(task.begun.members)))
            for task, start in zip(self.tasks, starts, strict=True)
        ]


class Runner:
    """Runs tasks on the devices of a mesh, and keeps what they give."""

    def __init__(
        self,
        results: Results,
        groups: Sequence[Group],
        shapes: Shapes,
        programs: Programs,
        progress: Progress,
        save_every: float,
        on_step: Callable[[Task], None] | None,
    ):
        """Take the programs, where the results go, and who hears of each step."""
        self._results, self._groups, self._shapes = results, groups, shapes
        self._programs, self._progress = programs, progress
        self._save_every = save_every
        self._saves = shapes.stepped and results.keeps_carries
        self._on_step = on_step
        self._keeper = Keeper(results, progress)
        self._pending: tuple[Running, int, list[Any]] | None = None
        self._raised: list[tuple[Task, str]] = []

    def run(self, tasks: list[Task], size: int) -> None:
        """Run the tasks, in batches of this size.

        Raises:
          RuntimeError: what runs raised an error, for all members.
        """
        progress, began = self._progress, time.perf_counter()
        compiled = progress.compile_seconds
        try:
            while tasks and not progress.stopped:
                batch = _take(tasks, self._programs.devices(tasks[0].group))
                members = max(len(task.begun.members) for task in batch)
                program = self._programs.get(batch[0].group, size, members)
                if progress.stopped:
                    break
                tasks[:0] = self._run(batch, program)
                if not self._shapes.stepped and self._keeper.due(
                    SECONDS_BETWEEN_APPENDS
                ):
                    if len(self._keeper.flush()):
                        tasks[:] = _beside_others(tasks, self._results.steps)
                if not tasks:
                    tasks += self._settle()
        except BaseException:
            # What one of several processes would say now is no answer to the others.
            if jax.process_count() == 1:
                self._keeper.flush()
            raise
        self._settle()
        self._keeper.flush()
        compiling = progress.compile_seconds - compiled
        progress.run_seconds = time.perf_counter() - began - compiling
        self._flag()

    def _run(self, batch: list[Task], program: CompiledBatch) -> list[Task]:
        """Run a batch; return what is to be run in its place, and of the one before."""
        again = self._settle() if self._shapes.stepped else []
        begin, end = batch[0].begun.steps, batch[0].end
        packed = [self._results.carry(task.begun) for task in batch if begin]
        if any(each is None for each in packed):  # others have gone on with them
            return again + [t for task in batch for t in self._planned(task)]
        # Devices without a task of their own do the last one once more.
        idle = program.devices - len(batch)
        each = [*batch, *[batch[-1]] * idle]
        lanes = [task.filled_up(program.size) for task in each]
        columns = zip(*(task.numbers for task in each), strict=True)
        numbers = [
            program.place(np.concatenate([x[i] for x, i in zip(c, lanes, strict=True)]))
            for c in columns
        ]
        running = Running(batch, program, numbers)
        try:
            if begin:
                packed += [packed[-1]] * idle
                pairs: Any = zip(packed, lanes, strict=True)
                carry = program.resume(np.concatenate([x[i] for x, i in pairs]))
            else:
                carry = program.begin(numbers)
            for step in range(begin, end):
                carry, outputs = program.step(carry, numbers)
                again += self._settle()
                if running.failed:
                    return again
                self._pending = running, step, outputs
                if self._progress.stopped or all(t.ended.all() for t in batch):
                    break
                if self._saves and self._keeper.due(self._save_every):
                    again += self._settle()
                    self._keep(running, carry)
        except jax.errors.JaxRuntimeError as error:
            if self._pending is not None and self._pending[0] is running:
                self._pending = None
            return again + self._split(running, error)
        if self._shapes.stepped:
            again += self._settle()
            if not running.failed:
                self._keep(running, carry)
                self._progress.computed += sum(len(t.begun.members) for t in batch)
        return again

    def _settle(self) -> list[Task]:
        """Take the outputs of the step that was begun last; what is to be run again."""
        if self._pending is None:
            return []
        (running, step, outputs), self._pending = self._pending, None
        try:
            rows = running.program.rows(outputs)
        except jax.errors.JaxRuntimeError as error:
            return self._split(running, error)
        for task, part in running.parts():
            self._hear(task, {name: x[part] for name, x in rows.items()}, step)
        if not self._shapes.stepped:
            blocks = [task.block(False) for task in running.tasks]
            self._progress.done(blocks)
            self._keeper.add(blocks)
        return []

    def _hear(self, task: Task, rows: Rows, step: int) -> None:
        """Take a step of a task, and tell of it."""
        if task.ended.all():  # it was begun before that was known
            return
        task.add(rows, step, self._shapes.judged)
        self._progress.stepped(task, rows[self._shapes.judged])
        if self._on_step is not None:
            task.history.append(rows)
            self._on_step(task)

    def _keep(self, running: Running, carry: list[Any]) -> None:
        """Keep the steps of a batch together with where it goes on from."""
        packed = None
        if self._saves:
            packed = pack([on_host(x) for x in carry])
        for task, part in running.parts():
            if not task.rows:
                continue
            block = task.block(True, None if packed is None else packed[part])
            self._keeper.add([block])
            self._keeper.flush()
            task.kept(block)

    def _split(self, running: Running, error: Exception) -> list[Task]:
        """Run the two halves of a batch by themselves, to find who has raised."""
        running.failed = True
        halves = [self._halves(task, in_one_line(error)) for task in running.tasks]
        return [half for each in halves for half in each]

    def _halves(self, task: Task, message: str) -> list[Task]:
        """Two halves of a task that has raised; none of a single member, which did.

        Raises:
          RuntimeError: it is no member that has raised.
        """
        if jax.process_count() > 1 or "RESOURCE_EXHAUSTED" in message:
            raise RuntimeError(f"`train` raised {message[:300]}")
        members = task.begun.members
        if len(members) == 1:
            self._raised.append((task, message[:200]))
            return []
        halves = np.array_split(members, 2)
        return [t for half in halves for t in self._planned(task, half)]

    def _planned(self, task: Task, some: np.ndarray | None = None) -> list[Task]:
        """A task's members, from where they are now."""
        some = task.begun.members if some is None else some
        group = self._groups[task.group]
        return plan(self._results, task.group, group, some, task.end, len(some))

    def _flag(self) -> None:
        """Keep those that have raised as diverged, so that they are not run again."""
        if not self._raised:
            return
        task, message = self._raised[0]
        others = len(self._raised) - 1
        numbers = self._groups[task.group].numbers
        at = np.searchsorted(self._groups[task.group].members, task.begun.members)
        point = ", ".join(f"{n} {x[at[0]]:.6g}" for n, x in numbers.items())
        more = f" and {others} others" if others else ""
        if not self._progress.computed:
            raise RuntimeError(f"`train` raised for {point}{more}: {message}")
        for task, _ in self._raised:
            member = task.begun.members
            begin = int(self._results.steps[member[0]])
            rows = {
                name: np.full((1, task.end - begin, *x.shape), missing(dtype), dtype)
                for name, x in self._shapes.outputs.items()
                for dtype in [file_dtype(x.dtype)]
            }
            rows["diverged_at"] = np.full((1, len(rows)), begin, "int32")
            steps = np.full(1, task.end, "int32")
            block = Block(member, begin, steps, rows)
            self._progress.done([block])
            self._keeper.add([block])
        self._keeper.flush()
        warnings.warn(
            f"`train` raised for {point}{more}, flagged as diverged: {message}",
            stacklevel=2,
        )


def _take(tasks: list[Task], devices: int) -> list[Task]:
    """Take the next tasks that run side by side, at most one for each device."""

    def kind(task: Task) -> tuple[int, int, int]:
        return task.group, task.begun.steps, task.end

    alike = itertools.takewhile(lambda t: kind(t) == kind(tasks[0]), tasks)
    batch = list(itertools.islice(alike, devices))
    del tasks[: len(batch)]
    return batch


def _beside_others(tasks: list[Task], steps: np.ndarray) -> list[Task]:
    """What is left where others compute the same: in an order of its own.

    By chance two processes rarely take the same batch, and need not talk.
    """
    seed = int(broadcast_from_process_0(np.random.default_rng().integers(2**31)))
    left = [t for t in tasks if (steps[t.begun.members] < t.end).any()]
    order = np.random.default_rng(seed).permutation(len(left))
    rank = {left[i].group: n for n, i in reversed(list(enumerate(order)))}
    return sorted((left[i] for i in order), key=lambda task: rank[task.group])


def finite(values: np.ndarray, axes: int = 1) -> np.ndarray:
    """Whether all is finite, for each index of the leading axes."""
    return np.asarray(np.isfinite(values.reshape(*values.shape[:axes], -1)).all(-1))


def first_nonfinite(values: np.ndarray) -> np.ndarray:
    """For each member the first index that is not finite, along its leading axis.

    -1 where all is finite. A scalar has the index 0.
    """
    bad = ~finite(values, min(2, values.ndim)).reshape(len(values), -1)
    return np.where(bad.any(-1), bad.argmax(-1), -1).astype("int32")


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

"""The loop over batches: what is missing, on which device, and how far it is."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop._sweep._grid import Columns, Combination
from jax_rmsprop._sweep._program import (
    CompiledBatch,
    Rows,
    broadcast_from_process_0,
    replicate_consts,
)
from jax_rmsprop._sweep._table import Block, Memory, Store
from jax_rmsprop._sweep._trace import Traced

# Many small blocks are appended to a store at once: those of so long, or so large.
SECONDS_BETWEEN_APPENDS = 1.0
_BYTES_BETWEEN_APPENDS = 16_000_000


class Task(NamedTuple):
    """A batch of members that one device is to run.

    Attributes:
      combination: the number of their program.
      members: their numbers, at most a batch.
      numbers: their hyperparameters, in the program's order.
    """

    combination: int
    members: np.ndarray
    numbers: list[np.ndarray]

    def filled_up(self, size: int) -> list[np.ndarray]:
        """The hyperparameters of a whole batch: the last member again and again."""
        member_in_batch = np.minimum(np.arange(size), len(self.members) - 1)
        return [x[member_in_batch] for x in self.numbers]


class Progress:
    """What a person sees of a sweep, and whether to end it.

    Attributes:
      stopped: whether to end after the batch at hand.
      computed: members that this call has computed.
      compile_seconds: spent compiling.
      run_seconds: spent running batches and keeping their results.
    """

    def __init__(self, bar: Any):
        """Take what shows it (a tqdm)."""
        self.stopped, self.computed = False, 0
        self.compile_seconds, self.run_seconds = 0.0, 0.0
        self._bar, self._diverged = bar, 0

    def compiling(self, size: int) -> None:
        """Say that a program is compiled."""
        self._bar.set_description(f"compiling for {size} at once")

    def compiled(self, size: int, seconds: float) -> None:
        """Say that it is."""
        self.compile_seconds += seconds
        self._bar.set_description(f"{size} at once")
        self._bar.unpause()  # members a second are those of the running

    def there(self, members: int) -> None:
        """Count members that nobody need compute any more."""
        self._bar.update(members)

    def done(self, members: int, diverged: int) -> None:
        """Count members that have been computed, and of how many a number is lost."""
        self.computed += members
        self._diverged += diverged
        self._bar.set_postfix(diverged=self._diverged, refresh=False)


class Programs:
    """The compiled programs of a sweep, of which the last one used stays."""

    def __init__(self, traced: Sequence[Traced], mesh: Mesh, progress: Progress):
        """Take what can be compiled."""
        self.mesh = mesh
        self._traced, self._progress = traced, progress
        self._last: tuple[Any, CompiledBatch | None] = (), None

    def get(self, combination: int, size: int) -> CompiledBatch:
        """The program of a combination for a batch size."""
        which = combination, size
        if self._last[0] != which:
            self._progress.compiling(size)
            traced = replicate_consts(self._traced[combination], self.mesh)
            program = CompiledBatch(traced, self.mesh, size)
            self._progress.compiled(size, program.seconds)
            self._last = which, program
        assert self._last[1] is not None
        return self._last[1]


def split_missing(
    finished: np.ndarray,
    combinations: Sequence[Combination],
    number: np.ndarray,
    size: int,
) -> list[Task]:
    """The batches of members that are not there yet.

    Args:
      finished: which members are.
      combinations: the points by their programs.
      number: of each point, which member it is.
      size: of a batch.
    """
    tasks: list[Task] = []
    for i, combination in enumerate(combinations):
        members, first = np.unique(number[combination.members], return_index=True)
        missing = ~finished[members]
        members, first = members[missing], first[missing]
        numbers: Columns = {n: x[first] for n, x in combination.numbers.items()}
        for start in range(0, len(members), size):
            part = slice(start, start + size)
            values = [numbers[name][part] for name in sorted(numbers)]
            tasks.append(Task(i, members[part], values))
    return tasks


class Appender:
    """Collects what has been computed, and appends it to the table now and then."""

    def __init__(self, table: Memory | Store, progress: Progress):
        """Take where the results go."""
        self._table, self._progress = table, progress
        self._blocks: list[Block] = []
        self._bytes, self._last = 0, time.perf_counter()

    def add(self, blocks: Sequence[Block]) -> np.ndarray:
        """Take the results of some batches.

        Returns:
          Of the members, which others have computed meanwhile.
        """
        for block in blocks:
            diverged = 0 if block.rows is None else count_diverged(block.rows)
            self._progress.done(len(block.members), diverged)
        self._blocks += blocks
        for rows in (block.rows for block in blocks if block.rows is not None):
            self._bytes += sum(x.nbytes for x in rows.values())
        return self.refresh()

    def refresh(self) -> np.ndarray:
        """Append and look what others have appended, if that is due."""
        due = time.perf_counter() - self._last >= SECONDS_BETWEEN_APPENDS
        due |= self._bytes >= _BYTES_BETWEEN_APPENDS
        return self.flush() if broadcast_from_process_0(due) else np.array([], int)

    def flush(self) -> np.ndarray:
        """Append what there is; return which members others have computed."""
        blocks, self._blocks = self._blocks, []
        before = self._table.finished.copy()
        try:
            self._table.append(blocks)
        except OSError:
            if len(blocks) < 2 or jax.process_count() > 1:
                raise
            for block in blocks:  # a full disk may have room for some
                self._table.append([block])
        self._bytes, self._last = 0, time.perf_counter()
        new = self._table.finished & ~before
        self._progress.there(int(new.sum()))
        for members, _ in blocks:
            new[members] = False
        return np.flatnonzero(new)


def run_tasks(
    tasks: list[Task],
    size: int,
    programs: Programs,
    table: Memory | Store,
    progress: Progress,
) -> None:
    """Compute what is missing, a task on each device of all processes at a time."""
    mesh, appender = programs.mesh, Appender(table, progress)
    running: tuple[list[Task], CompiledBatch, list[jax.Array]] | None = None
    compiled, began = progress.compile_seconds, time.perf_counter()
    try:
        while tasks and not progress.stopped:
            batch = _take(tasks, mesh.size)
            program = programs.get(batch[0].combination, size)
            if progress.stopped:
                break
            # Devices without a task of their own do the last one once more.
            each = [*batch, *[batch[-1]] * (mesh.size - len(batch))]
            numbers = zip(*(task.filled_up(size) for task in each), strict=True)
            outputs = program([np.concatenate(x) for x in numbers])
            # While the devices are at work, what came before is kept.
            ready, running = running, (batch, program, outputs)
            if ready is not None:
                others = appender.add(_blocks(mesh, *ready))
                if len(others):
                    tasks = _beside_others(tasks, table.finished)
        if running is not None:
            appender.add(_blocks(mesh, *running))
    except BaseException:
        # What one of several processes would say now is no answer to the others.
        if jax.process_count() == 1:
            appender.flush()
        raise
    appender.flush()
    compiling = progress.compile_seconds - compiled
    progress.run_seconds = time.perf_counter() - began - compiling


def _take(tasks: list[Task], devices: int) -> list[Task]:
    """Take the next tasks of one program, at most one for each device."""
    count = 1
    while count < min(devices, len(tasks)):
        if tasks[count].combination != tasks[0].combination:
            break
        count += 1
    batch = tasks[:count]
    del tasks[:count]
    return batch


def _blocks(
    mesh: Mesh, batch: list[Task], program: CompiledBatch, outputs: list[jax.Array]
) -> list[Block]:
    """The results of a batch, of which this process has those of its devices."""
    rows = with_diverged_at(program.rows(outputs))
    blocks: list[Block] = []
    own = 0
    for task, device in zip(batch, mesh.devices.flat, strict=False):
        found: Rows | None = None
        if device.process_index == jax.process_index():
            start = own * program.size
            part = slice(start, start + len(task.members))
            found, own = {name: x[part] for name, x in rows.items()}, own + 1
        blocks.append(Block(task.members, found))
    return blocks


def _beside_others(tasks: list[Task], finished: np.ndarray) -> list[Task]:
    """What is left where others compute the same: in an order of its own.

    By chance two processes rarely take the same batch, and need not talk.
    """
    seed = int(broadcast_from_process_0(np.random.default_rng().integers(2**31)))
    left = [task for task in tasks if not finished[task.members].all()]
    order = np.random.default_rng(seed).permutation(len(left))
    rank = {left[i].combination: n for n, i in reversed(list(enumerate(order)))}
    return sorted((left[i] for i in order), key=lambda task: rank[task.combination])


def first_nonfinite(values: np.ndarray) -> np.ndarray:
    """For each member the first index that is not finite, along its leading axis.

    -1 where all is finite. A scalar has the index 0.
    """
    bad = ~np.isfinite(values.reshape(*values.shape[:2], -1)).all(-1)
    bad = bad.reshape(len(values), -1)
    return np.where(bad.any(-1), bad.argmax(-1), -1).astype("int32")


def with_diverged_at(rows: Rows) -> Rows:
    """The outputs of some members, and where each is not finite any more."""
    first = [first_nonfinite(values) for values in rows.values()]
    return rows | {"diverged_at": np.stack(first, -1)}


def count_diverged(rows: Rows) -> int:
    """Of how many members some number is not finite."""
    return int((rows["diverged_at"] >= 0).any(-1).sum())


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

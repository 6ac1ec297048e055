"""The loop over batches: how many members at once, what is missing, how far it is."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop._sweep._grid import Group
from jax_rmsprop._sweep._keep import Memory, Segment, Store
from jax_rmsprop._sweep._program import Program, Rows, agree, available, placed
from jax_rmsprop._sweep._trace import Traced, footprint

# Bytes of cache that a core of today's processors has for itself, about.
_CACHE = 4_000_000


class Run:
    """Runs one group of members after another, and counts.

    Attributes:
      stopped: whether to end after the batch at hand.
      compile_seconds: spent compiling.
      run_seconds: spent running batches and keeping their results.
    """

    def __init__(
        self, mesh: Mesh, kept: Memory | Store, batch_size: int | str, bar: Any
    ):
        """Take where the results go and what shows the progress (a tqdm)."""
        self.stopped, self.compile_seconds, self.run_seconds = False, 0.0, 0.0
        self._mesh, self._kept, self._bar = mesh, kept, bar
        self._batch_size = batch_size
        self._local = np.array(
            [
                slot
                for slot, device in enumerate(mesh.devices.flat)
                if device.process_index == jax.process_index()
            ]
        )
        self._memory = agree(float(available(mesh.local_mesh.devices.flat[0])))
        self._start = self._number = self._diverged = 0
        self._rates: dict[int, float] = {}
        self._last_compile = math.inf

    def group(self, group: Group, traced: Traced) -> None:
        """Compute what is missing of a group's members."""
        traced = placed(traced, self._mesh)
        offset, programs = self._start, dict[int, Program]()
        end = self._start + len(group.members)
        numbers = [group.numbers[name] for name in sorted(group.numbers)]
        while self._start < end and not self.stopped:
            if self._number == len(self._kept.segments):
                size, members = self._next(traced, end - self._start, bool(programs))
                size = self._fitting(programs, traced, size)
                if self.stopped:
                    return
                stop = self._start + min(members, end - self._start)
                self._kept.begin(Segment(self._start, stop, size))
            segment = self._kept.segments[self._number]
            missing = self._kept.missing(self._number)
            if len(missing):
                program = self._program(programs, traced, segment.size)
                self._segment(segment, missing, program, numbers, offset)
            segment = self._kept.segments[self._number]
            if segment.rate is not None:
                self._rates[segment.size] = segment.rate
            self._start, self._number = segment.stop, self._number + 1

    def _next(self, traced: Traced, remaining: int, compiled: bool) -> tuple[int, int]:
        """The batch size of the next segment, and how many members it has."""
        if isinstance(self._batch_size, int):
            return self._batch_size, remaining
        devices = self._mesh.size
        if not self._rates:
            cpu = self._mesh.devices.flat[0].platform == "cpu"
            size = first(remaining, devices, footprint(traced) if cpu else 0)
            return size, size * devices
        size, members = choose(self._rates, remaining, devices, self._last_compile)
        if not compiled:  # nothing is compiled twice, but this group is new
            size = min(size, math.ceil(remaining / devices))
        return size, members

    def _fitting(self, programs: dict[int, Program], traced: Traced, size: int) -> int:
        """That size or, if "auto" finds it too big for the memory, a smaller one."""
        program = self._program(programs, traced, size)
        while self._batch_size == "auto" and size > 1:
            if not agree(program.bytes > 0.9 * self._memory):
                break
            self._rates[size] = math.inf
            size //= 2
            program = self._program(programs, traced, size)
        return size

    def _program(
        self, programs: dict[int, Program], traced: Traced, size: int
    ) -> Program:
        if size not in programs:
            self._bar.set_description(f"compiling for {size} at once")
            programs[size] = Program(traced, self._mesh, size)
            self.compile_seconds += programs[size].seconds
            self._last_compile = agree(programs[size].seconds)
            self._bar.set_description(f"{size} at once")
            self._bar.unpause()  # members per second are those of the running
        return programs[size]

    def _segment(
        self,
        segment: Segment,
        missing: np.ndarray,
        program: Program,
        numbers: list[np.ndarray],
        offset: int,
    ) -> None:
        """Compute the missing blocks of a segment, one on each device at a time."""
        devices, size = self._mesh.size, segment.size
        there = set(range(segment.blocks)) - set(missing.tolist())
        self._bar.update(sum(_length(segment.block(b)) for b in there))
        slot, lane = np.arange(devices), np.arange(size)
        began = time.perf_counter()
        for i in range(0, len(missing), devices):
            blocks = missing[i : i + devices]
            # What is short is filled up: the last block with its last member, the
            # last batch with its last block.
            slots = missing[np.minimum(i + slot, len(missing) - 1)]
            members = segment.start + slots[:, None] * size + lane
            members = np.minimum(members, segment.stop - 1).ravel() - offset
            rows = program([x[members] for x in numbers])
            rows["diverged_at"] = np.stack([first_bad(x) for x in rows.values()], -1)
            self._keep(segment, blocks, rows)
            self._bar.update(sum(_length(segment.block(b)) for b in blocks))
            if self.stopped:
                break
        seconds = time.perf_counter() - began
        self.run_seconds += seconds
        rounds = math.ceil(len(missing) / devices)
        if self._batch_size == "auto" and segment.rate is None and not self.stopped:
            self._kept.timed(self._number, float(agree(seconds / rounds / size)))

    def _keep(self, segment: Segment, blocks: np.ndarray, rows: Rows) -> None:
        """Keep the rows of this process' blocks, neighbours together."""
        slots = self._local[self._local < len(blocks)]
        if not len(slots):
            return
        mine = blocks[slots]
        edges = np.flatnonzero(np.diff(mine) != 1) + 1
        for run in np.split(np.arange(len(mine)), edges):
            where = slice(
                segment.block(int(mine[run[0]])).start,
                segment.block(int(mine[run[-1]])).stop,
            )
            begin = run[0] * segment.size
            part = {name: x[begin : begin + _length(where)] for name, x in rows.items()}
            self._kept.write(self._number, where, part)
            self._diverged += int((part["diverged_at"] >= 0).any(-1).sum())
        self._bar.set_postfix(diverged=self._diverged, refresh=False)


def first(members: int, devices: int, bytes_each: int) -> int:
    """The batch size to begin with, such that the last batch is nearly full.

    A power of two, at most 1024, for which the members' largest arrays together fit
    into a processor's cache: a network with its data is best at about eight, a linear
    regression at hundreds.

    Args:
      members: how many there are.
      devices: on which they run.
      bytes_each: of the largest array that a member has of its own; 0 for accelerators,
        which want all they can hold: the compiler says if that was too much.
    """
    size = 1024
    while size > 1 and size * bytes_each > _CACHE:
        size //= 2
    rounds = math.ceil(members / (size * devices))
    return math.ceil(members / (rounds * devices))


def choose(
    rates: Mapping[int, float], remaining: int, devices: int, compile_seconds: float
) -> tuple[int, int]:
    """The next segment's batch size and members: a trial, or all that remains.

    Another size, four times larger or smaller than the best so far, is tried where
    compiling it takes at most a twentieth of the time that is left, and on at most an
    eighth of the members.

    Args:
      rates: seconds a member on a device, by batch size, of what has run.
      remaining: members that are still to run.
      devices: on which they run.
      compile_seconds: how long the last compilation took.
    """
    best = min(rates, key=lambda size: rates[size])
    left = remaining * rates[best] / devices
    for size in (best * 4, max(1, best // 4)):
        members = max(size, best) * devices
        cheap = compile_seconds <= left / 20 and members <= remaining / 8
        if size not in rates and cheap:
            return size, members
    return best, remaining


def first_bad(values: np.ndarray) -> np.ndarray:
    """For each member the first index that is not finite, along its leading axis.

    -1 where all is finite. A scalar has the index 0.
    """
    bad = ~np.isfinite(values.reshape(*values.shape[:2], -1)).all(-1)
    bad = bad.reshape(len(values), -1)
    return np.where(bad.any(-1), bad.argmax(-1), -1).astype("int32")


@contextlib.contextmanager
def patient(run: Run) -> Generator[None]:
    """Let the first Ctrl-C within it end the run after the batch at hand.

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
        run.stopped = True
        signal.signal(signal.SIGINT, before)  # the second one ends it at once

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _length(where: slice) -> int:
    return where.stop - where.start

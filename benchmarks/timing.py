"""Interleaved timing: alternatives take turns, so that a slow minute hits them all."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

import jax


def medians(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The median seconds of a call of each alternative.

    Args:
      alternatives: functions of no argument; what they return is waited for.
      rounds: how often each is called, after two rounds that don't count.
      before: called before each call, and not timed.
    """
    return medians_of(
        {name: timed(f, before) for name, f in alternatives.items()}, rounds, warm=2
    )


def timed(
    function: Callable[[], object], before: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """The function as one that returns its seconds; what it returns is waited for."""

    def seconds() -> float:
        before()
        began = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - began

    return seconds


def medians_of(
    alternatives: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1
) -> dict[str, float]:
    """The median of what each alternative returns, its seconds, in interleaved calls.

    The order is another one each time, since a call can disturb the one after it:
    PyTorch's threads, for one, go on spinning for a while. The first `warm` rounds
    don't count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    order, rng = list(alternatives), random.Random(0)
    for turn in range(warm + rounds):
        rng.shuffle(order)
        for name in order:
            took = alternatives[name]()
            if turn >= warm:
                seconds[name].append(took)
    return {name: statistics.median(s) for name, s in seconds.items()}


def table(title: str, rows: list[tuple[str, str, str]]) -> str:
    """A Markdown table of what was measured, the figure, and the goal."""
    lines = [f"### {title}", "", "| measured | figure | goal |", "|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def on_cpu() -> bool:
    """Tell whether a CPU is measured; a GPU needs more to do."""
    return (jax.config.jax_default_device or jax.devices()[0]).platform == "cpu"

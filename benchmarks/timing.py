"""Interleaved timing: alternatives take turns, so a slow minute affects all."""

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
      alternatives: functions without arguments; timing waits for their results.
      rounds: the number of calls of each, after two warm-up rounds.
      before: called before each call, untimed.
    """
    return medians_of(
        {name: timed(f, before) for name, f in alternatives.items()}, rounds, warm=2
    )


def timed(
    function: Callable[[], object], before: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """A function that returns the seconds until the result of `function` is ready."""

    def seconds() -> float:
        before()
        began = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - began

    return seconds


def medians_of(
    alternatives: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1
) -> dict[str, float]:
    """The median of the seconds that each alternative returns, in interleaved calls.

    The order changes every round, since a call can disturb the next one: PyTorch's
    threads, for example, keep spinning for a while. The first `warm` rounds do not
    count.
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
    """A Markdown table of measurements, figures and goals."""
    lines = [f"### {title}", "", "| measured | figure | goal |", "|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def on_cpu() -> bool:
    """Whether to measure a CPU; a GPU needs more work."""
    return (jax.config.jax_default_device or jax.devices()[0]).platform == "cpu"

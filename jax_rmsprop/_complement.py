"""1 - gamma where the program's floats cannot tell gamma from 1.

float32 has no number between 1 - 6e-8 and 1, and 1 - 0.999999 is off by 1% there. A
sweep, which knows its gammas as doubles, passes 1 - gamma beside such a gamma; what it
passes is found here by the array that it belongs to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from contextvars import ContextVar
from typing import Any

_known: ContextVar[tuple[Mapping[str, tuple[Any, Any]], set[str]]] = ContextVar(
    "known", default=({}, set())
)


def one_minus(x: Any) -> Any:
    """1 - x: as it is known, else as x's own type has it."""
    pairs, used = _known.get()
    for name, (number, complement) in pairs.items():
        if x is number:
            used.add(name)
            return complement
    return 1 - x


@contextlib.contextmanager
def known(pairs: Mapping[str, tuple[Any, Any]]) -> Generator[set[str]]:
    """Tell `one_minus`, within it, these numbers' complements, by name.

    Yields:
      The names of those that have been asked for.
    """
    used = set[str]()
    token = _known.set((pairs, used))
    try:
        yield used
    finally:
        _known.reset(token)

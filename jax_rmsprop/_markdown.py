"""A table that reads well as it is printed and is Markdown too."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Rows in columns of one width each, the first row as the header.

    Args:
      rows: as many cells in each.
      numbers: whether all columns but the first are numbers, which end in line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        align = str.rjust if numbers else str.ljust
        padded = [str.ljust(*first), *(align(cell, width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    header, *body = rows
    return "\n".join(map(line, [header, ["-" * width for width in widths], *body]))

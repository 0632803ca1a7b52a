"""Tables in plain text, for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence

from medjob.runtime.printable import printable


def text_table(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Align the cells of `rows` in columns that are two spaces apart.

    With `numbers`, every column but the first is aligned on the right, and trailing spaces are
    kept. All rows must have the same number of cells. Control characters are escaped, because a
    cell can hold a name from a store that others can write to.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            align_right = numbers and index > 0
            cells.append(cell.rjust(width) if align_right else cell.ljust(width))
        line = "  ".join(cells)
        lines.append(line if numbers else line.rstrip())
    return "\n".join(lines)

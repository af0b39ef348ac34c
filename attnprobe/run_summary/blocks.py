"""What is wider than a terminal, one part below the other."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from attnprobe.writers.columns import aligned
from attnprobe.writers.text import printable

#: Of a line without its indentation, which is at most four.
WIDTH = 160 - 4


def prose(text: str) -> list[str]:
    """The lines of a text, made safe to show; names in it are not broken."""
    return textwrap.wrap(
        printable(text), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ) or [""]


def blocks(names: Sequence[list[str]], columns: Sequence[list[str]]) -> Iterator[str]:
    """The lines of a table, out of columns that are padded already.

    Args:
        names: the columns that say what a row is; every part begins with them.
        columns: those that go to the next part where a line has no room for them.
    """
    least = sum(len(column[0]) + 2 for column in names)
    parts: list[list[list[str]]] = []
    room = 0
    for column in columns:
        room -= len(column[0]) + 2
        if room < 0:
            parts.append([])
            room = WIDTH + 2 - least - len(column[0]) - 2
        parts[-1].append(column)
    for part in parts:
        yield from aligned([*names, *part]).split("\n")

"""Cells of text in aligned columns."""

from __future__ import annotations

import math
from collections.abc import Iterable


def aligned(columns: Iterable[list[str]]) -> str:
    """The lines of a table, out of columns of one height whose cells are padded already."""
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def left(cells: list[str]) -> list[str]:
    width = max(map(len, cells), default=0)
    return [cell.ljust(width) for cell in cells]


def right(cells: list[str]) -> list[str]:
    width = max(map(len, cells), default=0)
    return [cell.rjust(width) for cell in cells]


def number(value: float | None) -> str:
    """Four significant digits; ``-`` for what was not measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"

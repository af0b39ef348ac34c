"""Results as rows of tables: what ran, the number, its target, and whether the number meets it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.timing import Spread


@dataclass(frozen=True)
class Row:
    """One number, or the reason why there is none.

    Attributes:
        name: what ran.
        detail: which statistics, or what a tool gave.
        value: the number; None where nothing was measured.
        unit: of the number; ``x`` is a ratio.
        target: what it should be at most, or at least.
        at_least: which of the two.
        seconds: median CPU seconds of one call.
        note: a remark, or why there is no number.
    """

    name: str
    detail: str = ""
    value: Spread | None = None
    unit: str = "x"
    target: float | None = None
    at_least: bool = False
    seconds: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without a number or a target."""
        if self.value is None or self.target is None:
            return None
        return self.value.median >= self.target if self.at_least else self.value.median <= self.target

    def cells(self) -> list[str]:
        value, spread, target = "—", "", ""
        if self.value is not None:
            value = f"{_number(self.value.median)} {self.unit}".strip()
            if not self.value.lower == self.value.median == self.value.upper:
                spread = f"{_number(self.value.lower)} – {_number(self.value.upper)}"
        if self.target is not None:
            target = f"{'≥' if self.at_least else '≤'} {self.target:g}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        if self.target is not None and self.value is None:
            met = "not measured"
        return [self.name, self.detail, value, spread, _seconds(self.seconds), target, met, self.note]

    def data(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


HEADER = ("what ran", "statistics", "median", "quartiles", "CPU time", "target", "met", "remark")


@dataclass(frozen=True)
class Section:
    """A table with its title and what has to be known to read it."""

    title: str
    about: str
    rows: Sequence[Row]
    header: Sequence[str] = HEADER
    images: Sequence[str] = field(default=())

    def markdown(self) -> str:
        """The section; columns without any entry are left out."""
        lines = [f"## {self.title}", ""] + [self.about, ""] * bool(self.about)
        cells = [row.cells() for row in self.rows]
        used = [index for index in range(len(self.header)) if any(row[index] for row in cells)]
        lines.append("| " + " | ".join(self.header[index] for index in used) + " |")
        lines.append("|" + "---|" * len(used))
        lines += ["| " + " | ".join(row[index].replace("|", "\\|") for index in used) + " |" for row in cells]
        for image in self.images:
            lines += ["", f"![{self.title}]({image})"]
        return "\n".join(lines) + "\n"

    def data(self) -> dict[str, Any]:
        return {"title": self.title, "rows": [row.data() for row in self.rows]}


def prepare() -> None:
    """One thread, the same random numbers, and no talk of other libraries."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"

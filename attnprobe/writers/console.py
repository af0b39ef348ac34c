"""Findings as they arrive, one line each, and a table of the heads."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from attnprobe.errors import UnknownNameError
from attnprobe.writers.base import positive
from attnprobe.writers.columns import aligned, left, number, right
from attnprobe.writers.text import printable

if TYPE_CHECKING:
    from attnprobe.report import StepReport

#: The columns of a table where none are named: where attention goes, whether it is stable, whether it learns.
COLUMNS = ("normalized_entropy", "max_logit", "sink_mass", "relative_advantage_std", "error_norm", "head_importance")


class ConsoleWriter:
    """Prints each alarm and warning once, when it first arrives, and why a probe is invalid.

    The probe itself warns about the same: with this writer, pass it ``action="record"``.

    Args:
        stream: standard error by default, so that a program's own output stays clean.
        table: print a table of the heads as well.
        every: print it for the first probe and for every ``every``-th after it.
        columns: the table's statistics; those that a report does not hold are left out.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        table: bool = False,
        every: int = 1,
        columns: Sequence[str] = COLUMNS,
    ) -> None:
        self.stream = stream
        self.table = table
        self.every = positive("every", every)
        self.columns = tuple(columns)
        self._probes = 0
        self._warned: set[str] = set()
        self._invalid = ""

    def write(self, report: StepReport) -> None:
        lines = [f"warning: {text}" for text in report.warnings if text not in self._warned]
        self._warned.update(report.warnings)
        if report.invalid and report.invalid != self._invalid:
            lines.append(f"not measured: {report.invalid}")
        self._invalid = report.invalid
        lines += [f"alarm {alarm}" for alarm in report.alarms if alarm.new]
        text = "".join(f"attnprobe: step {report.step}: {printable(line)}\n" for line in lines)
        if self.table and report.valid:
            names = [name for name in self.columns if name in report]
            if names and report.layers and self._probes % self.every == 0:
                text += f"attnprobe: step {report.step}\n{table(None, report, names)}\n"
            self._probes += 1
        if text:
            self._print(text)

    def close(self) -> None:
        """Nothing to release; the stream is the caller's."""

    def _print(self, text: str) -> None:
        # Looked up late, so that redirected or replaced standard streams are followed.
        stream = sys.stderr if self.stream is None else self.stream
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def table(first: StepReport | None, last: StepReport, names: Iterable[str]) -> str:
    """Every head of ``last`` with the statistics ``names``, as aligned text.

    A value reads ``first -> last``, or only ``last`` where ``first`` is None; ``-`` stands for what was not measured.

    Raises:
        UnknownNameError: neither report holds that statistic; the message lists what they hold.
    """
    before = {} if first is None else {(row["layer"], row["head"]): row for row in first.rows()}
    columns = [left(["layer", *(printable(row["layer"]) for row in last.rows())])]
    columns.append(right(["head", *(str(row["head"]) for row in last.rows())]))
    for name in names:
        if name not in last and (first is None or name not in first):
            raise UnknownNameError.among("statistic", name, {*last.statistics, *(first.statistics if first else ())})
        cells = right([number(row.get(name)) for row in last.rows()])
        if first is not None:
            starts = right([number(before.get((row["layer"], row["head"]), {}).get(name)) for row in last.rows()])
            cells = [f"{start} -> {cell}" for start, cell in zip(starts, cells, strict=True)]
        columns.append(right([printable(name), *cells]))
    return aligned(columns)

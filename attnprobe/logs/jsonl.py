"""Probes out of the lines of a JSONL file."""

from __future__ import annotations

from pathlib import Path

from attnprobe.errors import LogError
from attnprobe.logs.record import report_of
from attnprobe.report import StepReport
from attnprobe.writers.jsonl import parse_line

#: JSONLWriter's own spelling, also in a line that was torn; another file's lines need not be parsed.
_PROBE = b'"kind":"probe"'


def read_jsonl(path: Path) -> list[StepReport] | None:
    """The reports in the order written; None for a file that is not JSONLWriter's.

    An empty file is a log without reports: JSONLWriter leaves one where no step was probed.

    Raises:
        LogError: a line says that it is a probe's and is not; the message has its number.
    """
    reports, ours = [], path.stat().st_size == 0
    with path.open("rb") as file:
        # Line by line: what else lies beneath a run may be a data set of any size.
        for number, line in enumerate(file, 1):
            record = parse_line(line) if _PROBE in line else {}
            if record is not None and record.get("kind") != "probe":
                continue
            ours = True
            if record is not None:
                try:
                    reports.append(report_of(record))
                except LogError as error:
                    raise LogError(f"{path}, line {number}: {error}") from error
    return reports if ours else None

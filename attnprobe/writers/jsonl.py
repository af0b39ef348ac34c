"""One line of JSON per probe, readable with nothing but ``json``.

Keys of a line (schema 1): ``schema``, ``kind`` (``"probe"``), ``time`` (Unix seconds), ``step``, ``loss``, ``valid``,
``invalid``, ``layers``, ``heads``, ``statistics`` (name -> per layer a list of one number per head),
``layer_statistics`` (name -> one number per layer), ``standard_errors`` (of estimates, as the statistics; null for
a lower bound; empty where all is exact), ``residual`` (as a statistic, null where not measured),
``nonfinite`` (as statistics; only the kinds with a count above zero), ``warnings``, ``notes``, ``alarms``.
A number that is NaN is null; infinities are the strings ``"inf"`` and ``"-inf"``. Maps are not in it.
"""

from __future__ import annotations

import json
import os
import time
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprobe.errors import WriterError
from attnprobe.writers.base import writable_directory
from attnprobe.writers.strict_json import dumps

if TYPE_CHECKING:
    from torch import Tensor

    from attnprobe.report import StepReport

SCHEMA = 1
DEFAULT_NAME = "attention.jsonl"


class JSONLWriter:
    """Appends every report to a file, one line each.

    The file is opened for each line only: nothing is lost with a killed process, and the writer can be pickled.

    Args:
        path: a file that ends in ``.jsonl``, or a directory, in which it is ``attention.jsonl``. Created with its
            parents where missing; an existing file is continued.

    Raises:
        WriterError: the file cannot be written.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        wanted = Path(path).expanduser()
        name = wanted.name if wanted.suffix == ".jsonl" else DEFAULT_NAME
        self.path = writable_directory(wanted.parent if wanted.suffix == ".jsonl" else wanted) / name
        if self.path.is_dir():
            raise WriterError(f"cannot write to {self.path}: it is a directory; pass a file name inside it")
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise WriterError(f"cannot write to {self.path}: {error}; pass a file that may be written") from error

    def write(self, report: StepReport) -> None:
        line = dumps(to_dict(report)).encode("ascii") + b"\n"
        with self.path.open("a+b", buffering=0) as file:
            if _ends_torn(file):
                line = b"\n" + line
            written = file.write(line)
        if written != len(line):
            raise WriterError(f"only {written} of {len(line)} bytes could be written to {self.path}: is the disk full?")

    def close(self) -> None:
        """Nothing stays open between two lines."""


def to_dict(report: StepReport) -> dict[str, Any]:
    """The line that stands for ``report``, with numbers as they are."""

    def ragged(values: Tensor) -> list[list[float]]:
        return [row[:heads] for row, heads in zip(values.tolist(), report.heads, strict=True)]

    return {
        "schema": SCHEMA,
        "kind": "probe",
        "time": time.time(),
        "step": report.step,
        "loss": report.loss,
        "valid": report.valid,
        "invalid": report.invalid,
        "layers": report.layers,
        "heads": report.heads,
        "statistics": {name: ragged(values) for name, values in report.statistics.items()},
        "layer_statistics": report.layer,
        "standard_errors": {
            name: ragged(values) if name in report.statistics else values
            for name, values in report.standard_errors.items()
        },
        "residual": None if report.residual is None else ragged(report.residual),
        "nonfinite": {kind: ragged(counts) for kind, counts in report.nonfinite.items() if bool((counts > 0).any())},
        "warnings": report.warnings,
        "notes": report.notes,
        "alarms": [alarm.to_dict() for alarm in report.alarms],
    }


def read_jsonl(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file, or of a directory's ``attention.jsonl``, in the order written.

    Lines that a killed process left incomplete are left out: the last one, and those after which a run was resumed.

    Raises:
        WriterError: the file holds lines, but not one record.
    """
    file = Path(path).expanduser()
    file = file / DEFAULT_NAME if file.is_dir() else file
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    records = [record for record in map(parse_line, lines) if record is not None]
    if lines and not records:
        raise WriterError(f"{file} holds no JSON record in its {len(lines)} lines; pass a file written by JSONLWriter")
    return records


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None where a killed process left it incomplete."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _ends_torn(file: Any) -> bool:
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) != b"\n")

"""The logged runs of several places, each once."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from attnprobe.logs import read_run
from attnprobe.report import StepReport


def read_runs(places: Iterable[str | PathLike[str]]) -> dict[str, list[StepReport]]:
    """The reports of every log in or beneath the places, by the log's path.

    A log that two places lead to is one run: twice, it would vouch for its own thresholds.

    Raises:
        LogError: a place holds no log, or a log cannot be read.
    """
    found: dict[Path, tuple[str, list[StepReport]]] = {}
    for place in places:
        root = Path(place).expanduser()
        base = root.parent if root.is_file() else root
        for log, reports in read_run(root).items():
            found.setdefault((base / log).resolve(), ((base / log).as_posix(), reports))
    return dict(found.values())

"""All logs of a run, wherever beneath its directory they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from attnprobe.errors import LogError
from attnprobe.logs.jsonl import read_jsonl
from attnprobe.report import StepReport


def read_run(directory: str | PathLike[str]) -> dict[str, list[StepReport]]:
    """The reports of every log in or beneath ``directory``, by the log's path relative to it.

    A log is a JSONL file, or the event files of one directory. Event files hold float32 and neither standard errors
    nor maps, of invalid probes only the reason and the alarms, and warnings and notes where they changed: they are
    not read where a JSONL file beside them holds the run. Of a resumed run the superseded steps are left out.

    Args:
        directory: where a run was logged, or a ``.jsonl`` file.

    Raises:
        LogError: there is no such place, no log in it, or a log that cannot be read.
    """
    root = Path(directory).expanduser()
    if not root.exists():
        raise LogError(f"{root} does not exist; pass the directory that a run was logged to")
    try:
        if root.is_file():
            found = dict(_logs(root.parent, [root.name]))
        else:
            found = {path: log for place, _, files in os.walk(root) for path, log in _logs(Path(place), files)}
    except OSError as error:
        raise LogError(f"cannot read the logs in {root}: {error}") from error
    if not found:
        raise LogError(
            f"no log found in {root}: looked there and beneath for files of JSONLWriter (*.jsonl) and of "
            f"TensorBoardWriter (*tfevents*) with probes; pass the directory that a run was logged to"
        )
    base = root.parent if root.is_file() else root
    return {path.relative_to(base).as_posix(): _not_superseded(found[path]) for path in sorted(found)}


def _logs(directory: Path, names: Sequence[str]) -> Iterator[tuple[Path, list[StepReport]]]:
    """The logs of one directory: its JSONL files, and where none of them has a report its event files."""
    files = [path for name in names if (path := directory / name).is_file()]  # not a link that leads nowhere, or a pipe
    lines = {path: read_jsonl(path) for path in files if path.suffix == ".jsonl"}
    yield from ((path, reports) for path, reports in lines.items() if reports is not None)
    events = [path for path in files if "tfevents" in path.name]
    if events and not any(lines.values()):
        from attnprobe.logs.events import read_events  # TensorBoard takes a second to load

        if reports := read_events(events):
            yield directory, reports


def _not_superseded(reports: Iterable[StepReport]) -> list[StepReport]:
    """Without the steps that a run, resumed from an earlier checkpoint, took again."""
    kept: list[StepReport] = []
    for report in reports:
        while kept and kept[-1].step >= report.step:
            kept.pop()
        kept.append(report)
    return kept

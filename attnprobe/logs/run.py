"""All logs of a run, wherever beneath its directory they are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attnprobe.errors import AttnProbeWarning, LogError
from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.source import not_superseded

if TYPE_CHECKING:
    from attnprobe.logs.events import EventSource
    from attnprobe.report import StepReport

_Log = TypeVar("_Log")


def read_run(directory: str | PathLike[str]) -> dict[str, list[StepReport]]:
    """The reports of every log in or beneath ``directory``, by the log's path relative to it.

    A log is a JSONL file, or the event files of one directory. Event files hold float32 and neither standard errors
    nor values, of invalid probes only the reason and the alarms, and warnings and notes where they changed: they are
    not read where a JSONL file beside them holds the run. Of a resumed run the superseded steps are left out.

    Args:
        directory: where a run was logged, or a ``.jsonl`` file.

    Raises:
        LogError: there is no such place, no log in it, or a log that cannot be read.
    """
    return _every(directory, _reports)


def read_logs(directory: str | PathLike[str], *, pictures: bool = False) -> dict[str, LoggedRun]:
    """The same as arrays that are read when asked for.

    Args:
        directory: where a run was logged, or a ``.jsonl`` file.
        pictures: read event files, which may hold pictures, rather than a JSONL file of the same steps beside them.

    Raises:
        LogError: as ``read_run``.
    """

    def logs(place: Path, names: Sequence[str]) -> Iterator[tuple[Path, LoggedRun]]:
        return _logged(place, names, pictures)

    found = _every(directory, logs)
    for name, run in found.items():
        run.name = name
    return found


def load(directory: str | PathLike[str]) -> LoggedRun:
    """The one run that was logged in or beneath ``directory``, from JSONL or event files: the same numbers as arrays.

    ``run["entropy"]`` is ``[probes, layers, heads]``, ``run.steps`` ``[probes]``, ``run.to_frame()`` a table.

    Args:
        directory: where a run was logged, or a ``.jsonl`` file.

    Raises:
        LogError: there is no such place, no log in it, one that cannot be read, or more than one run.
    """
    found = read_logs(directory)
    some = {name: run for name, run in found.items() if len(run)} or found
    if len(some) > 1:
        raise LogError(
            f"{len(some)} runs are in {directory}: {', '.join(some)}; pass the directory or the .jsonl file of one, or "
            f"use attnprobe.logs.read_logs for all"
        )
    (run,) = some.values()
    return run


def _every(
    directory: str | PathLike[str], logs: Callable[[Path, Sequence[str]], Iterator[tuple[Path, _Log]]]
) -> dict[str, _Log]:
    root = Path(directory).expanduser()
    if not root.exists():
        raise LogError(f"{root} does not exist; pass the directory that a run was logged to")
    try:
        if root.is_file():
            found = dict(logs(root.parent, [root.name]))
        else:
            found = {path: log for place, _, files in os.walk(root) for path, log in logs(Path(place), files)}
    except OSError as error:
        raise LogError(f"cannot read the logs in {root}: {error}") from error
    if not found:
        raise LogError(
            f"no log found in {root}: looked there and beneath for files of JSONLWriter (*.jsonl) and of "
            f"TensorBoardWriter (*tfevents*) with probes; pass the directory that a run was logged to"
        )
    base = root.parent if root.is_file() else root
    return {path.relative_to(base).as_posix(): found[path] for path in sorted(found)}


def _reports(directory: Path, names: Sequence[str]) -> Iterator[tuple[Path, list[StepReport]]]:
    """The logs of one directory: its JSONL files, and where none of them has a report its event files."""
    lines = _lines(directory, names)
    yield from lines.items()
    if not any(lines.values()) and (events := _events(directory, names)):
        from attnprobe.logs.record import report_of

        reports = []
        for record in events.records():
            try:
                reports.append(report_of(record))
            except LogError as error:
                raise LogError(f"{directory}, step {record['step']}: {error}") from error
        yield directory, reports


def _logged(directory: Path, names: Sequence[str], pictures: bool) -> Iterator[tuple[Path, LoggedRun]]:
    from attnprobe.logs.reports import ReportSource

    lines = {path: LoggedRun("", ReportSource(reports)) for path, reports in _lines(directory, names).items()}
    events = _events(directory, names) if pictures or not any(map(len, lines.values())) else None
    if events:
        run = LoggedRun("", events)
        lines = {path: line for path, line in lines.items() if line.steps.tolist() != run.steps.tolist()}
        yield directory, run
    yield from lines.items()


def _lines(directory: Path, names: Sequence[str]) -> dict[Path, list[StepReport]]:
    from attnprobe.logs.jsonl import read_jsonl

    files = {path: read_jsonl(path) for path in _files(directory, names) if path.suffix == ".jsonl"}
    return {
        path: not_superseded(reports, lambda report: report.step)
        for path, reports in files.items()
        if reports is not None
    }


def _events(directory: Path, names: Sequence[str]) -> EventSource | None:
    """The event files of one directory; None where they hold no probe."""
    if not any("tfevents" in path.name for path in _files(directory, names)):
        return None
    from attnprobe.logs.events import EventSource  # TensorBoard takes a while to load

    source = EventSource(directory, verify=True)
    source.refresh()
    if source.refusals:
        raise LogError(source.refusals[0])
    for problem in source.problems:
        warnings.warn(problem, AttnProbeWarning, stacklevel=2)
    return source if source.probes else None


def _files(directory: Path, names: Sequence[str]) -> list[Path]:
    """Without links that lead nowhere, and pipes."""
    return [path for name in names if (path := directory / name).is_file()]

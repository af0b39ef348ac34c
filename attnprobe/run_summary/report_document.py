"""The JSON of ``attnprobe report --json``: plain values for ``writers.strict_json.dumps``.

Numbers are as in JSONL: NaN is null, infinities are ``"inf"`` and ``"-inf"``. ``{first, last}`` stands for an object
with these keys, ``[...]`` for a list of what is in it. The keys (schema 1) are ``schema``, ``kind`` (``"report"``) and
``logs``: name -> an object with

- ``probes``: their number; ``steps`` {first, last}, null where there is no probe;
- ``loss`` {first, last, min, max} of the probes that know it, null where none does;
- ``invalid`` [{step, reason}]: the probes that measured nothing trustworthy;
- ``warnings``, ``notes``, ``problems``: texts; ``problems`` are about what could not be read of the log;
- ``layers``: their names; ``heads``: the number of heads of each;
- ``alarms`` in the order raised, one that was cleared and raised again is two: [{name, severity, layer (``""`` for the
  run), heads (every one concerned), since, raised, last (steps), standing (at the last probe), peak, threshold,
  advice, evidence ([[step, value]] of the last probes), snoozed}];
- ``per_head``, every head, the worst first: [{layer, head, alarms, stands_out, measured, statistics}] with ``alarms``
  [{name, severity, standing}], ``stands_out`` {statistic, value, median, distance} at the last valid probe, null for a
  head like the others, ``measured`` (by any valid probe), and ``statistics``: name -> {first, last, min, max} of the
  valid probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnprobe.logs.logged import LoggedRun
from attnprobe.run_summary.course import Course, course, course_of, statistics_of
from attnprobe.run_summary.heads import worst_first

SCHEMA = 1


def report_document(runs: Mapping[str, LoggedRun]) -> dict[str, Any]:
    """What there is to know of each log; the keys are in the module's docstring."""
    return {"schema": SCHEMA, "kind": "report", "logs": {name: _log(run) for name, run in runs.items()}}


def _log(run: LoggedRun) -> dict[str, Any]:
    return {
        **course_document(run),
        "warnings": run.source.warnings,
        "notes": run.source.notes,
        "problems": run.source.problems,
        "layers": run.layers,
        "heads": run.heads,
        "alarms": [episode.to_dict() | {"peak": episode.peak.value} for episode in run.alarms],
        "per_head": _heads(run),
    }


def course_document(run: LoggedRun) -> dict[str, Any]:
    """``probes``, ``steps``, ``loss`` and ``invalid``."""
    steps = run.steps
    return {
        "probes": len(run),
        "steps": {"first": steps[0], "last": steps[-1]} if len(run) else {"first": None, "last": None},
        "loss": _numbers(course(run.loss), ()),
        "invalid": [{"step": step, "reason": reason} for step, reason in run.invalid.items()],
    }


def _numbers(found: Course, where: tuple[int, ...]) -> dict[str, float]:
    return {key: float(values[where]) for key, values in zip(("first", "last", "min", "max"), found, strict=True)}


def _heads(run: LoggedRun) -> list[dict[str, Any]]:
    courses = {name: course_of(run, name) for name in statistics_of(run)}
    return [
        {
            "layer": head.layer,
            "head": head.head,
            "alarms": [alarm._asdict() for alarm in head.alarms],
            "stands_out": head.stands_out and head.stands_out._asdict(),
            "measured": head.measured,
            "statistics": {name: _numbers(found, (head.row, head.head)) for name, found in courses.items()},
        }
        for head in worst_first(run)
    ]

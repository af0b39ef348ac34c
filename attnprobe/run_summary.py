"""What the reports of logged runs say, in text: probes, loss, and every alarm from when to when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from attnprobe.logs.episodes import Episode, Episodes
from attnprobe.report import Alarm, StepReport
from attnprobe.writers.columns import aligned, left, number, right
from attnprobe.writers.text import printable


def summarize(runs: Mapping[str, Sequence[StepReport]]) -> str:
    """The text of ``attnprobe report``: one section for each log.

    Args:
        runs: log -> its reports in the order of their steps, as ``logs.read_run`` gives them.
    """
    return "\n\n".join("\n".join([printable(name), *_section(reports)]) for name, reports in runs.items())


def _section(reports: Sequence[StepReport]) -> Iterator[str]:
    if not reports:
        yield "  no probes: nothing was logged yet, or the run ended before the first probed step"
        return
    yield f"  {_count(len(reports), 'probe')}, step {reports[0].step} to {reports[-1].step}; {_loss(reports)}"
    if invalid := [report for report in reports if not report.valid]:
        yield f"  {len(invalid)} of them invalid, the last at step {invalid[-1].step}: {printable(invalid[-1].invalid)}"
    found = Episodes(report.alarms for report in reports).found
    if not found:
        yield "  no alarms"
        return
    yield f"  {_count(len(found), 'alarm')}:"
    yield from (f"    {line}" for line in _table(found).split("\n"))
    if shown := [episode.last for episode in found if episode.last.evidence]:
        yield "  evidence, the last probes of each as step:value:"
        names = left([f"{printable(alarm.name)}, {_layer(alarm)}" for alarm in shown])
        yield from (f"    {name}  {_evidence(alarm)}" for name, alarm in zip(names, shown, strict=True))
    yield "  what to try:"
    last = [episode.last for episode in found]
    for name, alarms in groupby(sorted(last, key=lambda alarm: alarm.name), key=lambda alarm: alarm.name):
        yield f"    {printable(name)}: {printable([*alarms][-1].advice)}"


def _table(found: Sequence[Episode]) -> str:
    return aligned(
        [
            left(["alarm", *(printable(episode.last.name) for episode in found)]),
            left(["severity", *(printable(episode.last.severity) for episode in found)]),
            left(["layer", *(_layer(episode.last) for episode in found)]),
            left(["heads", *(_ranges(sorted(episode.heads)) for episode in found)]),
            right(["since", *(str(episode.first.since) for episode in found)]),
            right(["raised", *(str(episode.first.step) for episode in found)]),
            right(["last", *(str(episode.last.step) for episode in found)]),
            left(["at the end", *("stands" if episode.standing else "cleared" for episode in found)]),
            right(["peak", *(number(episode.peak.value) for episode in found)]),
            right(["threshold", *(number(episode.peak.threshold) for episode in found)]),
            left(["snoozed", *("yes" if episode.last.snoozed else "no" for episode in found)]),
        ]
    )


def _loss(reports: Sequence[StepReport]) -> str:
    known = [report for report in reports if not math.isnan(report.loss)]
    if not known:
        return "loss unknown"
    first, last = known[0], known[-1]
    return f"loss {number(first.loss)} (step {first.step}) -> {number(last.loss)} (step {last.step})"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _layer(alarm: Alarm) -> str:
    return printable(alarm.layer) or "run"


def _evidence(alarm: Alarm) -> str:
    return " ".join(f"{step}:{number(value)}" for step, value in alarm.evidence)


def _ranges(heads: Sequence[int]) -> str:
    """``0-2,5``: a model may have a hundred heads. ``-`` for an alarm about the layer or the run."""
    # Within a run of consecutive numbers the distance to the position is the same.
    runs = [[head for _, head in run] for _, run in groupby(enumerate(heads), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"

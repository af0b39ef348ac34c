"""The alarms of a run in text: from when to when, how bad, and what to try."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from attnprobe.logs.episodes import Episode
from attnprobe.report import Alarm
from attnprobe.run_summary.blocks import prose
from attnprobe.writers.columns import aligned, left, number, right
from attnprobe.writers.text import printable


def alarm_lines(found: Sequence[Episode]) -> Iterator[str]:
    """A table of every alarm, the last probes of each, and the advice of every rule once."""
    yield from (f"  {line}" for line in _table(found).split("\n"))
    if shown := [episode.last for episode in found if episode.last.evidence]:
        yield "evidence, the last probes of each as step:value:"
        names = left([f"{printable(alarm.name)}, {where(alarm.layer)}" for alarm in shown])
        yield from (f"  {name}  {_evidence(alarm)}" for name, alarm in zip(names, shown, strict=True))
    yield "what to try:"
    last = [episode.last for episode in found]
    for name, alarms in groupby(sorted(last, key=lambda alarm: alarm.name), key=lambda alarm: alarm.name):
        yield from (f"  {line}" for line in prose(f"{name}: {[*alarms][-1].advice}"))


def _table(found: Sequence[Episode]) -> str:
    return aligned(
        [
            left(["alarm", *(printable(episode.last.name) for episode in found)]),
            left(["severity", *(printable(episode.last.severity) for episode in found)]),
            left(["layer", *(where(episode.last.layer) for episode in found)]),
            left(["heads", *(ranges(episode.heads) for episode in found)]),
            right(["since", *(str(episode.first.since) for episode in found)]),
            right(["raised", *(str(episode.first.step) for episode in found)]),
            right(["last", *(str(episode.last.step) for episode in found)]),
            left(["at the end", *(at_the_end(episode.standing) for episode in found)]),
            right(["peak", *(number(episode.peak.value) for episode in found)]),
            right(["threshold", *(number(episode.peak.threshold) for episode in found)]),
            left(["snoozed", *("yes" if episode.last.snoozed else "no" for episode in found)]),
        ]
    )


def where(layer: str) -> str:
    """The layer's name; an alarm without one is about the run."""
    return printable(layer) or "run"


def at_the_end(standing: bool) -> str:
    return "stands" if standing else "cleared"


def ranges(heads: Iterable[int]) -> str:
    """``0-2,5``: a model may have a hundred heads. ``-`` for none: an alarm about the layer or the run."""
    # Within a run of consecutive numbers the distance to the position is the same.
    ordered = enumerate(sorted(heads))
    runs = [[head for _, head in run] for _, run in groupby(ordered, key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"


def _evidence(alarm: Alarm) -> str:
    return " ".join(f"{step}:{number(value)}" for step, value in alarm.evidence)

"""The heads of a run in text: why each deserves a look, and how it got there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from attnprobe.logs.logged import LoggedRun
from attnprobe.run_summary.alarm_table import ranges
from attnprobe.run_summary.blocks import blocks, prose
from attnprobe.run_summary.course import FALL, RISE, SAME, course_of, probes_of, trend
from attnprobe.run_summary.heads import PEERS, Head, HeadAlarm, worst_first
from attnprobe.writers.columns import aligned, left, number, right
from attnprobe.writers.console import COLUMNS
from attnprobe.writers.text import plural, printable

#: Alarms named in a row, and layers named in a line; of more there is only the number.
NAMED = 2
LAYERS = 5


def head_lines(run: LoggedRun, limit: int) -> Iterator[str]:
    """The table of heads, and what there is to know about it.

    Args:
        limit: show so many heads at most; 0 shows all.
    """
    probes, heads = probes_of(run), worst_first(run)
    if not any(head.measured for head in heads):
        yield f"nothing was measured of its {plural(len(heads), 'head')}"
        return
    shown = heads[: limit or None]
    yield f"{plural(len(heads), 'head')}, worst first: alarms that stand, alarms that were cleared, what stands out:"
    yield from (f"  {line}" for line in _reasons(shown).split("\n"))
    yield from rest(len(heads) - len(shown))
    if unknown := [head for head in heads if not head.measured]:
        yield from prose(f"nothing was measured of {_unknown(unknown)}")
    if any(head.stands_out for head in shown):
        yield from prose(
            f"distance: from the median of the layer's heads (of all heads, where fewer than {PEERS} of a layer were "
            f"measured) at step {run.steps[probes[-1]]}, in robust standard deviations (1.4826 MAD). To stand out is "
            f"not by itself a fault."
        )
    if names := [name for name in COLUMNS if name in run.statistics]:
        several = len(probes) > 1
        trends = f"from the first to the last measured value ({RISE} rose, {FALL} fell, {SAME} stayed):"
        yield trends if several else "values:"
        yield from (f"  {line}" for line in _courses(run, shown, names, several))


def rest(count: int) -> Iterator[str]:
    """What a table of heads leaves out."""
    if count:
        yield f"  and {count} more; --heads 0 shows all"


def named(rows: Sequence[tuple[str, int]]) -> list[list[str]]:
    """The columns that name a head, out of its layer and number."""
    return [
        left(["layer", *(printable(layer) for layer, _ in rows)]),
        right(["head", *(str(head) for _, head in rows)]),
    ]


def widths(distance: float) -> str:
    """A distance in widths of a ``spread``."""
    return f"{distance:.1f}" if distance < 1e5 else number(distance)


def _reasons(heads: Sequence[Head]) -> str:
    reasons = [head.stands_out for head in heads]
    names = [
        printable(reason.statistic) if reason else "-" if head.measured else "nothing measured"
        for head, reason in zip(heads, reasons, strict=True)
    ]
    return aligned(
        [
            *named([(head.layer, head.head) for head in heads]),
            left(["alarms", *(_alarms(head.alarms) for head in heads)]),
            left(["stands out by", *names]),
            right(["value", *(number(reason and reason.value) for reason in reasons)]),
            right(["median", *(number(reason and reason.median) for reason in reasons)]),
            right(["distance", *(widths(reason.distance) if reason else "-" for reason in reasons)]),
        ]
    )


def _alarms(alarms: Sequence[HeadAlarm]) -> str:
    texts = [printable(alarm.name) + " (cleared)" * (not alarm.standing) for alarm in alarms]
    more = len(texts) - NAMED
    return ", ".join([*texts[:NAMED], *([f"{more} more"] if more > 0 else [])]) or "-"


def _unknown(heads: Sequence[Head]) -> str:
    layers = groupby(sorted(heads, key=lambda head: (head.row, head.head)), key=lambda head: head.layer)
    texts = [f"{layer} {ranges(head.head for head in some)}" for layer, some in layers]
    more = [f"{plural(len(texts) - LAYERS, 'more layer')}"] if len(texts) > LAYERS else []
    return f"{plural(len(heads), 'head')}: {', '.join([*texts[:LAYERS], *more])}"


def _courses(run: LoggedRun, heads: Sequence[Head], names: Sequence[str], several: bool) -> Iterator[str]:
    columns = []
    for name in names:
        first, last, _, _ = course_of(run, name)
        where = [(head.row, head.head) for head in heads]
        cells = [trend(first[each] if several else math.nan, last[each]) for each in where]
        columns.append(right([name, *cells]))
    return blocks(named([(head.layer, head.head) for head in heads]), columns)

"""What the verdicts come to: rates with their intervals, as Markdown tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from attnprobe.calibrate.rate import upper_bound
from benchmarks.faults.accepted import ACCEPTED
from benchmarks.faults.injections import FAULTS, SEVERITIES
from benchmarks.faults.naive import NAIVE
from benchmarks.faults.study import MAIN, PROTOCOLS, Verdict


def rate(events: int, number: int) -> str:
    """``events`` of ``number``, and the upper end of the 95% interval (Clopper and Pearson)."""
    if not number:
        return "-"
    upper = upper_bound(events, number)
    return f"{events} of {number} (at most {100 * upper:.{1 if upper < 0.1 else 0}f}%)"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def false_alarms(healthy: Sequence[Verdict]) -> str:
    """Healthy runs with any alarm, under each protocol; by rule under the main one."""
    rows = []
    for protocol, name in PROTOCOLS.items():
        loud = [verdict for verdict in healthy if verdict.alarms[protocol]]
        named = Counter(alarm for verdict in loud for alarm in verdict.alarms[protocol])
        told = ", ".join(f"{alarm} {number}" for alarm, number in named.most_common()) or "none"
        rows.append((name, rate(len(loud), len(healthy)), told))
    return table(("a probe", "healthy runs with any alarm", "alarms"), rows)


def misses(faulty: Sequence[Verdict], protocol: tuple[int, bool] = MAIN) -> str:
    """By fault and severity: how many runs left the band, count, and were missed; how soon the alarm came."""
    rows = []
    for fault in FAULTS:
        for severity in SEVERITIES:
            cell = [v for v in faulty if (v.setup.fault, v.setup.severity) == (fault, severity)]
            if not cell:
                continue
            counted = [v for v in cell if v.counted]
            found = [(v, step) for v in counted if (step := v.found(protocol)) is not None]
            any_alarm = sum(bool(v.alarms[protocol]) for v in cell)
            missed = f"{len(counted) - len(found)} of {len(counted)}" if counted else "-"
            rows.append(
                (
                    fault,
                    severity,
                    len(cell),
                    sum(v.disturbed for v in cell),
                    any_alarm,
                    missed,
                    _median([step - v.start for v, step in found]),
                    _lead(found),
                )
            )
    head = ("fault", "severity", "runs", "loss ended above the band", "any alarm", "missed", "delay", "lead")
    return table(head, rows)


def totals(faulty: Sequence[Verdict]) -> str:
    """Counted runs that ended without an accepted alarm, by severity and protocol."""
    rows = []
    for protocol, name in PROTOCOLS.items():
        cells = []
        for severity in SEVERITIES:
            counted = [v for v in faulty if v.setup.severity == severity and v.counted]
            cells.append(rate(sum(not v.accepted(protocol) for v in counted), len(counted)))
        severe = [v for v in faulty if v.setup.severity == SEVERITIES[-1] and v.counted]
        right = sum(_first_is_right(v, protocol) for v in severe)
        rows.append((name, *cells, f"{right} of {len(severe)} ({100 * right / max(1, len(severe)):.0f}%)"))
    return table(("a probe", *(f"missed, {s}" for s in SEVERITIES), "severe: named right at first"), rows)


def confusion(faulty: Sequence[Verdict], protocol: tuple[int, bool] = MAIN) -> str:
    """Which alarm was named first, for the counted severe runs."""
    severe = [v for v in faulty if v.setup.severity == SEVERITIES[-1] and v.counted]
    names = list(dict.fromkeys(name for v in severe for name in [*v.alarms[protocol]][:1]))
    rows = []
    for fault in dict.fromkeys(v.setup.fault for v in severe):
        cell = [v for v in severe if v.setup.fault == fault]
        first = Counter(next(iter(v.alarms[protocol]), "none") for v in cell)
        rows.append((fault, *(_marked(first[name], name in ACCEPTED[fault].alarms) for name in [*names, "none"])))
    return table(("fault", *names, "none"), rows)


def comparison(healthy: Sequence[Verdict], faulty: Sequence[Verdict]) -> str:
    """The naive rules over the same runs; any firing after the injection counts for them."""
    severe = [v for v in faulty if v.setup.severity == SEVERITIES[-1] and v.counted]
    rows: list[tuple[str, str, str]] = []
    for name in NAIVE:
        rows.append(
            (name, rate(sum(name in v.naive for v in healthy), len(healthy)),
             rate(sum(name not in v.naive for v in severe), len(severe)))
        )  # fmt: skip
    rows.append(
        ("any of these", rate(sum(bool(v.naive) for v in healthy), len(healthy)),
         rate(sum(not v.naive for v in severe), len(severe)))
    )  # fmt: skip
    rows.append(
        ("attnprobe, an accepted alarm", rate(sum(bool(v.alarms[MAIN]) for v in healthy), len(healthy)),
         rate(sum(not v.accepted(MAIN) for v in severe), len(severe)))
    )  # fmt: skip
    return table(("rule", "healthy runs on which it fires", "severe faults on which it does not"), rows)


def _first_is_right(verdict: Verdict, protocol: tuple[int, bool]) -> bool:
    return next(iter(verdict.alarms[protocol]), "") in verdict.accepted(protocol)


def _marked(number: int, right: bool) -> str:
    return "" if not number else f"**{number}**" if right else str(number)


def _median(values: Sequence[int]) -> str:
    return f"{median(values):.0f}" if values else "-"


def _lead(found: Sequence[tuple[Verdict, int]]) -> str:
    """Median lead of alarms at these steps, and how many runs left the band.

    A run that stays in the band would leave it after its end if at all: to leave such runs out would keep those whose
    loss is quick. They count with the steps that were left, and the median of such bounds is a bound.
    """
    if not found:
        return "-"
    known = [v.left - step for v, step in found if v.left is not None]
    bounds = [v.setup.steps - step for v, step in found if v.left is None]
    middle = median(known + bounds)
    return f"{'≥ ' if min(bounds, default=math.inf) <= middle else ''}{middle:+.0f} ({len(known)} left)"

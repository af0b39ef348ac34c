"""What a calibration says, in text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from attnprobe.calibrate.calibration import Calibration
from attnprobe.calibrate.notes import informative, shown
from attnprobe.writers.columns import aligned, left, right
from attnprobe.writers.text import plural, printable


def summarize(calibration: Calibration) -> str:
    """The text of ``attnprobe calibrate``: thresholds, false alarms, and what to know."""
    return "\n".join(_lines(calibration))


def _lines(calibration: Calibration) -> Iterator[str]:
    least, most = min(calibration.probes.values()), max(calibration.probes.values())
    probes = f"{least}" if least == most else f"{least} to {most}"
    yield f"{plural(calibration.runs, 'run')} said to be healthy, {probes} probes each"
    yield ""
    yield _table(calibration)
    yield ""
    yield "critical: the tightest value at which none of the runs raises an alarm; -: none does however tight, and the"
    yield "default stays. runs: how many of them say anything about the threshold."
    yield ""
    yield from _false_alarms(calibration)
    yield "Whether these thresholds still find faults, healthy runs cannot tell."
    yield from (f"note: {printable(note)}" for note in calibration.notes)


def _table(calibration: Calibration) -> str:
    rows = [("rule", "field", "default", "critical", "calibrated", "runs")]
    for rule in calibration.rules:
        for each in rule.tunable:
            field, looser = each.field, each.looser
            known = informative(calibration.critical, rule.name, field)
            default = getattr(rule, field)
            rows.append(
                (
                    printable(rule.name),
                    printable(field),
                    shown(default),
                    shown(max(known, key=lambda value: looser * value, default=None)),
                    shown(calibration.thresholds.get(rule.name, {}).get(field, default)),
                    str(len(known)),
                )
            )
    names, fields, *numbers = ([*column] for column in zip(*rows, strict=True))
    return aligned([left(names), left(fields), *map(right, numbers)])


def _false_alarms(calibration: Calibration) -> Iterator[str]:
    runs, count, bound = calibration.runs, calibration.false_alarms, calibration.rate_bound
    if calibration.left_out is None or bound is None:
        yield "False alarms: of one run no rate can be given; pass more runs."
    else:
        yield (
            f"False alarms: {count} of {runs} healthy runs, each judged by thresholds from the others; with 95% "
            f"confidence at most {math.ceil(100 * bound)} in 100."
        )
        yield from _who(calibration.left_out)
    yield f"By the default thresholds: {calibration.default_false_alarms} of {runs}."
    yield from _who(calibration.by_default)


def _who(raised: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    yield from (f"  {printable(run)}: {', '.join(map(printable, names))}" for run, names in raised.items() if names)

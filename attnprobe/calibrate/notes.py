"""What to know before calibrated thresholds are used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attnprobe.alarms import AlarmRule
from attnprobe.calibrate.critical import Criticals
from attnprobe.calibrate.file import Thresholds
from attnprobe.report import StepReport
from attnprobe.writers.columns import number


def doubts(
    rules: Sequence[AlarmRule],
    runs: Mapping[str, Sequence[StepReport]],
    critical: Mapping[str, Criticals],
    by_default: Mapping[str, tuple[str, ...]],
) -> Iterator[str]:
    """Alarms that no threshold explains."""
    for run, names in by_default.items():
        # Those of the training too: that a loss was NaN, and not unknown, no log tells.
        told = {*names, *(alarm.name for report in runs[run] for alarm in report.alarms if alarm.severity == "alarm")}
        for name in (rule.name for rule in rules if not rule.tunable):
            if name in told:
                yield f"{run}: {name} raises an alarm and has no threshold to set; the run may not be healthy"
    for run, found in critical.items():
        for name, fields in found.items():
            for field, value in fields.items():
                if value is not None and math.isinf(value):
                    yield (
                        f"{run}: {name} raises an alarm at every {field} that was tried; the run may not be healthy, "
                        f"and did not count for this threshold"
                    )


def changes(rules: Iterable[AlarmRule], critical: Mapping[str, Criticals], thresholds: Thresholds) -> Iterator[str]:
    """Thresholds that find less than the default ones do, and those that find more on the word of a few runs."""
    for rule in rules:
        for each in rule.tunable:
            field, looser = each.field, each.looser
            default, value = getattr(rule, field), thresholds.get(rule.name, {}).get(field)
            if value is None:
                continue
            change = f"than the default, {shown(value)} instead of {shown(default)}"
            known = len(informative(critical, rule.name, field))
            if looser * (value - default) > 0:
                yield f"{rule.name}: {field} is looser {change}; faults between the two are no longer found"
            elif known < len(critical):
                yield f"{rule.name}: {field} is tighter {change}, and only {known} of {len(critical)} runs speak for it"


def informative(critical: Mapping[str, Criticals], rule: str, field: str) -> list[float]:
    """The critical values of the runs that say anything about a threshold."""
    values = [run[rule][field] for run in critical.values()]
    return [value for value in values if value is not None and math.isfinite(value)]


def shown(threshold: float | None) -> str:
    """Four digits, or as many as tell a share from 1; ``-`` for None."""
    return f"{threshold:.8g}" if threshold is not None and 0.999 < threshold < 1 else number(threshold)

"""How tight a threshold can be before a run raises an alarm by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnprobe.alarms import AlarmEngine, AlarmRule, Tunable
from attnprobe.errors import ConfigurationError
from attnprobe.report import StepReport

#: How far from the default, as a factor, a threshold is looked for.
REACH = 1e4
#: Factor within which it is found.
PRECISION = 1.005
#: Rule -> field -> value; see ``critical_values``.
Criticals = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Scale:
    """A threshold as a positive number that may be multiplied and stays within the bounds of its quantity.

    That number is the distance from the lower bound; where there is an upper one, the ratio of the distances from
    both: twice 0.001 is 0.002, and twice 0.999 is 0.9995.
    """

    least: float = 0.0
    largest: float = math.inf

    def size(self, value: float) -> float:
        over = value - self.least
        return over if self.largest == math.inf else over / (self.largest - value)

    def value(self, size: float) -> float:
        return self.least + (size if self.largest == math.inf else (self.largest - self.least) * size / (1 + size))


def scale_of(rule: AlarmRule, tunable: Tunable) -> Scale:
    """The scale of a tunable threshold.

    Raises:
        ConfigurationError: the rule's own value lies outside, so that nothing can be looked for around it.
    """
    low, high = tunable.low, tunable.high
    if not low < (value := getattr(rule, tunable.field)) < high:
        raise ConfigurationError(
            f"{rule.name}: {tunable.field}={value} must lie between {low:g} and {high:g} to be calibrated"
        )
    return Scale(low, high)


def raised(rules: Sequence[AlarmRule], reports: Sequence[StepReport], uninformed_loss: float | None) -> tuple[str, ...]:
    """Names of the rules that raise an alarm, not mere information, somewhere in a run; in the order of the rules."""
    engine = AlarmEngine(rules, uninformed_loss=uninformed_loss, strict=True)
    found = {alarm.name for report in reports for alarm in engine.update(report) if alarm.severity == "alarm"}
    return tuple(rule.name for rule in rules if rule.name in found)


def critical_values(
    rule: AlarmRule, reports: Sequence[StepReport], uninformed_loss: float | None
) -> dict[str, float | None]:
    """For each tunable field the tightest value at which the rule raises no alarm on the run, each field by itself.

    None: no alarm however tight, so the run says nothing about that field. An infinity of the loose sign (``+`` where
    larger values make fewer alarms): an alarm however loose.
    """
    # At their loosest the other fields raise nothing that would be blamed on this one.
    loosest = {each.field: scale_of(rule, each).value(_reach(rule, each, each.looser)) for each in rule.tunable}
    found: dict[str, float | None] = {}
    for each in rule.tunable:
        field, scale = each.field, scale_of(rule, each)

        def quiet(size: float, field: str = field, scale: Scale = scale) -> bool:
            tried = dataclasses.replace(rule, **(loosest | {field: scale.value(size)}))  # type: ignore[type-var]
            return _quiet(tried, reports, uninformed_loss)

        tight, loose = (_reach(rule, each, sign * each.looser) for sign in (-1, 1))
        if quiet(tight):
            found[field] = None
        elif not quiet(loose):
            found[field] = each.looser * math.inf
        else:
            while max(loose / tight, tight / loose) > PRECISION:
                middle = math.sqrt(tight * loose)
                tight, loose = (tight, middle) if quiet(middle) else (middle, loose)
            found[field] = scale.value(loose)
    return found


def loosened(rule: AlarmRule, criticals: Mapping[str, Sequence[float | None]], margin: float) -> dict[str, float]:
    """``{field: threshold}``: the loosest of the runs' critical values, ``margin`` times looser on the field's scale.

    A field about which no run says anything is left out, and one that less than half of them would tighten.
    """
    thresholds = {}
    for each in rule.tunable:
        scale, looser = scale_of(rule, each), each.looser
        known = [value for value in criticals[each.field] if value is not None and math.isfinite(value)]
        if known:
            worst = max(known, key=lambda value: looser * value)
            found = scale.value(scale.size(worst) * margin**looser)
            most_speak = 2 * len(known) >= len(criticals[each.field])
            if most_speak or looser * (found - getattr(rule, each.field)) >= 0:
                thresholds[each.field] = found
    return thresholds


def _quiet(rule: AlarmRule, reports: Sequence[StepReport], uninformed_loss: float | None) -> bool:
    engine = AlarmEngine([rule], uninformed_loss=uninformed_loss, strict=True)
    return not any(engine.update(report) for report in reports)  # ends at the first


def _reach(rule: AlarmRule, tunable: Tunable, direction: int) -> float:
    return scale_of(rule, tunable).size(getattr(rule, tunable.field)) * REACH**direction

"""How tight a threshold can be before a run raises an alarm by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnprobe.alarms import AlarmEngine, AlarmRule
from attnprobe.errors import ConfigurationError
from attnprobe.report import StepReport

#: How far from the default, as a factor, a threshold is looked for.
REACH = 1e4
#: Factor within which it is found.
PRECISION = 1.005
#: (rule, field) -> what its quantity lies between, where that is not zero and infinity.
BOUNDS = {
    ("attention_collapse", "spread"): (0.0, 1.0),
    ("dead_values", "always"): (0.0, 1.0),
    ("dead_values", "stalled"): (0.0, 1.0),
    ("diffuse_routing", "threshold"): (0.0, 1.0),
    ("inactive_head", "threshold"): (0.0, 1.0),
    ("redundant_heads", "threshold"): (0.0, 1.0),
    ("logit_growth", "threshold"): (1.0, math.inf),  # 1: it did not grow
    ("rank_collapse", "threshold"): (1.0, math.inf),  # no stable rank is smaller
}
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


def scale_of(rule: AlarmRule, field: str) -> Scale:
    """The scale of a tunable threshold.

    Raises:
        ConfigurationError: the rule's own value lies outside, so that nothing can be looked for around it.
    """
    scale = Scale(*BOUNDS.get((rule.name, field), ()))
    if not scale.least < (value := getattr(rule, field)) < scale.largest:
        raise ConfigurationError(
            f"{rule.name}: {field}={value} must lie between {scale.least:g} and {scale.largest:g} to be calibrated"
        )
    return scale


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
    scales = {field: scale_of(rule, field) for field, _ in rule.looser}
    # At their loosest the other fields raise nothing that would be blamed on this one.
    loosest = {field: scales[field].value(_reach(rule, field, scales, looser)) for field, looser in rule.looser}
    found: dict[str, float | None] = {}
    for field, looser in rule.looser:

        def quiet(size: float, field: str = field) -> bool:
            tried = dataclasses.replace(rule, **(loosest | {field: scales[field].value(size)}))  # type: ignore[type-var]
            return _quiet(tried, reports, uninformed_loss)

        tight, loose = (_reach(rule, field, scales, sign * looser) for sign in (-1, 1))
        if quiet(tight):
            found[field] = None
        elif not quiet(loose):
            found[field] = looser * math.inf
        else:
            while max(loose / tight, tight / loose) > PRECISION:
                middle = math.sqrt(tight * loose)
                tight, loose = (tight, middle) if quiet(middle) else (middle, loose)
            found[field] = scales[field].value(loose)
    return found


def loosened(rule: AlarmRule, criticals: Mapping[str, Sequence[float | None]], margin: float) -> dict[str, float]:
    """``{field: threshold}``: the loosest of the runs' critical values, ``margin`` times looser on the field's scale.

    A field about which no run says anything is left out.
    """
    thresholds = {}
    for field, looser in rule.looser:
        scale = scale_of(rule, field)
        known = [value for value in criticals[field] if value is not None and math.isfinite(value)]
        if known:
            worst = max(known, key=lambda value: looser * value)
            thresholds[field] = scale.value(scale.size(worst) * margin**looser)
    return thresholds


def _quiet(rule: AlarmRule, reports: Sequence[StepReport], uninformed_loss: float | None) -> bool:
    engine = AlarmEngine([rule], uninformed_loss=uninformed_loss, strict=True)
    return not any(engine.update(report) for report in reports)  # ends at the first


def _reach(rule: AlarmRule, field: str, scales: Mapping[str, Scale], direction: int) -> float:
    return scales[field].size(getattr(rule, field)) * REACH**direction

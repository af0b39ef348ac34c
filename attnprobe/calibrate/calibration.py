"""Thresholds from healthy runs, each run judged by those of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

from attnprobe.alarms import DEFAULT_ALARMS, AlarmRule, resolve
from attnprobe.calibrate.critical import Criticals, critical_values, loosened, raised
from attnprobe.calibrate.file import Thresholds, save, with_thresholds
from attnprobe.calibrate.notes import changes, doubts
from attnprobe.calibrate.rate import upper_bound
from attnprobe.errors import ConfigurationError
from attnprobe.report import StepReport


@dataclass(frozen=True)
class Calibration:
    """What healthy runs say about thresholds.

    Attributes:
        rules: as they were before, with the default thresholds.
        thresholds: rule -> field -> calibrated value; what no run says anything about is left out, the default stays.
        critical: run -> rule -> field -> the tightest value at which the rule raises no alarm on that run; None where
            it raises none however tight, an infinity where it raises one however loose.
        probes: run -> how many of its probes are valid.
        left_out: run -> the rules that raise an alarm on it by the thresholds from the other runs; None for one run.
        by_default: run -> the rules that raise an alarm on it by the default thresholds.
        notes: what to know before the thresholds are used.
    """

    rules: tuple[AlarmRule, ...]
    thresholds: Thresholds
    critical: Mapping[str, Criticals]
    probes: Mapping[str, int]
    left_out: Mapping[str, tuple[str, ...]] | None
    by_default: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def runs(self) -> int:
        return len(self.probes)

    @property
    def false_alarms(self) -> int | None:
        """Runs with an alarm by the thresholds from the others; None for one run."""
        return None if self.left_out is None else sum(map(bool, self.left_out.values()))

    @property
    def default_false_alarms(self) -> int:
        """Runs with an alarm by the default thresholds."""
        return sum(map(bool, self.by_default.values()))

    @property
    def rate_bound(self) -> float | None:
        """Upper end of the 95% interval of the share of healthy runs with an alarm; None for one run.

        As for independent judgements. Any two of these share the thresholds of the remaining runs, so it is a guide.
        """
        return None if self.false_alarms is None else upper_bound(self.false_alarms, self.runs)

    def save(self, path: str | PathLike[str]) -> None:
        """Write what ``load_alarms`` reads.

        Raises:
            WriterError: the file cannot be written.
        """
        about = {
            "runs": list(self.probes),
            "false_alarms": self.false_alarms,
            "false_alarms_by_default": self.default_false_alarms,
            "rate_bound": self.rate_bound,
        }
        save(path, self.thresholds, about)


def calibrate(
    runs: Mapping[str, Sequence[StepReport]],
    rules: AlarmRule | str | Iterable[AlarmRule | str] = DEFAULT_ALARMS,
    *,
    uninformed_loss: float | None = None,
    margin: float = 2.0,
) -> Calibration:
    """Set every tunable threshold (``AlarmRule.tunable``) from runs in which nothing was wrong.

    Args:
        runs: name -> reports in the order of their steps, as ``logs.read_run`` gives them.
        rules: as for ``AttentionProbe(alarms=)``; those with tunable thresholds are dataclasses.
        uninformed_loss: as for ``AttentionProbe``.
        margin: how many times looser than the loosest that a run needs. A quantity between 0 and 1 is loosened on the
            scale of its odds, one that cannot be below 1 by its distance from 1.

    Raises:
        ConfigurationError: no run has a valid probe, or an option cannot work.
    """
    if not 1 <= margin < math.inf:
        raise ConfigurationError(f"margin must be finite and at least 1, not {margin}")
    chosen = resolve(rules)
    probes = {name: sum(report.valid for report in reports) for name, reports in runs.items()}
    used = {name: reports for name, reports in runs.items() if probes[name]}
    if not used:
        raise ConfigurationError(f"none of the {len(runs)} runs has a valid probe; pass runs that were logged")
    critical: dict[str, Criticals] = {
        name: {rule.name: critical_values(rule, reports, uninformed_loss) for rule in chosen if rule.tunable}
        for name, reports in used.items()
    }

    def thresholds(names: Iterable[str]) -> Thresholds:
        known = [critical[name] for name in names]
        found = {
            rule.name: loosened(
                rule, {field.field: [each[rule.name][field.field] for each in known] for field in rule.tunable}, margin
            )
            for rule in chosen
            if rule.tunable
        }
        return {name: fields for name, fields in found.items() if fields}

    def judged(name: str, by: Thresholds) -> tuple[str, ...]:
        return raised(with_thresholds(chosen, by), used[name], uninformed_loss)

    left_out = {name: judged(name, thresholds(used.keys() - {name})) for name in used} if len(used) > 1 else None
    by_default = {name: judged(name, {}) for name in used}
    of_all = thresholds(used)
    empty = [f"{name}: no valid probe, left out" for name in runs if name not in used]
    notes = (*empty, *doubts(chosen, used, critical, by_default), *changes(chosen, critical, of_all))
    return Calibration(chosen, of_all, critical, {name: probes[name] for name in used}, left_out, by_default, notes)

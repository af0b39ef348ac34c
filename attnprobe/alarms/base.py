"""What an alarm rule is: it reads one report and says, layer by layer, whether its condition holds.

A rule of your own is a class with a name, advice and one method::

    @dataclass(frozen=True, kw_only=True)
    class SinkHeads(AlarmRule):
        name = "sink_heads"
        advice = "Look at the first token."
        needs = ("sink_mass",)
        threshold: float = 0.9
        patience: int = 3

        def readings(self, report, history):
            for layer, mass in head_values(report, report["sink_mass"]):
                yield above(layer, mass, self.threshold)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, Literal

from attnprobe.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from attnprobe.alarms.history import History
    from attnprobe.report import StepReport


@dataclass(frozen=True)
class Reading:
    """What a rule found in one layer (``""``: in the whole run) of one report.

    Attributes:
        layer, heads: where.
        value, threshold: the measured quantity and the bound that it is held against.
        firing: the condition holds: a streak starts or goes on.
        holding: the relaxed condition, which keeps a raised alarm standing (firing keeps it too).
        detail: what the alarm says in front of the rule's advice.
    """

    layer: str
    heads: tuple[int, ...]
    value: float
    threshold: float
    firing: bool
    holding: bool
    detail: str = ""


@dataclass(frozen=True)
class Tunable:
    """A threshold that may be set by healthy runs.

    Attributes:
        field: of the rule.
        looser: whether a larger (1) or a smaller value (-1) makes fewer alarms.
        low, high: what its quantity lies between.
    """

    field: str
    looser: Literal[1, -1]
    low: float = 0.0
    high: float = math.inf


class AlarmRule(ABC):
    """A condition on reports. Rules hold thresholds and no state: the engine counts, the history remembers.

    Attributes:
        name: unique among the rules of an engine.
        advice: what to try, with a source.
        needs: statistics that the rule reads; it is not asked about a report that lacks one.
        remembers: those whose past it reads, in ``history.past(name, layer, head)``.
        tunable: the thresholds that ``attnprobe calibrate`` may set.
        severity: ``"information"`` for what is worth knowing and nothing to act on.
        judges_invalid: whether it also reads reports that measured nothing trustworthy.
        single: whether one of its alarms, while it stands, keeps other layers from raising theirs.
        patience: consecutive probes that raise an alarm; as many without ``holding`` clear it.
        min_step: training step before which no alarm is raised.
    """

    name: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    remembers: ClassVar[tuple[str, ...]] = ()
    tunable: ClassVar[tuple[Tunable, ...]] = ()
    severity: ClassVar[Literal["alarm", "information"]] = "alarm"
    judges_invalid: ClassVar[bool] = False
    single: ClassVar[bool] = False
    patience: int = 1
    min_step: int = 0

    def __post_init__(self) -> None:
        """Of rules that are dataclasses: a threshold that is no number, or that its quantity cannot have.

        Raises:
            ConfigurationError: there is one.
        """
        for each in self.tunable:
            value = getattr(self, each.field)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not each.low <= value <= each.high:
                raise ConfigurationError(
                    f"{self.name}: {each.field} must be a number from {each.low:g} to {each.high:g}, not {value!r}"
                )

    @abstractmethod
    def readings(self, report: StepReport, history: History) -> Iterable[Reading]:
        """At most one reading per layer; none where a layer was not measured, which leaves its streak alone."""

    def missing(self, measured: Container[str]) -> tuple[str, ...]:
        """The statistics that this rule needs and ``measured`` lacks."""
        return tuple(name for name in self.needs if name not in measured)


def head_values(report: StepReport, values: Tensor) -> Iterator[tuple[str, dict[int, float]]]:
    """``(layer, {head: value})`` out of ``[L, H]``, without what was not measured (NaN)."""
    for layer, heads, row in zip(report.layers, report.heads, values.tolist(), strict=True):
        if measured := {head: value for head, value in enumerate(row[:heads]) if not math.isnan(value)}:
            yield layer, measured


def layer_values(report: StepReport, values: Tensor) -> Iterator[tuple[str, float]]:
    """``(layer, value)`` out of ``[L]``, without what was not measured (NaN)."""
    for layer, value in zip(report.layers, values.tolist(), strict=True):
        if not math.isnan(value):
            yield layer, value


def above(layer: str, values: dict[int, float], threshold: float, release: float = 0.8) -> Reading:
    """The reading of a rule by which no head may exceed ``threshold``; it holds down to ``release * threshold``."""
    high = tuple(head for head, value in values.items() if value > threshold)
    near = tuple(head for head, value in values.items() if value > release * threshold)
    return Reading(layer, high or near, max(values.values()), threshold, firing=bool(high), holding=bool(near))

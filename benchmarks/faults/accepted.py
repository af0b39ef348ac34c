"""Which alarms are right for which fault. Committed before the held-out runs are judged.

A fault counts by its injection where it is a mistake whatever the loss says (``INJECTED``), and by its outcome where
it is only one if the loss ends above the healthy twin's band (``DISTURBED``). Faults that need not disturb attention
are reported, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.faults.injections import SEVERITIES

INJECTED, DISTURBED, REPORTED = "injected", "disturbed", "reported"

_SCORES = frozenset({"logit_explosion", "logit_growth", "attention_collapse"})
_NO_ROUTING = frozenset({"diffuse_routing", "rank_collapse"})
_DIVERGED = _SCORES | _NO_ROUTING | {"value_explosion", "nonfinite", "dead_values", "redundant_heads", "stalled_layer"}
_SEVERE = SEVERITIES[-1:]


@dataclass(frozen=True)
class Answer:
    """The alarms that name a fault, when it counts, and at which severities."""

    alarms: frozenset[str]
    counts: str
    severities: tuple[str, ...] = SEVERITIES

    def due(self, severity: str, *, disturbed: bool) -> bool:
        """Whether one of the alarms has to be raised."""
        return severity in self.severities and (self.counts == INJECTED or (self.counts == DISTURBED and disturbed))


ACCEPTED: dict[str, Answer] = {
    "high learning rate": Answer(_DIVERGED, DISTURBED),
    "no warm-up": Answer(_DIVERGED, DISTURBED),
    "query/key growth": Answer(_SCORES, DISTURBED),
    "bf16 overflow": Answer(_SCORES | {"nonfinite"}, INJECTED),
    # A mild one doubles the values by the run's end, as healthy training does.
    "value growth": Answer(frozenset({"value_explosion"}), INJECTED, SEVERITIES[1:]),
    "dead columns": Answer(frozenset({"dead_values"}), INJECTED),
    "future leak": Answer(frozenset({"mask_violation"}), INJECTED),
    "padding attended": Answer(frozenset({"mask_violation"}), INJECTED),
    # The sequences that are left say where to look: at lower severities it is label noise.
    "uninformative inputs": Answer(_NO_ROUTING, DISTURBED, _SEVERE),
    "temperature": Answer(_NO_ROUTING, DISTURBED),
    "missing positions": Answer(_NO_ROUTING, DISTURBED),
    # Where only some are stuck, the others are enough to learn by.
    "stuck positions": Answer(_NO_ROUTING, DISTURBED, _SEVERE),
    "attention collapse": Answer(_SCORES | {"dead_values"}, DISTURBED),
    # MLPs alone can keep the tokens apart. Where they do not, heads become alike, and lower layers get no gradient.
    "rank collapse": Answer(_NO_ROUTING | {"redundant_heads", "inactive_head"}, DISTURBED, _SEVERE),
    "duplicated heads": Answer(frozenset({"redundant_heads"}), INJECTED),
    "zeroed output projection": Answer(frozenset({"inactive_head"}), INJECTED),
    # One frozen attention layer whose inputs learn is not disturbed, and moves with them.
    "frozen by accident": Answer(frozenset({"stalled_layer"}), INJECTED, SEVERITIES[1:]),
    "fully masked row": Answer(frozenset({"nonfinite"}), DISTURBED),
    "label noise": Answer(frozenset(), REPORTED),
    "bad batches": Answer(frozenset(), REPORTED),
}

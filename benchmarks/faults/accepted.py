"""Which alarms are right for which fault. Committed before the held-out runs are judged.

A fault counts by its injection where it is a mistake whatever the loss says (``INJECTED``), and by its outcome where
it is only one if the loss leaves the healthy twin's band (``DISTURBED``). Faults that need not disturb attention are
reported, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

INJECTED, DISTURBED, REPORTED = "injected", "disturbed", "reported"

_SCORES = frozenset({"logit_explosion", "logit_growth", "attention_collapse"})
_NO_ROUTING = frozenset({"diffuse_routing", "rank_collapse"})
_DIVERGED = _SCORES | {"value_explosion", "nonfinite", "rank_collapse"}


@dataclass(frozen=True)
class Answer:
    """The alarms that name a fault, and when it counts."""

    alarms: frozenset[str]
    counts: str


ACCEPTED: dict[str, Answer] = {
    "high learning rate": Answer(_DIVERGED, DISTURBED),
    "no warm-up": Answer(_DIVERGED, DISTURBED),
    "query/key growth": Answer(_SCORES, DISTURBED),
    "bf16 overflow": Answer(_SCORES | {"nonfinite"}, INJECTED),
    "value growth": Answer(frozenset({"value_explosion"}), INJECTED),
    "dead columns": Answer(frozenset({"dead_values"}), INJECTED),
    "future leak": Answer(frozenset({"mask_violation"}), INJECTED),
    "padding attended": Answer(frozenset({"mask_violation"}), INJECTED),
    "uninformative inputs": Answer(_NO_ROUTING, DISTURBED),
    "temperature": Answer(_NO_ROUTING, DISTURBED),
    "missing positions": Answer(_NO_ROUTING, DISTURBED),
    "attention collapse": Answer(_SCORES | {"dead_values"}, DISTURBED),
    "rank collapse": Answer(_NO_ROUTING, DISTURBED),
    "duplicated heads": Answer(frozenset({"redundant_heads"}), INJECTED),
    "zeroed output projection": Answer(frozenset({"inactive_head"}), INJECTED),
    "frozen by accident": Answer(frozenset({"stalled_layer"}), INJECTED),
    "fully masked row": Answer(frozenset({"nonfinite"}), DISTURBED),
    "label noise": Answer(frozenset(), REPORTED),
    "bad batches": Answer(frozenset(), REPORTED),
}

"""Attention where a mask should be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport

_FOUND = {
    "future_mass": "Queries read keys that come after them.",
    "padding_mass": "Real queries read padding.",
    "hidden_tokens": "Tokens that are real are hidden from all others.",
}
#: What a share is compared with where none at all is allowed.
_LEAST = sys.float_info.min


@dataclass(frozen=True, kw_only=True)
class MaskViolation(AlarmRule):
    """A head reads what it must not see, or must not see what it should.

    What is padding has to be said with ``probe.token_mask(mask)``; that a model is ``causal``, here. The value of the
    alarm is the largest share: of attention, or of hidden tokens.

    Attributes:
        causal: whether no query may read a later key.
        threshold: share of a query's attention above which it is a violation.
        hidden: share of hidden tokens above which it is one. Where documents are packed into one sequence, the last
            token of each is hidden rightly.
    """

    name = "mask_violation"
    advice = (
        "Compare the mask that the model builds with the one that you mean: boolean masks are True for visible in "
        "F.scaled_dot_product_attention and True for hidden in nn.MultiheadAttention (PyTorch documentation); a "
        "causal model that sees the future has a loss too good to be true (arXiv 1706.03762, section 3.2.3)."
    )
    needs = ("future_mass", "padding_mass", "hidden_tokens")

    causal: bool = False
    threshold: float = 1e-6
    hidden: float = 0.05
    patience: int = 1
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        names = [name for name in _FOUND if self.causal or name != "future_mass"]
        found = {name: dict(head_values(report, report[name])) for name in names}
        for layer in report.layers:
            shares = {name: layers[layer] for name, layers in found.items() if layer in layers}
            if not shares:
                continue
            bad = {
                name: high
                for name, values in shares.items()
                if (high := {head for head, value in values.items() if value > self._limit(name)})
            }
            worst = max(shares, key=lambda name: max(shares[name].values()) / (self._limit(name) or _LEAST))
            value, found_in = max(shares[worst].values()), tuple(sorted(set().union(*bad.values())))
            detail = " ".join(_FOUND[name] for name in bad)
            yield Reading(layer, found_in, value, self._limit(worst), bool(bad), bool(bad), detail)

    def _limit(self, name: str) -> float:
        return self.hidden if name == "hidden_tokens" else self.threshold

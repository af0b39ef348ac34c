"""NaN or Inf, traced to the place where it came first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport

RUN = ""


@dataclass(frozen=True, kw_only=True)
class NonFinite(AlarmRule):
    """Any NaN or Inf in what goes into attention, in the loss, or in the error that comes back.

    The alarm names the place that the others inherit from: the first layer with non-finite inputs; without one, the
    loss (layer ``""``); if that is finite too, the last layer with a non-finite error, which backward reaches first.
    Its value is how many elements are not finite.
    """

    name = "nonfinite"
    advice = (
        "Look at this batch and at the learning rate and gradient norm of the steps before; find the operation with "
        "torch.autograd.detect_anomaly (PyTorch documentation); instead of float16 use bfloat16 or loss scaling "
        "(arXiv 1710.03740); a fully masked row is NaN in an explicit softmax."
    )
    judges_invalid = True
    single = True  # one step later everything is NaN, and the first layer would get the blame

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        found = _found(report)
        fed = [layer for layer, kinds in found.items() if any(kinds[kind] for kind in kinds if kind != "error")]
        returned = [layer for layer, kinds in found.items() if kinds.get("error")]
        bad_losses = _bad_losses(report)
        origin = fed[0] if fed else RUN if bad_losses else returned[-1] if returned else None

        for layer, kinds in found.items():
            # An error is no finding of its own where the inputs were NaN already.
            bad = {kind: heads for kind, heads in kinds.items() if heads and (kind != "error" or layer not in fed)}
            heads = tuple(sorted({head for counts in bad.values() for head in counts}))
            value = float(sum(count for counts in bad.values() for count in counts.values()))
            yield Reading(layer, heads, value, 0.0, layer == origin, bool(bad), f"NaN or Inf in {', '.join(bad)}.")
        if bad_losses is not None:
            yield Reading(RUN, (), bad_losses, 0.0, origin == RUN, bad_losses > 0, "The loss is NaN or Inf.")


def _found(report: StepReport) -> dict[str, dict[str, dict[int, float]]]:
    """layer -> kind -> {head: how many}, only heads that have some; a layer that was not measured is left out."""
    found: dict[str, dict[str, dict[int, float]]] = {layer: {} for layer in report.layers}
    for kind, counts in report.nonfinite.items():
        if kind != "loss":
            for layer, values in head_values(report, counts):
                found[layer][kind] = {head: count for head, count in values.items() if count > 0}
    return {layer: kinds for layer, kinds in found.items() if kinds}


def _bad_losses(report: StepReport) -> float | None:
    """How many losses were not finite, None if unknown: a NaN loss alone may be one that nobody passed."""
    if "loss" in report.nonfinite:
        return float(report.nonfinite["loss"].sum().item())
    return None if math.isnan(report.loss) else float(math.isinf(report.loss))

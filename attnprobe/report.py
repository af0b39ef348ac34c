"""What one probed step found: plain values on the host, no graph, no device memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attnprobe.errors import UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Alarm:
    """A finding that deserves attention: which heads, since when, how bad, and what to try.

    Attributes:
        name: the rule that fired, for example ``"logit_explosion"``.
        layer: module name, or ``""`` for a finding about the whole run.
        heads: the heads concerned; empty where the finding is about the layer or the run.
        step: training step of this probe.
        since: first step of the unbroken series of probes in which the condition held.
        value: the measured quantity.
        threshold: the bound that it crossed.
        advice: what to try.
        new: False where an earlier probe raised the same alarm and it still stands.
        severity: ``"alarm"``, or ``"information"`` for what is worth knowing and nothing to act on.
        evidence: ``(step, value)`` of the last probes, the newest last.
        snoozed: whether ``AttentionProbe.snooze`` keeps it quiet; ``new`` is then False.
        reads: the statistics that the rule looks at, the decisive one first.
    """

    name: str
    layer: str
    heads: tuple[int, ...]
    step: int
    since: int
    value: float
    threshold: float
    advice: str
    new: bool = True
    severity: Literal["alarm", "information"] = "alarm"
    evidence: tuple[tuple[int, float], ...] = ()
    snoozed: bool = False
    reads: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = self.layer or "run"
        heads = f" head{'s' if len(self.heads) > 1 else ''} {', '.join(map(str, self.heads))}" if self.heads else ""
        before = ", ".join(f"{value:.4g}" for _, value in self.evidence[-4:-1])
        lately = f" (before: {before})" if before else ""
        return (
            f"{self.name}: {where}{heads}, step {self.step} (since {self.since}): "
            f"{self.value:.4g}{lately} against a threshold of {self.threshold:.4g}. {self.advice}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {
            "heads": list(self.heads),
            "evidence": [list(pair) for pair in self.evidence],
            "reads": list(self.reads),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alarm:
        evidence = tuple((int(step), float(value)) for step, value in data.get("evidence", ()))
        texts = {key: str(data[key]) for key in ("name", "layer", "advice")}
        tuples = {"heads": tuple(map(int, data["heads"])), "reads": tuple(map(str, data.get("reads", ())))}
        return cls(**{**data, **texts, **tuples, "evidence": evidence})


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Pictures of one head on the first sequence of the batch, pooled by block means.

    Attributes:
        layer, head: where.
        attention, compatibility, advantage: ``[rows, columns]``, at most 64 x 64. A pixel is the
            mean over the *visible* pairs of its block; NaN where no pair is visible.
            Compatibility and advantage are None in forward-only use.
        values: ``[n, E]`` value vectors of up to 1,000 keys, evenly spaced.
        positions: the keys' indices, ``n`` of them.
        usage: ``[columns]``, the attention that the keys of a column receive relative to uniform attention
            (``usage`` in ``docs/statistics.md``); NaN where no query sees them.
    """

    layer: str
    head: int
    attention: Tensor
    compatibility: Tensor | None
    advantage: Tensor | None
    values: Tensor
    positions: tuple[int, ...]
    usage: Tensor | None = None

    def panels(self) -> tuple[Tensor, ...]:
        """Attention, and where they are known compatibility and advantage."""
        return tuple(each for each in (self.attention, self.compatibility, self.advantage) if each is not None)


@dataclass(frozen=True, eq=False)
class StepReport:
    """All statistics of one probed step.

    Attributes:
        step: training step, counted as the training loop does.
        layers: module names of the attention calls in the order of first sight, ``L`` of them.
        heads: number of query heads of each layer; ``max(heads)`` is the reports' ``H``.
        statistics: name -> ``[L, H]`` float64 on the CPU, NaN where a layer has fewer heads or
            the value could not be measured.
        layer: name -> ``[L]`` for the layer-level statistics.
        standard_errors: where rows were sampled, name -> of the estimate: ``[L, H]``, or ``[L]`` for the layer level.
            NaN throughout means a maximum over the sampled rows, a lower bound. What is not in it is exact.
        residual: ``[L, H]``, rms of ``sum_j alpha_ij b_ij - u_i . o_i`` relative to
            rms|u| rms|o|: what the capture did not understand (NaN: could not be checked).
        nonfinite: ``"query" | "key" | "value" | "error"`` -> ``[L, H]``, how many elements were NaN or Inf;
            NaN where the tensor was not seen.
        loss: the step's loss, NaN where unknown.
        invalid: why this probe measured nothing trustworthy; ``""`` for a valid probe.
        warnings: what could not be captured, and why.
        notes: how to read the numbers (unknown padding, clean attention under dropout ...).
        maps: pictures of the heads chosen with ``maps=``.
        alarms: the alarms that stand after this probe.
    """

    step: int
    layers: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    layer: Mapping[str, Tensor] = field(default_factory=dict)
    standard_errors: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Tensor | None = None
    nonfinite: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float = math.nan
    invalid: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    maps: tuple[HeadMap, ...] = ()
    alarms: tuple[Alarm, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.invalid

    def __getitem__(self, name: str) -> Tensor:
        """The statistic ``name`` as a ``[layers, heads]`` tensor.

        Raises:
            UnknownNameError: this report does not hold that statistic; the message lists what it holds.
        """
        if name not in self.statistics:
            raise UnknownNameError.among("statistic", name, self.statistics)
        return self.statistics[name]

    def __contains__(self, name: str) -> bool:
        return name in self.statistics

    def rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per layer and head."""
        return [
            {"step": self.step, "layer": layer, "head": head}
            | {name: float(values[index, head]) for name, values in self.statistics.items()}
            for index, layer in enumerate(self.layers)
            for head in range(self.heads[index])
        ]

    def to_frame(self) -> Any:
        """One row per layer and head: a pandas DataFrame, or a list of dictionaries without pandas."""
        try:
            import pandas
        except ImportError:
            return self.rows()
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        """What a notebook shows where a cell ends with a report."""
        from attnprobe.writers.notebook import render

        return render(self)

"""Measured calls put together as the tensors of a report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnprobe.catalog import Statistic
from attnprobe.extent import Extent
from attnprobe.record import AttentionRecord
from attnprobe.report import HeadMap
from attnprobe.statistics.compiler import uncompiled
from attnprobe.statistics.reduce import Partial, combine, finish, finish_error, finish_residual, to_host

_PADDING = (
    "padding unknown: no mask for each sequence was seen, so every token that is seen counts; "
    "probe.token_mask(mask) says which are real"
)
_NOT_SELF = "statistics of position are NaN, and queries that are padding count"
#: Largest rms of sum alpha b - u.o, relative to rms|u| rms|o|, that rounding explains; TensorFloat-32 has 10 bits.
_RESIDUAL = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE = 1e-2


_EVERYTHING = Extent()


@dataclass
class Measured:
    """What is kept of one call: partial results, pictures, and how to read them."""

    partial: Partial
    heads: int
    tolerance: float
    maps: list[HeadMap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, record: AttentionRecord, partial: Partial, extent: Extent = _EVERYTHING) -> Measured:
        exact = record.value.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
        tolerance = _RESIDUAL.get(record.value.dtype, _COARSE) if exact else _COARSE
        return cls(partial, record.shape[1], tolerance, notes=_notes(record) + _sample_notes(record, extent))


def _notes(record: AttentionRecord) -> list[str]:
    """How the numbers of a call are to be read."""
    notes = []
    if record.dropout:
        which = "routing statistics are of the weights before dropout, gradient statistics of the weights as dropped"
        if record.kept is None:
            which = "statistics are those of the weights before dropout"
        notes.append(f"attention dropout {record.dropout:g}: {which}")
    if record.sink is not None:
        notes.append("a learned sink takes part in the softmax: it counts as one more key without a column")
    if record.error is None:
        notes.append("no error signal: statistics of errors and gradients are NaN")
    if record.query is None:
        notes.append("queries and keys unknown: their norms are NaN")
    if record.self_attention is None:
        notes.append(
            "self- or cross-attention unknown: statistics of position are NaN, and queries that are padding count"
        )
    elif not record.self_attention:
        notes.append(f"read as cross-attention: {_NOT_SELF}")
    if record.shape[1] == 1 and record.shape[0] > 1:
        notes.append("one head; if heads are folded into the batch, they are averaged")
    per_sequence = record.mask_mod is not None
    if record.mask is not None:
        per_sequence = record.mask.shape[0] > 1 or record.shape[0] == 1
    if not per_sequence and record.query_tokens is None and record.key_tokens is None:
        notes.append(_PADDING)
    return notes


def _sample_notes(record: AttentionRecord, extent: Extent) -> list[str]:
    """What was left out on request, or done without."""
    notes = []
    queries = record.shape[3]
    if extent.rows is not None and extent.rows < queries:
        told = f"{extent.rows} of {queries} queries sampled: standard_errors says how far the estimates may be off, "
        if extent.exact_routing:
            told += "NaN there marks a maximum over the sample, a lower bound; routing statistics are exact"
        else:
            told += (
                "NaN there marks a maximum over the sample, a lower bound; statistics of columns are NaN "
                "(exact_routing=True measures them)"
            )
        notes.append(told + "; value_grad_norm is NaN")
        if record.logits is not None or record.score_mod is not None or record.mask_mod is not None:
            notes.append("padding is not looked for in a sample of these scores; probe.token_mask(mask) tells it")
    if extent.sequences is not None and extent.sequences < record.shape[0]:
        notes.append(f"the first {extent.sequences} of {record.shape[0]} sequences measured")
    if extent.heads is not None:
        chosen = [str(head) for head in extent.heads if head < record.shape[1]]
        notes.append(f"only heads {', '.join(chosen)} measured; statistics of the layer are NaN")
    slow = uncompiled(record.value.device, record.value.dtype)
    if slow:
        notes.append(f"statistics in torch operations, which take longer, because {slow}")
    return notes


class Assembly:
    """Measured calls put together as the tensors of a report: ``[layers, heads]``, NaN where there is nothing."""

    def __init__(
        self,
        rows: list[str],
        statistics: list[Statistic],
        measured: dict[str, list[Measured]],
        moved: dict[str, Partial],
    ) -> None:
        self.rows = rows
        every = [call for calls in measured.values() for call in calls]
        on_host = dict(zip(map(id, every), to_host([call.partial for call in every]), strict=True))
        partials = {layer: combine(on_host[id(call)] for call in calls) for layer, calls in measured.items()}
        for layer in partials.keys() & moved.keys():
            partials[layer] |= to_host([moved[layer]])[0]
        sizes = {layer: calls[0].heads for layer, calls in measured.items()}
        self.heads = tuple(sizes.get(row, 0) for row in rows)
        told = (f"{layer}: {text}" for layer, calls in measured.items() for call in calls for text in call.warnings)
        self.warnings = list(dict.fromkeys(told))
        self.notes: tuple[str, ...] = tuple(
            dict.fromkeys(_where(note, layer) for layer, calls in measured.items() for c in calls for note in c.notes)
        )
        self.maps = tuple(replace(m, layer=layer) for layer, calls in measured.items() for m in calls[0].maps)

        self.residual = self._table({layer: finish_residual(partial) for layer, partial in partials.items()})
        self.nonfinite = {
            kind: self._table({layer: p[key] for layer, p in partials.items() if key in p})
            for kind in ("query", "key", "value", "error")
            for key in [f"nonfinite.{kind}"]
        }
        trusted = {}
        for layer, partial in partials.items():
            worst = float(finish_residual(partial).nan_to_num(0).max())
            if worst <= measured[layer][0].tolerance:
                trusted[layer] = partial
            else:
                self.warnings.append(  # without the number: it differs from probe to probe, and this is said once
                    f"{layer}: not measured, because sum alpha b misses u.o (see the residual): something between the "
                    "softmax and the output is not understood (a hidden mask, softcap, sink or head mask)"
                )
            if partial["masked_rows.sum"].any():
                self.notes += (f"{layer}: fully masked rows are left out",)
        self.statistics = {
            s.name: self._table({layer: finish(s, p) for layer, p in trusted.items()})
            for s in statistics
            if s.level == "head"
        }
        self.layer = {
            s.name: self._table({layer: finish(s, p) for layer, p in trusted.items()}, 1)[:, 0]
            for s in statistics
            if s.level == "layer"
        }

        self.standard_errors = {
            s.name: self._table(errors, 1)[:, 0] if s.level == "layer" else self._table(errors)
            for s in statistics
            if (errors := {layer: e for layer, p in trusted.items() if (e := finish_error(s, p)) is not None})
        }

    def _table(self, values: dict[str, Tensor], width: int | None = None) -> Tensor:
        width = max(self.heads, default=0) if width is None else width
        table = torch.full((len(self.rows), width), torch.nan, dtype=torch.float64)
        for layer, row in values.items():
            table[self.rows.index(layer), : len(row)] = row
        return table


def _where(note: str, layer: str) -> str:
    return note if note == _PADDING else f"{layer}: {note}"

"""Micro-batches of a step must give the statistics of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnprobe import AttentionRecord, StepReport
from attnprobe.statistics.dense import dense_parts
from tests.capture.reference import session
from tests.matrix.spy import Spy
from tests.statistics.compare import TOLERANCE, assert_close

if TYPE_CHECKING:
    from tests.matrix.training import Cell, History


def combined(cell: Cell, history: History, records: list[AttentionRecord], spy: Spy) -> list[str]:
    """The report against the formulas on the records of all micro-batches, put together along the batch."""
    ((watching, _),) = cell.run(session, steps=1).watchers
    calls: dict[str, list[AttentionRecord]] = {}
    repeated = {call.module for call in watching.seen if call.index}
    for call in watching.seen:
        row = f"{call.module}#{call.index}" if call.module in repeated else call.module
        calls.setdefault(row, []).append(call.result)
    wrong = []
    for row, same in calls.items():
        if len(same) != cell.condition.micro_batches:
            wrong.append(f"{row} was called {len(same)} times in {cell.condition.micro_batches} micro-batches")
        whole = as_one_batch(same)
        try:
            assert_close(_values(history.reports[0][0], row), whole, TOLERANCE[whole.value.dtype])
        except AssertionError as error:
            wrong.append(f"{row}: {' '.join(str(error).split())[:200]}")
    return wrong


def as_one_batch(records: Sequence[AttentionRecord]) -> AttentionRecord:
    records = [_without_functions(record) for record in records]
    parts: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(AttentionRecord)):
        tensors = [getattr(record, name) for record in records]
        if name == "mask":
            tensors = [
                None if x is None else x.expand(len(r.value), -1, -1, -1) for x, r in zip(tensors, records, strict=True)
            ]
        if any(isinstance(x, Tensor) for x in tensors):
            parts[name] = None if any(x is None for x in tensors) else torch.cat(tensors)
    return replace(records[0], **parts)


def _without_functions(record: AttentionRecord) -> AttentionRecord:
    """FlexAttention's functions know the sequences of their own micro-batch only."""
    if record.score_mod is None and record.mask_mod is None:
        return record
    parts = dense_parts(record)
    return replace(record, logits=parts.scores, mask=parts.visible, score_mod=None, mask_mod=None)


def _values(report: StepReport, row: str) -> dict[str, Tensor]:
    index = report.layers.index(row)
    heads = {name: values[index, : report.heads[index]] for name, values in report.statistics.items()}
    layer = {name: values[index : index + 1] for name, values in report.layer.items()}
    return {name: x for name, x in (heads | layer).items() if name != "records"}

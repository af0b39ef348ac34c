"""What the records of a cell must satisfy beyond the error ``u``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnprobe import AttentionRecord
from attnprobe.statistics.dense import _for_each_pair, dense_parts
from tests.matrix.spy import Spy

if TYPE_CHECKING:
    from tests.matrix.training import Cell, History

EXACT = 1e-12


def first_order(cell: Cell, history: History, records: list[AttentionRecord], spy: Spy) -> list[str]:
    """In float64: what attention is, and the gradients of its operands rebuilt from the record alone."""
    wrong: dict[str, float] = {}
    for record in records:
        for name, difference in _identities(record, spy):
            if not difference <= EXACT:
                wrong[name] = max(wrong.get(name, 0.0), difference)
    return [f"{name}: off by {difference:.2g}" for name, difference in wrong.items()]


def _identities(record: AttentionRecord, spy: Spy) -> Iterator[tuple[str, float]]:
    assert record.error is not None
    parts = dense_parts(record)
    sees = parts.count[..., None] > 0  # a row that sees nothing has no weights, whatever the model makes of it
    u, weights, score_gradient = (
        record.error.where(sees, 0),
        parts.dropout * parts.alpha,
        -parts.alpha * parts.advantage,
    )
    if record.output is not None:
        yield "alpha v = o", _distance((weights @ parts.value).where(sees, 0), record.output.where(sees, 0))
        yield "sum alpha b = u.o", _distance((parts.alpha * parts.b).sum(-1), (u * record.output).sum(-1))
    yield "sum alpha u = dL/dv", spy.difference(record.value, _over_groups(weights.mT @ u, record))
    if record.logits is not None:
        # Beside a learned sink they are known up to rounding: models take the row's maximum off first.
        digits = None if record.sink is None else 9
        yield "dS = dL/dlogits", spy.difference(record.logits, score_gradient, digits)
        return
    assert record.query is not None
    assert record.key is not None
    if record.score_mod is not None:
        score_gradient = score_gradient * _slopes(record)
    yield "scale dS k = dL/dq", spy.difference(record.query, record.scale * score_gradient @ parts.key)
    by_head = record.scale * score_gradient.mT @ parts.query
    yield "scale dS^T q = dL/dk", spy.difference(record.key, _over_groups(by_head, record))


def _slopes(record: AttentionRecord) -> Tensor:
    """Of FlexAttention's ``score_mod`` at every pair."""
    assert record.query is not None
    assert record.key is not None
    assert record.score_mod is not None
    batch, heads, _, queries, keys = record.shape
    key = record.key.repeat_interleave(heads // record.key.shape[1], dim=1)
    scores = (record.scale * record.query @ key.mT).requires_grad_()
    indices = [torch.arange(size) for size in (batch, heads, queries, keys)]
    (slopes,) = torch.autograd.grad(_for_each_pair(record.score_mod, indices, scores).sum(), scores)
    return slopes


def _over_groups(by_head: Tensor, record: AttentionRecord) -> Tensor:
    """Summed over the query heads that read the same key head."""
    return by_head.unflatten(1, (record.shape[2], -1)).sum(2)


def _distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / (1 + a.abs())).max())


def padding(cell: Cell, history: History, records: list[AttentionRecord], spy: Spy) -> list[str]:
    """Where a call over the batch's tokens hides any, those count that the batch says are real, and no others."""
    batch = cell.batch(0)
    real = next(batch[name] for name in ("attention_mask", "mask") if name in batch).bool()
    masked = [parts for parts in map(dense_parts, records) if not parts.visible.all()]
    found = [parts.keys for parts in masked if parts.keys.shape == real.shape]
    if not found:
        return ["no call has as many keys as the batch has tokens"]
    return [] if all(torch.equal(keys, real) for keys in found) else ["other tokens count than the batch says"]

"""How far attention and values moved between two looks at the same batch, without a ``T x S`` tensor."""

from __future__ import annotations

import torch

from attnprobe.record import AttentionRecord
from attnprobe.statistics.families import heads_sum
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.streaming import first_pass


@torch.no_grad()
def displacement(record: AttentionRecord, earlier: AttentionRecord) -> Partial:
    """Partial results of ``attention_displacement`` and ``value_displacement``.

    Args:
        record: the call now.
        earlier: the same call on the same batch at an earlier step; same shapes.
    """
    scores, sums = first_pass(record, set())
    scores_before, sums_before = first_pass(earlier, set())
    moved = torch.zeros_like(sums.logsumexp)
    for now, before in zip(scores.chunks(), scores_before.chunks(), strict=True):
        for rows, columns in scores.tiles():
            weights = (scores.tile(now, rows, columns)[0] - sums.logsumexp[now.index, rows, None]).exp2_()
            weights_before = scores_before.tile(before, rows, columns)[0]
            weights_before = (weights_before - sums_before.logsumexp[now.index, rows, None]).exp2_()
            moved[now.index, rows] += (weights - weights_before).abs_().sum(-1) / 2
        sink, sink_before = scores.sink(now), scores_before.sink(before)
        if sink is not None and sink_before is not None:
            weights = (sink - sums.logsumexp[now.index]).exp2_()
            weights_before = (sink_before - sums_before.logsumexp[now.index]).exp2_()
            moved[now.index] += (weights - weights_before).abs_() / 2
    both = sums.rows & sums_before.rows
    keys = sums.key_tokens[:, None, :, None]
    change, size = (
        torch.where(keys, tensor.to(scores.dtype), 0).square().sum((0, 2, 3), dtype=torch.float64)
        for tensor in (record.value.to(scores.dtype) - earlier.value.to(scores.dtype), earlier.value)
    )
    repeats = scores.heads // scores.groups
    return {
        "attention_displacement.sum": heads_sum(sums, torch.where(both, moved, 0)),
        "attention_displacement.count": heads_sum(sums, both),
        "value_displacement.sum": change.repeat_interleave(repeats),
        "value_displacement.count": size.repeat_interleave(repeats),
    }

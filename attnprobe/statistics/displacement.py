"""How far attention and values moved between two looks at the same batch, without a ``T x S`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.averages import by_head
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.row_pass import first_passes
from attnprobe.statistics.scores import Scores
from attnprobe.statistics.sums import Sums


@torch.no_grad()
def displacement(record: AttentionRecord, earlier: AttentionRecord) -> Partial:
    """Partial results of ``attention_displacement`` and ``value_displacement``.

    Args:
        record: the call now.
        earlier: the same call on the same batch at an earlier step; same shapes.
    """
    scores, sums, logsumexp = _weighed(record)
    scores_before, sums_before, logsumexp_before = _weighed(earlier)
    moved = torch.zeros_like(logsumexp)
    for now, before in zip(scores.chunks(), scores_before.chunks(), strict=True):
        for rows, columns in scores.tiles():
            weights = (scores.tile(now, rows, columns)[0] - logsumexp[now.index, rows, None]).exp2_()
            weights_before = scores_before.tile(before, rows, columns)[0]
            weights_before = (weights_before - logsumexp_before[now.index, rows, None]).exp2_()
            moved[now.index, rows] += (weights - weights_before).abs_().sum(-1) / 2
        sink, sink_before = scores.sink(now), scores_before.sink(before)
        if sink is not None and sink_before is not None:
            weights = (sink - logsumexp[now.index]).exp2_()
            weights_before = (sink_before - logsumexp_before[now.index]).exp2_()
            moved[now.index] += (weights - weights_before).abs_() / 2
    both = sums.rows & sums_before.rows
    keys = sums.key_tokens[:, None, :, None]
    change, size = (
        torch.where(keys, tensor.to(scores.dtype), 0).square().sum((0, 2, 3), dtype=torch.float64)
        for tensor in (record.value.to(scores.dtype) - earlier.value.to(scores.dtype), earlier.value)
    )
    repeats = scores.heads // scores.groups
    return {
        "attention_displacement.sum": by_head(torch.where(both, moved, 0).sum(-1, dtype=torch.float64), scores.heads),
        "attention_displacement.count": by_head(both.sum(-1, dtype=torch.float64), scores.heads),
        "value_displacement.sum": change.repeat_interleave(repeats),
        "value_displacement.count": size.repeat_interleave(repeats),
    }


def _weighed(record: AttentionRecord) -> tuple[Scores, Sums, Tensor]:
    """With the log-sum-exp of its rows. Both records are to be looked at in the same tiles."""
    scores, sums, logsumexp = first_passes(record)
    scores.empty = frozenset()
    return scores, sums, logsumexp

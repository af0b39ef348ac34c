"""Pictures of one head, at most 64 x 64, pooled tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.report import HeadMap
from attnprobe.statistics.row_pass import first_passes
from attnprobe.statistics.scores import Scores
from attnprobe.statistics.streaming import context
from attnprobe.statistics.subset import some_heads

SIZE = 64
VECTORS = 1000


@torch.no_grad()
def head_map(layer: str, head: int, record: AttentionRecord) -> HeadMap:
    """Attention, compatibility and advantage of one head on the batch's first sequence, and its values."""
    with torch.autocast(record.value.device.type, enabled=False):
        one = some_heads(record, [head], 1)
        scores, rows_of, logsumexp = first_passes(one)
        shift = logsumexp[0]
        value = one.value[0, 0].to(scores.dtype)
        error = None if one.error is None else one.error[0, 0].to(scores.dtype)
        expected = None if error is None else (error * context(one)[0, 0]).sum(-1)
        if expected is not None and one.lse_error is not None:
            expected -= one.lse_error[0, 0]
        pool_rows, pool_columns = _pooling(scores.queries, scores), _pooling(scores.keys, scores)
        sums = torch.zeros(4, len(pool_rows), len(pool_columns), dtype=scores.dtype, device=scores.device)
        reads = torch.zeros(2, len(pool_columns), dtype=scores.dtype, device=scores.device)
        for items in scores.chunks():
            for rows, columns in scores.tiles():
                tile, visible = scores.tile(items, rows, columns)
                seen = torch.ones_like(tile[0]) if visible is None else visible[0].to(tile.dtype)
                pictures = [seen, (tile[0] - shift[rows, None]).exp2() * seen]
                counted = torch.stack(
                    [rows_of.rows[0, rows].to(seen.dtype) @ pictures[1], rows_of.shares[0, rows] @ seen]
                )
                reads += counted @ pool_columns[:, columns].mT
                if error is not None and expected is not None:
                    compatibility = error[rows] @ value[columns].mT
                    dropout = scores.dropout(items, rows, columns)
                    dropped = compatibility if dropout is None else compatibility * dropout[0]
                    pictures += [compatibility * seen, (expected[rows, None] - dropped) * seen]
                sums[: len(pictures)] += pool_rows[:, rows] @ torch.stack(pictures) @ pool_columns[:, columns].mT
        attention, compatibility, advantage = (sums[1:] / sums[0]).cpu()  # no visible pair: 0 / 0 is NaN
        chosen = torch.linspace(0, scores.keys - 1, min(VECTORS, scores.keys)).round().long()
        return HeadMap(
            layer,
            head,
            attention,
            compatibility if error is not None else None,
            advantage if error is not None else None,
            value[chosen.to(value.device)].cpu(),
            tuple(chosen.tolist()),
            (reads[0] / reads[1]).cpu(),
        )


def _pooling(length: int, scores: Scores) -> Tensor:
    """``[P, length]``: which pixel a row or column belongs to, as ones and zeros."""
    pixels = min(SIZE, length)
    position = torch.arange(length, device=scores.device) * pixels // length
    return (torch.arange(pixels, device=scores.device)[:, None] == position).to(scores.dtype)

"""What has to be known of each row before its weights: which keys it sees, and the log-sum-exp of its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics import visibility
from attnprobe.statistics.scores import LN2, MASKED, Items, Scores
from attnprobe.statistics.sums import Sums
from attnprobe.statistics.sweep import Sweep
from attnprobe.statistics.triton_path import kernels_for
from attnprobe.statistics.visibility import Visibility


def first_pass(record: AttentionRecord) -> tuple[Scores, Sums, Tensor | None]:
    """Which rows and keys count, and the log-sum-exp over ln 2 ``[N, T]`` if it had to be computed for that."""
    scores = Scores(record)
    logsumexp = None
    if scores.masked_by_scores:
        logsumexp, seen = _row_sums(scores)
    else:
        seen = visibility.of_masks(scores)
        scores.empty = seen.empty
    return scores, Sums(scores, seen), logsumexp


def first_passes(record: AttentionRecord) -> tuple[Scores, Sums, Tensor]:
    """The same with the log-sum-exp in any case, of scores that round as those of ``Scores.tile``."""
    scores, sums, logsumexp = first_pass(record)
    return scores, sums, tile_log_sum_exp(scores) if logsumexp is None else logsumexp


def tile_log_sum_exp(scores: Scores) -> Tensor:
    """Of scores that round as those of ``Scores.tile``, over ln 2, ``[N, T]``; a learned sink takes part."""
    return _row_sums(scores)[0]


def kernel_lse(scores: Scores) -> Tensor | None:
    """What the kernel left, over ln 2, ``[N, T]``, which is to be checked: the weights of a row add up to 1."""
    record = scores.record
    if record.logsumexp is None or record.sink is not None:
        return None
    return record.logsumexp.flatten(0, 1).to(scores.dtype) / LN2


def log_sum_exp(scores: Scores, sweep: Sweep | None) -> Tensor:
    """Of each row's scores as ``WeightPass`` finds them, over ln 2, ``[N, T]``; a learned sink takes part."""
    if sweep is not None:
        largest, total = sweep.exponentials()
        _add_sink(scores, scores.everything, largest, total)
        return largest + total.log2()
    triton = kernels_for(scores) if scores.record.sink is None else None
    if triton is None:
        return tile_log_sum_exp(scores)
    limit = scores.limit
    return torch.cat([triton.log_sum_exp(items, limit) for items in scores.large_chunks()])


def _row_sums(scores: Scores) -> tuple[Tensor, Visibility]:
    """Log-sum-exp, over ln 2, and who sees whom."""
    largest = torch.full((scores.count, scores.queries), MASKED, dtype=scores.dtype, device=scores.device)
    total, number = torch.zeros_like(largest), torch.zeros_like(largest)
    seen = torch.zeros(scores.batch, scores.heads, scores.keys, dtype=torch.bool, device=scores.device)
    for items in scores.chunks():
        for rows, columns in scores.tiles():
            tile, visible = scores.tile(items, rows, columns)
            if scores.masked_by_scores and visible is not None:
                number[items.index, rows] += visible.sum(-1)
                read = seen[items.batches, items.heads, columns]
                read |= visible.any(-2).expand(len(tile), -1).view(read.shape)
            before = largest[items.index, rows]
            top = torch.maximum(before, tile.amax(-1))
            total[items.index, rows] *= (before - top).exp2()
            total[items.index, rows] += (tile - top[..., None]).exp2_().sum(-1)
            largest[items.index, rows] = top
        _add_sink(scores, items, largest, total)
    return largest + total.log2(), Visibility(number, seen.any(1))


def _add_sink(scores: Scores, items: Items, largest: Tensor, total: Tensor) -> None:
    sink = scores.sink(items)
    if sink is not None:
        top = torch.maximum(largest[items.index], sink)
        total[items.index] *= (largest[items.index] - top).exp2()
        total[items.index] += (sink - top).exp2()
        largest[items.index] = top

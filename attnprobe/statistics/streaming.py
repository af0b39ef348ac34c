"""Every statistic of one attention call without ever holding a ``T x S`` tensor.

Two passes over score tiles, as in flash attention: the first finds each row's log-sum-exp, maximum
and number of visible keys, and from them the padding; the second sums weights, errors and columns.
Row sums stay in the working dtype; everything that is summed over rows is summed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnprobe.catalog import Statistic
from attnprobe.record import AttentionRecord
from attnprobe.statistics import families
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.scores import MASKED, Items, Scores
from attnprobe.statistics.sums import Block, Sums


@torch.no_grad()
def measure(record: AttentionRecord, statistics: Sequence[Statistic]) -> Partial:
    """Partial results of one call, on its device, to be combined and finished by ``statistics.reduce``.

    Besides the chosen statistics it always holds what validity needs: ``residual``, ``error_norm``,
    ``value_square`` and the ``nonfinite`` counts.
    """
    with torch.autocast(record.value.device.type, enabled=False):
        names = {statistic.name for statistic in statistics if statistic.measure is None}
        lost = record.output is None
        if lost:
            record = replace(record, output=context(record))
        scores = Scores(record)
        sums = Sums(scores, names)
        for items in scores.chunks():
            _first_pass(scores, sums, items)
        sums.find_padding()
        for items in scores.chunks():
            _second_pass(scores, sums, items)
        partial = families.partial(sums, names)
        if lost or record.dropout:  # then u.o and sum alpha b have nothing to say about each other
            del partial["residual.sum"], partial["residual.count"]
        for statistic in statistics:
            if statistic.measure is not None:
                total, count = statistic.measure(record)
                partial |= {f"{statistic.name}.sum": total, f"{statistic.name}.count": count}
        return partial


def _first_pass(scores: Scores, sums: Sums, items: Items) -> None:
    """Log-sum-exp, largest and summed score and number of visible keys of each row; which keys are seen."""
    size = (items.index.stop - items.index.start, scores.queries)
    largest = torch.full(size, MASKED, dtype=scores.dtype, device=scores.device)
    total, added, visible_keys = (torch.zeros_like(largest) for _ in range(3))
    for rows, columns in scores.tiles():
        tile, visible = scores.tile(items, rows, columns)
        if visible is None:
            visible_keys[:, rows] += columns.stop - columns.start
            added[:, rows] += tile.sum(-1)
            sums.seen[items.index, columns] = True
        else:
            visible_keys[:, rows] += visible.sum(-1)
            added[:, rows] += (tile * visible).sum(-1)
            sums.seen[items.index, columns] |= visible.amax(-2) > 0
        top = torch.maximum(largest[:, rows], tile.amax(-1))
        total[:, rows] *= (largest[:, rows] - top).exp2()
        total[:, rows] += (tile - top[..., None]).exp2_().sum(-1)
        largest[:, rows] = top
    sums.logsumexp[items.index] = largest + total.log2()
    sums.max_logit[items.index] = largest
    sums.mean_logit[items.index] = added / visible_keys
    sums.visible_keys[items.index] = visible_keys


def _second_pass(scores: Scores, sums: Sums, items: Items) -> None:
    """Everything that needs the weights."""
    value, error, centre = sums.vectors(items)
    for rows, columns in scores.tiles():
        log_weights, visible = scores.tile(items, rows, columns)
        log_weights -= sums.logsumexp[items.index, rows, None]
        if not sums.complete:
            log_weights.masked_fill_(~sums.rows[items.index, rows, None], MASKED)
        weights = log_weights.exp2()
        block = Block(items.index, rows, columns, weights, visible)
        sums.add_routing(block, log_weights)
        if error is not None and centre is not None:
            centred = torch.baddbmm(-centre[:, rows, None], error[:, rows], value[:, columns].mT)
            sums.add_gradient(block, centred, error[:, rows])


def context(record: AttentionRecord) -> Tensor:
    """The per-head context ``alpha v`` ``[B, H, T, E]`` in the working dtype, for a record that lost it."""
    scores = Scores(record)
    sums = Sums(scores, set())
    out = torch.zeros(scores.count, scores.queries, record.value.shape[-1], dtype=scores.dtype, device=scores.device)
    for items in scores.chunks():
        _first_pass(scores, sums, items)
        value = scores.take(record.value, items.batch, items.head)
        logsumexp = sums.logsumexp[items.index]
        for rows, columns in scores.tiles():
            weights = (scores.tile(items, rows, columns)[0] - logsumexp[:, rows, None]).exp2_()
            out[items.index, rows] += weights @ value[:, columns]
    return out.unflatten(0, (scores.batch, scores.heads))

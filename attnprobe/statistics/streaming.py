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
    ``value_square``, ``masked_rows`` and the ``nonfinite`` counts. Statistics of the user's own are not
    computed here.
    """
    with torch.autocast(record.value.device.type, enabled=False):
        names = {statistic.name for statistic in statistics}
        record, size = _unit_error(record)
        lost = record.output is None
        if lost:
            record = replace(record, output=context(record))
        scores, sums = first_pass(record, names)
        for items in scores.chunks():
            _second_pass(scores, sums, items)
        partial = families.partial(sums, names)
        unknown_dropout = record.dropout and record.kept is None
        if lost or unknown_dropout:  # then u . o and sum alpha b have nothing to say about each other
            del partial["residual.sum"], partial["residual.count"]
        for name, power in _POWERS_OF_ERROR.items():
            if name in partial:
                partial[name] = partial[name] * size**power
        return partial


#: How partial results grow with the error signal.
_POWERS_OF_ERROR = {
    "head_importance.sum": 1,
    "advantage_max.max": 1,
    "advantage_std.sum": 2,
    "score_grad_norm.sum": 2,
    "value_grad_norm.sum": 2,
    "error_norm.sum": 2,
    "residual.sum": 2,
}


def _unit_error(record: AttentionRecord) -> tuple[AttentionRecord, Tensor]:
    """The record with errors of about 1, whose squares neither vanish nor overflow, and the power of two between."""
    one = torch.ones((), dtype=torch.float64, device=record.value.device)
    if record.error is None or record.error.numel() == 0:
        return record, one
    error = record.error.to(torch.promote_types(record.error.dtype, torch.float32))
    exponent = torch.frexp(error.abs().amax())[1]
    exponent = exponent.clamp(-100, 100)  # NaN, Inf and 0 have no exponent to speak of
    lse_error = None if record.lse_error is None else torch.ldexp(record.lse_error.to(error.dtype), -exponent)
    return replace(record, error=torch.ldexp(error, -exponent), lse_error=lse_error), torch.ldexp(one, exponent)


def first_pass(record: AttentionRecord, names: set[str]) -> tuple[Scores, Sums]:
    """Each row's log-sum-exp, and which rows and keys count."""
    scores = Scores(record)
    sums = Sums(scores, names)
    for items in scores.chunks():
        sums.add_scores(items, *_row_sums(scores, items, sums.seen))
    sums.find_padding()
    return scores, sums


def _row_sums(scores: Scores, items: Items, seen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp, largest and mean score, each over ln 2, and number of visible keys of each row ``[N, T]``.

    A learned sink is in the log-sum-exp and, where the row sees a key, in the number. Marks in ``seen``
    ``[B * H, S]`` which keys some row sees.
    """
    size = (items.index.stop - items.index.start, scores.queries)
    largest = torch.full(size, MASKED, dtype=scores.dtype, device=scores.device)
    total, added, number = (torch.zeros_like(largest) for _ in range(3))
    for rows, columns in scores.tiles():
        tile, visible = scores.tile(items, rows, columns)
        if visible is None:
            number[:, rows] += columns.stop - columns.start
            added[:, rows] += tile.sum(-1)
        else:
            number[:, rows] += visible.sum(-1)
            added[:, rows] += (tile * visible).sum(-1)
        if seen is not None:
            seen[items.index, columns] |= True if visible is None else visible.amax(-2) > 0
        top = torch.maximum(largest[:, rows], tile.amax(-1))
        total[:, rows] *= (largest[:, rows] - top).exp2()
        total[:, rows] += (tile - top[..., None]).exp2_().sum(-1)
        largest[:, rows] = top
    logsumexp, mean, sink = largest + total.log2(), added / number, scores.sink(items)
    if sink is not None:
        logsumexp = torch.logaddexp2(logsumexp, sink)
        number += number > 0
    return logsumexp, largest, mean, number


def log_sum_exp(scores: Scores, items: Items) -> Tensor:
    """Of each row's scores, over ln 2, ``[N, T]``."""
    return _row_sums(scores, items)[0]


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
            dropout = scores.dropout(items, rows, columns)
            if dropout is None:
                centred = torch.baddbmm(-centre[:, rows, None], error[:, rows], value[:, columns].mT)
            else:
                centred = (error[:, rows] @ value[:, columns].mT).mul_(dropout).sub_(centre[:, rows, None])
            sums.add_value_gradient(block, error[:, rows], dropout)
            sums.add_advantages(block, centred)
    sink = scores.sink(items)
    if sink is not None:
        log_weights = (sink - sums.logsumexp[items.index]).masked_fill_(~sums.rows[items.index], MASKED)[..., None]
        block = Block(items.index, slice(0, scores.queries), slice(0, 0), log_weights.exp2(), None)
        sums.add_spread(block, log_weights)
        if centre is not None:
            sums.add_advantages(block, -centre[..., None])


def context(record: AttentionRecord) -> Tensor:
    """The per-head context ``alpha v`` ``[B, H, T, E]`` in the working dtype, after dropout where that is known."""
    scores = Scores(record)
    out = torch.zeros(scores.count, scores.queries, record.value.shape[-1], dtype=scores.dtype, device=scores.device)
    for items in scores.chunks():
        value = scores.take(record.value, items.batch, items.head)
        logsumexp = log_sum_exp(scores, items)
        for rows, columns in scores.tiles():
            weights = (scores.tile(items, rows, columns)[0] - logsumexp[:, rows, None]).exp2_()
            dropout = scores.dropout(items, rows, columns)
            if dropout is not None:
                weights *= dropout
            out[items.index, rows] += weights @ value[:, columns]
    return out.view(scores.batch, scores.heads, *out.shape[1:])

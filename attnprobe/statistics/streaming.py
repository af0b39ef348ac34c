"""Every statistic of one attention call without ever holding a ``T x S`` tensor.

As in flash attention, scores are computed anew, tile by tile. Where the kernel left the log-sum-exp of each row, one
pass is enough: the weights of a row must add up to 1, and where they do not a first pass finds the log-sum-exp. Sums
of one row, or of one column, stay in the working dtype; sums of those are taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnprobe.catalog import Statistic
from attnprobe.record import AttentionRecord
from attnprobe.statistics import families, sampling
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.row_pass import first_pass, first_passes, kernel_lse, log_sum_exp
from attnprobe.statistics.sums import Sums
from attnprobe.statistics.sweep import sweep_for
from attnprobe.statistics.weight_pass import WeightPass


@torch.no_grad()
def measure(
    record: AttentionRecord,
    statistics: Sequence[Statistic],
    *,
    rows: int | None = None,
    exact_routing: bool = False,
    generator: torch.Generator | None = None,
) -> Partial:
    """Partial results of one call, on its device, to be combined and finished by ``statistics.reduce``.

    Besides the chosen statistics it always holds what validity needs: ``residual``, ``error_norm``,
    ``value_square``, ``masked_rows`` and the ``nonfinite`` counts. Statistics of the user's own are not
    computed here.

    Args:
        rows: estimate what needs the weights from so many rows, if there are more.
        exact_routing: only that part of it which needs errors too.
        generator: draws the rows.
    """
    with torch.autocast(record.value.device.type, enabled=False):
        names = {statistic.name for statistic in statistics}
        lost = record.output is None
        if lost:
            record = replace(record, output=context(record))
        if rows is None or rows >= record.shape[3]:
            sums = weighed(record, names)
            partial = families.of_vectors(sums, names) | _of_pairs(sums, names)
        else:
            generator = torch.Generator(record.value.device) if generator is None else generator
            partial = _estimated(record, names, rows, generator, exact_routing=exact_routing)
        unknown_dropout = record.dropout and record.kept is None
        if lost or unknown_dropout:  # then u . o and sum alpha b have nothing to say about each other
            del partial["residual.sum"], partial["residual.count"]
        return partial


def _of_pairs(sums: Sums, names: set[str]) -> Partial:
    return families.of_weights(sums, names) | families.of_columns(sums, names)


def _estimated(
    record: AttentionRecord, names: set[str], rows: int, generator: torch.Generator, *, exact_routing: bool
) -> Partial:
    whole, known = sampling.look(record)
    positions, draws = sampling.draw(record, rows, generator)
    sums = weighed(sampling.sampled(record, whole, positions), names, lengths=False)
    partial = families.of_vectors(whole, names) | sampling.estimate(sums, whole, names, draws, known=known)
    if exact_routing:
        exact = _of_pairs(weighed(replace(record, error=None), names, lengths=False), names)
        return sampling.with_routing(partial, exact)
    kept = kernel_lse(whole.scores)
    if kept is not None and whole.scores.plain and sums.kernel_lse:
        whole.find_landmarks(kept, sweep_for(whole.scores))
        return sampling.with_routing(partial, families.of_landmarks(whole, names))
    return partial


def weighed(record: AttentionRecord, names: set[str], *, lengths: bool = True) -> Sums:
    """All sums of a record."""
    scores, sums, logsumexp = first_pass(record)
    weights = WeightPass(scores, sums, names, lengths=lengths)
    kept = kernel_lse(scores) if logsumexp is None else None
    if kept is not None:
        weights.run(kept)
        sums.kernel_lse = weights.certain
        if not sums.kernel_lse:
            sums.start()
    if not sums.kernel_lse:
        weights.run(log_sum_exp(scores, weights.sweep) if logsumexp is None else logsumexp)
    return sums


def context(record: AttentionRecord) -> Tensor:
    """The per-head context ``alpha v`` ``[B, H, T, E]`` in the working dtype, after dropout where that is known."""
    scores, _, shift = first_passes(record)
    out = torch.zeros(scores.count, scores.queries, record.value.shape[-1], dtype=scores.dtype, device=scores.device)
    for items in scores.chunks():
        value = scores.take(record.value, items)
        for rows, columns in scores.tiles():
            weights = (scores.tile(items, rows, columns)[0] - shift[items.index, rows, None]).exp2_()
            dropout = scores.dropout(items, rows, columns)
            if dropout is not None:
                weights *= dropout
            out[items.index, rows] += weights @ value[:, columns]
    return out.view(scores.batch, scores.heads, *out.shape[1:])

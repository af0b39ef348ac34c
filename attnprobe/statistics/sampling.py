"""A sample of the rows: what they say of all rows, and how far that may be off.

Some first rows are taken for certain: under a causal mask they see few keys and are unlike the rest. The others are
drawn with replacement, half of the probability spread evenly and half in proportion to the squared size of the row's
error, so that what errors are summed into is not left to chance. All heads of a sequence share the rows.

What holds errors is weighted by the inverse of how often a row is to be expected, over the known number of rows
(Hansen and Hurwitz; Horvitz and Thompson for the rows taken for certain); means of what does not are weighted means
(Hajek).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics import families, visibility
from attnprobe.statistics.averages import Draws, by_head
from attnprobe.statistics.columns import COLUMN_STATISTICS
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.scores import Scores
from attnprobe.statistics.subset import some_rows
from attnprobe.statistics.sums import Sums
from attnprobe.statistics.sweep import sweep_for
from attnprobe.statistics.visibility import Visibility

CERTAIN = 32
#: Fewer rows say nothing about their spread.
LEAST = 16
#: Statistics that hold errors; their rows are counted, not estimated, where that is possible.
_OVER_CHOOSING, _OVER_ROWS = ("advantage_std",), ("score_grad_norm", "residual")
#: What a sample says nothing of.
_OF_LAYER = {"shared_dead_columns"}
_BEYOND = {"value_grad_norm", *COLUMN_STATISTICS}
_ROUTING = {
    *("entropy", "normalized_entropy", "effective_keys", "max_weight", "concentration", "max_logit", "logit_spread"),
    *("sink_mass", "self_mass", "mean_distance", "entropy_8", "future_mass", "padding_mass", *COLUMN_STATISTICS),
}


def draw(record: AttentionRecord, rows: int, generator: torch.Generator) -> tuple[Tensor, Draws]:
    """Positions ``[B, rows]``, ascending, and what each row stands for."""
    batch, _, _, queries, _ = record.shape
    certain = min(CERTAIN, rows // 4)
    rest, number = queries - certain, rows - certain
    even = torch.full((batch, rest), 1 / rest, dtype=torch.float64, device=record.value.device)
    probability = even
    if record.error is not None:
        dtype = torch.promote_types(record.error.dtype, torch.float32)
        size = torch.linalg.vector_norm(record.error[:, :, certain:], dim=(1, 3), dtype=dtype)
        size = (size / size.amax(-1, keepdim=True)).double().square()
        share = size / size.sum(-1, keepdim=True)
        usable = share.isfinite().all(-1, keepdim=True)  # not so without any error, or with one that is NaN
        probability = torch.where(usable, (even + share) / 2, even)
    drawn = torch.multinomial(probability, number, replacement=True, generator=generator).sort(-1).values
    weight = 1 / (number * probability.gather(1, drawn))
    first = torch.arange(certain, device=drawn.device).expand(batch, -1)
    positions = torch.cat([first, drawn + certain], -1)
    return positions, Draws(torch.cat([torch.ones_like(first), weight], -1).float(), certain)


def look(record: AttentionRecord) -> tuple[Sums, bool]:
    """Which rows and keys of the whole record count, and whether that is known without its scores."""
    scores = Scores(record)
    known = not (scores.masked_by_scores or scores.mask_mod)
    if known:
        seen = visibility.of_masks(scores)
    else:
        everything = torch.ones(scores.count, scores.queries, dtype=scores.dtype, device=scores.device)
        tokens = torch.ones(scores.batch, scores.keys, dtype=torch.bool, device=scores.device)
        seen = Visibility(everything * scores.keys, tokens)
    sums = Sums(scores, seen)
    sweep = sweep_for(scores)
    if sweep is not None:
        sweep.describe(sums)
        return sums, known
    for items in scores.bare_chunks():
        sums.vectors.measure(items, queries=True)
        sums.vectors.errors(items)
    return sums, known


def sampled(record: AttentionRecord, whole: Sums, positions: Tensor) -> AttentionRecord:
    """The record of the sampled rows, told which tokens are padding: a sample cannot know."""
    record = replace(record, query_tokens=whole.query_tokens, key_tokens=whole.key_tokens)
    return some_rows(record, positions)


def estimate(sums: Sums, whole: Sums, names: set[str], draws: Draws, *, known: bool) -> Partial:
    """Partial results from the sums of a sample; ``known`` says whether the rows of the whole record are counted."""
    # A sample is told all padding, also what was derived, which holds no weight.
    underived = names if whole.declared_keys is not None else names - {"padding_mass"}
    partial = families.of_weights(sums, underived - _BEYOND, draws)
    for name in names & _BEYOND:  # also where exact micro-batches are added to it
        one = torch.ones(1 if name in _OF_LAYER else whole.scores.heads, dtype=torch.float64, device=sums.rows.device)
        partial |= {f"{name}.sum": one * torch.nan, f"{name}.count": one}
    partial |= {f"{key[:-4]}.bound": torch.ones_like(partial[key]) for key in [*partial] if key.endswith(".max")}
    if known and sums.record.error is not None:
        for counted, where in ((_OVER_CHOOSING, whole.choosing), (_OVER_ROWS, whole.rows)):
            count = by_head(where.sum(-1, dtype=torch.float64), whole.scores.heads)
            for name in counted:
                if f"{name}.count" in partial:
                    zero = torch.zeros_like(count)
                    partial |= {f"{name}.count": count, f"{name}.yc": zero, f"{name}.cc": zero}
    return partial


def with_routing(estimated: Partial, exact: Partial) -> Partial:
    """Estimates with those statistics that need no errors replaced by what was measured of them on all rows."""
    measured = {key.partition(".")[0] for key in exact} & _ROUTING
    result = {key: value for key, value in estimated.items() if key.partition(".")[0] not in measured}
    return result | {key: value for key, value in exact.items() if key.partition(".")[0] in measured}

"""How much each key is read, for each sequence: statistics of the columns of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.statistics.averages import Averages
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.sums import Sums

DEAD, SEEN_BY = 0.02, 8
#: What cannot be told from a sample of the rows; ``hidden_tokens`` are found in ``violations``.
COLUMN_STATISTICS = ("dead_column_fraction", "column_gini", "top_column_share", "shared_dead_columns", "hidden_tokens")


def add_columns(averages: Averages, sums: Sums) -> None:
    """Those that are means over sequences."""
    tokens, mass, usage = _tokens(sums), sums.column["mass"], _usage(sums)
    dead, judged = _dead(sums)
    averages.mean("dead_column_fraction", *_share(dead, judged))
    if "top_column_share" in averages.wanted:
        counted = torch.where(tokens, mass, 0).double()
        total = counted.sum(-1, keepdim=True)
        averages.mean("top_column_share", counted.amax(-1, keepdim=True) / total, total > 0)
    if "column_gini" in averages.wanted:
        read = tokens & (sums.column["rows"] > 0)
        ascending = torch.where(read, usage, -1).double().sort(-1).values  # columns that do not count come first
        number = read.sum(-1, keepdim=True)
        rank = torch.arange(1, sums.scores.keys + 1, device=mass.device) - (sums.scores.keys - number)
        ascending = torch.where(rank > 0, ascending, 0)
        total = ascending.sum(-1, keepdim=True)
        gini = ((2 * rank - number - 1) * ascending).sum(-1, keepdim=True) / (number * total)
        averages.mean("column_gini", gini, total > 0)


def shared(sums: Sums) -> Partial:
    """Columns that are dead in all heads of the layer."""
    dead, judged = (each.unflatten(0, (sums.scores.batch, sums.scores.heads)).all(1) for each in _dead(sums))
    share, where = _share(dead, judged)
    return {
        "shared_dead_columns.sum": torch.where(where, share, 0).sum(dtype=torch.float64)[None],
        "shared_dead_columns.count": where.sum(dtype=torch.float64)[None],
    }


def _tokens(sums: Sums) -> Tensor:
    return sums.key_tokens.repeat_interleave(sums.scores.heads, 0)


def _usage(sums: Sums) -> Tensor:
    return sums.column["mass"] / sums.column["uniform"]


def _dead(sums: Sums) -> tuple[Tensor, Tensor]:
    """Which columns are dead, and which were judged at all, each ``[N, S]``."""
    judged = _tokens(sums) & (sums.column["rows"] >= SEEN_BY)
    return judged & (_usage(sums) < DEAD), judged


def _share(part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Share of true entries per row, ``[*, 1]``, and where there is a whole."""
    number = whole.sum(-1, keepdim=True, dtype=torch.float64)
    return part.sum(-1, keepdim=True) / number, number > 0

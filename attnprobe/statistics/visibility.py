"""How many keys each query sees and which keys some query sees, where that does not depend on the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.statistics.scores import Items, Scores


@dataclass
class Visibility:
    """What rows and keys see of each other.

    Attributes:
        number: ``[N, T]``, keys that the row sees, in the working dtype.
        seen: ``[B, S]``, whether any row of any head sees the key.
        empty: tiles in which no row of any item sees a key.
    """

    number: Tensor
    seen: Tensor
    empty: frozenset[tuple[int, int]] = frozenset()


def of_masks(scores: Scores) -> Visibility:
    """Of a record whose scores are not asked."""
    return prefix(scores) if scores.plain else scan(scores)


def prefix(scores: Scores) -> Visibility:
    """Of a record without masks: each row sees the keys before its limit."""
    keys = torch.arange(scores.keys, device=scores.device)
    return Visibility(scores.limit.to(scores.dtype), keys < scores.limit.amax(-1).view(scores.batch, -1)[:, :1])


def scan(scores: Scores) -> Visibility:
    """Of a record whose masks are known without the scores, once for all heads that share them."""
    heads = scores.heads if scores.masks_differ else 1
    number = torch.zeros(scores.batch, heads, scores.queries, dtype=scores.dtype, device=scores.device)
    seen = torch.zeros(scores.batch, scores.keys, dtype=torch.bool, device=scores.device)
    grid = [*scores.tiles()]
    some = torch.zeros(len(grid), dtype=torch.bool, device=scores.device)
    for b in range(scores.batch):
        for h in range(heads):
            index = b * scores.heads + h
            items = Items(slice(index, index + 1), slice(b, b + 1), slice(h, h + 1))
            for tile, (rows, columns) in enumerate(grid):
                visible = scores.visible(items, rows, columns)
                if visible is None:
                    visible = some.new_ones(1, rows.stop - rows.start, columns.stop - columns.start)
                number[b, h, rows] += visible[0].sum(-1)
                read = visible[0].any(0)
                seen[b, columns] |= read
                some[tile] |= read.any()
    empty = frozenset((r.start, c.start) for (r, c), full in zip(grid, some.tolist(), strict=True) if not full)
    return Visibility(number.expand(-1, scores.heads, -1).flatten(0, 1), seen, empty)

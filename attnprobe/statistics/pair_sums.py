"""Sums over the keys of each row, and over the rows of each column, that every statistic of pairs is made of.

With a score ``s`` (over ln 2), ``x = s - shift`` is the logarithm to base 2 of a weight ``p``; with a compatibility
``b``, ``c = b - centre``; and with the number ``n`` of keys that the row sees, ``e = p - 1 / n``. Only visible pairs
count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.statistics.compiled import CompiledTile
from attnprobe.statistics.scores import Room

#: In the order of ``tile.c``: sums of p, p x, p^2, s, and max s; of p c, p^2 c, p c^2, p^2 c^2, and min c; of c, c^2,
#: e^2, e c, p |i - j|.
ROW_SUMS = (
    *("mass", "plogp", "square", "scores", "max_score"),
    *("pc", "ppc", "pcc", "ppcc", "min_c"),
    *("c", "cc", "ee", "ec", "distance"),
)
LARGEST = 1e30


@dataclass(frozen=True)
class Tile:
    """Some pairs of some items: their ``scores`` and ``compatibilities``, each ``[n, I, J]``.

    ``visible`` is boolean, broadcastable to that, and what it hides has a score of ``-LARGEST``; without it each row
    sees the keys before its limit, which is among the columns only where the tile is ``limited``.
    """

    index: slice
    rows: slice
    columns: slice
    scores: Tensor
    compatibilities: Tensor | None
    visible: Tensor | None
    limited: bool


class PairSums:
    """``row[name]`` is ``[N, T]``, ``usage`` (sum p over rows) ``[N, S]``.

    Args:
        limit: ``[N, T]`` int32, how many of the first keys a row sees where no mask says otherwise.
        shift: ``[N, T]``, log-sum-exp of the scores; LARGEST for a row that does not count.
        centre: ``[N, T]``, near the mean compatibility under the weights.
        place: ``[N, T]``, position of each query.
        share: ``[N, T]``, 1 / n.
        keys: ``S``.
        partial: whether there may be rows that do not count.
        extended: also sum what no core statistic needs.
        compiled: the C function, if it can be used.
    """

    def __init__(
        self,
        *,
        limit: Tensor,
        shift: Tensor,
        centre: Tensor,
        place: Tensor,
        share: Tensor,
        keys: int,
        partial: bool = True,
        extended: bool,
        compiled: CompiledTile | None = None,
    ) -> None:
        vectors = (limit, shift, centre, place, share)
        self.limit, self.shift, self.centre, self.place, self.share = (vector.contiguous() for vector in vectors)
        self.partial, self.extended, self.compiled = partial, extended, compiled
        self.sums = share.new_zeros(len(ROW_SUMS), *share.shape)
        self.row = dict(zip(ROW_SUMS, self.sums.unbind(), strict=True))
        self.row["max_score"].fill_(-LARGEST)
        self.row["min_c"].fill_(LARGEST)
        self.usage = share.new_zeros(len(share), keys)
        self._room = Room()

    def add(self, tile: Tile) -> Tensor:
        """Add the pairs of a tile, which may be overwritten; the weights, if ``extended``."""
        return self._add_pairs(tile) if self.compiled is None else self.compiled(self, tile)

    def add_key(self, index: slice, score: Tensor, compatibility: float | None) -> None:
        """Add one more key, which every row sees and which has no column; its scores are ``[n, T]``."""
        row = {name: vector[index] for name, vector in self.row.items()}
        logs = torch.clamp(score - self.shift[index], min=-LARGEST)
        weights = logs.exp2()
        row["mass"] += weights
        row["plogp"] += weights * logs
        row["square"] += weights.square()
        if compatibility is not None:
            centred, excess = compatibility - self.centre[index], weights - self.share[index]
            self._add_products(row, weights[..., None], centred[..., None])
            row["min_c"].copy_(torch.minimum(row["min_c"], centred))
            row["c"] += centred
            row["cc"] += centred.square()
            row["ee"] += excess.square()
            row["ec"] += excess * centred

    def _add_pairs(self, tile: Tile) -> Tensor:
        index, rows, columns, scores, visible = tile.index, tile.rows, tile.columns, tile.scores, tile.visible
        row = {name: vector[index, rows] for name, vector in self.row.items()}
        if visible is None and tile.limited:
            keys = torch.arange(columns.start, columns.stop, device=scores.device)
            visible = keys < self.limit[index, rows, None]
            scores = torch.where(visible, scores, -LARGEST)
        row["scores"] += (scores if visible is None else torch.where(visible, scores, 0)).sum(-1)
        row["max_score"].copy_(torch.maximum(row["max_score"], scores.amax(-1)))
        shift = self.shift[index, rows, None]
        logs = scores.sub_(shift)
        if self.partial:  # whatever a row holds that does not count
            logs = torch.where(shift >= LARGEST, -LARGEST, logs)
        weights = torch.exp2(logs, out=self._room(logs.shape, logs))
        self.usage[index, columns] += weights.sum(-2)
        row["mass"] += weights.sum(-1)
        row["plogp"] += torch.linalg.vecdot(weights, logs)
        row["square"] += torch.linalg.vector_norm(weights, dim=-1).square()
        if self.extended:
            keys = torch.arange(columns.start, columns.stop, device=logs.device, dtype=logs.dtype)
            row["distance"] += torch.linalg.vecdot(weights, (self.place[index, rows, None] - keys).abs_())
        if tile.compatibilities is not None:
            centred = tile.compatibilities.sub_(self.centre[index, rows, None])
            lowest = centred if visible is None else torch.where(visible, centred, LARGEST)
            row["min_c"].copy_(torch.minimum(row["min_c"], lowest.amin(-1)))
            if self.extended:
                self._add_alignment(row, weights - self.share[index, rows, None], centred, visible)
            self._add_products(row, weights, centred, out=logs)
        return weights

    @staticmethod
    def _add_alignment(row: dict[str, Tensor], excess: Tensor, centred: Tensor, visible: Tensor | None) -> None:
        if visible is not None:
            centred, excess = torch.where(visible, centred, 0), torch.where(visible, excess, 0)
        row["c"] += centred.sum(-1)
        row["cc"] += torch.linalg.vector_norm(centred, dim=-1).square()
        row["ee"] += torch.linalg.vector_norm(excess, dim=-1).square()
        row["ec"] += torch.linalg.vecdot(excess, centred)

    @staticmethod
    def _add_products(row: dict[str, Tensor], weights: Tensor, centred: Tensor, out: Tensor | None = None) -> None:
        weighted = torch.mul(weights, centred, out=out)
        row["pc"] += weighted.sum(-1)
        row["ppc"] += torch.linalg.vecdot(weights, weighted)
        row["pcc"] += torch.linalg.vecdot(centred, weighted)
        row["ppcc"] += torch.linalg.vector_norm(weighted, dim=-1).square()

"""Sums over the keys of each row, and over the rows of each column, that every statistic of pairs is made of.

With a score ``s`` (over ln 2), ``x = s - shift`` is the logarithm to base 2 of a weight ``p``; with a compatibility
``b``, ``c = b - centre``; and with the number ``n`` of keys that the row sees, ``e = p - 1 / n``. Only visible pairs
count.
"""

from __future__ import annotations

from collections.abc import Callable
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
_MAX_SCORE, _MIN_C = (ROW_SUMS.index(name) for name in ("max_score", "min_c"))
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
        number = len(ROW_SUMS) if extended else ROW_SUMS.index("c")
        self.sums = share.new_zeros(number, *share.shape)
        self.row = dict(zip(ROW_SUMS, self.sums.unbind(), strict=False))
        self.row["max_score"].fill_(-LARGEST)
        self.row["min_c"].fill_(LARGEST)
        self.usage = share.new_zeros(len(share), keys)
        self._room = Room()

    def add(self, tile: Tile) -> Tensor:
        """Add the pairs of a tile, which may be overwritten; the weights, if ``extended``."""
        return self._add_pairs(tile) if self.compiled is None else self.compiled(self, tile)

    def add_key(self, index: slice, score: Tensor, compatibility: float | None) -> None:
        """Add one more key, which every row sees and which has no column; its scores are ``[n, T]``."""
        sums = self.sums[:, index]
        logs = torch.clamp(score - self.shift[index], min=-LARGEST)
        weights = logs.exp2()
        _add(sums, "mass", weights, weights * logs, weights.square())
        if compatibility is not None:
            centred, excess = compatibility - self.centre[index], weights - self.share[index]
            _keep(torch.minimum, sums[_MIN_C], centred)
            if self.extended:
                _add(sums, "c", *_alignment(centred[..., None], excess[..., None]))
            _add(sums, "pc", *_products(weights[..., None], centred[..., None]))

    def _add_pairs(self, tile: Tile) -> Tensor:
        """In place wherever that is possible: a tile stays in the cache, new memory does not."""
        index, rows, columns, scores, visible = tile.index, tile.rows, tile.columns, tile.scores, tile.visible
        sums = self.sums[:, index, rows]
        if visible is None and tile.limited:
            keys = torch.arange(columns.start, columns.stop, device=scores.device)
            visible = keys < self.limit[index, rows, None]
            scores = torch.where(visible, scores, -LARGEST)
        total = (scores if visible is None else torch.where(visible, scores, 0)).sum(-1)
        _keep(torch.maximum, sums[_MAX_SCORE], scores.amax(-1))
        shift = self.shift[index, rows, None]
        logs = scores.sub_(shift)
        if self.partial:  # whatever a row holds that does not count
            logs = torch.where(shift >= LARGEST, -LARGEST, logs)
        weights = torch.exp2(logs, out=self._room(logs.shape, logs))
        self.usage[index, columns] += weights.sum(-2)
        _add(sums, "mass", weights.sum(-1), logs.mul_(weights).sum(-1), _squares(weights), total)
        if self.extended:
            keys = torch.arange(columns.start, columns.stop, device=logs.device, dtype=logs.dtype)
            distance = torch.sub(self.place[index, rows, None], keys, out=logs).abs_()
            _add(sums, "distance", distance.mul_(weights).sum(-1))
        if tile.compatibilities is not None:
            centred = tile.compatibilities.sub_(self.centre[index, rows, None])
            lowest = centred if visible is None else torch.where(visible, centred, LARGEST)
            _keep(torch.minimum, sums[_MIN_C], lowest.amin(-1))
            if self.extended:
                excess = weights - self.share[index, rows, None]
                if visible is not None:
                    centred, excess = torch.where(visible, centred, 0), torch.where(visible, excess, 0)
                _add(sums, "c", *_alignment(centred, excess))
            _add(sums, "pc", *_products(weights, centred, logs))
        return weights


def _add(sums: Tensor, first: str, *values: Tensor) -> None:
    """Add to some of the ROW_SUMS, which follow one another."""
    start = ROW_SUMS.index(first)
    sums[start : start + len(values)] += torch.stack(values)


def _keep(extreme: Callable[..., Tensor], found: Tensor, values: Tensor) -> None:
    extreme(found, values, out=found)


def _alignment(centred: Tensor, excess: Tensor) -> tuple[Tensor, ...]:
    """From "c" on; what ``excess`` holds is lost."""
    return centred.sum(-1), _squares(centred), _squares(excess), excess.mul_(centred).sum(-1)


def _products(weights: Tensor, centred: Tensor, room: Tensor | None = None) -> tuple[Tensor, ...]:
    """From "pc" on; what ``centred`` and ``room`` hold is lost."""
    weighted = torch.mul(weights, centred, out=room)
    pc, ppcc, pcc = weighted.sum(-1), _squares(weighted), centred.mul_(weighted).sum(-1)
    return pc, weighted.mul_(weights).sum(-1), pcc, ppcc


def _squares(values: Tensor) -> Tensor:
    """Their sum over the last dimension, without a tensor of them."""
    squares: Tensor = torch.linalg.vector_norm(values, dim=-1).square()
    return squares

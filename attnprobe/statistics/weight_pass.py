"""The pass over all weights: they meet the errors tile by tile, and sums over rows and columns remain."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.statistics.compiled import compiled_tile
from attnprobe.statistics.pair_sums import LARGEST, PairSums, Tile
from attnprobe.statistics.scores import Items, Room, Scores, product
from attnprobe.statistics.sums import Sums
from attnprobe.statistics.sweep import sweep_for
from attnprobe.statistics.triton_path import kernels_for

#: Statistics of pairs that no core statistic is made of.
_EXTENDED = {"self_mass", "mean_distance", "advantage_alignment", "value_grad_norm"}
#: How far the sum of a row's weights may be from 1; only usage and value gradient are not made good for it, and over
#: many rows it averages out.
_CERTAIN = {torch.float32: 1e-4, torch.float64: 1e-13}


class WeightPass:
    """Adds one record up; ``run`` may be repeated with another log-sum-exp once ``sums`` are to ``start`` again.

    Args:
        names: the statistics that are wanted.
        lengths: whether the lengths of vectors are wanted too.
    """

    def __init__(self, scores: Scores, sums: Sums, names: set[str], *, lengths: bool = True) -> None:
        self.scores, self.sums, self.record, self.lengths = scores, sums, scores.record, lengths
        self.extended = bool(names & _EXTENDED)
        self.wants_value_gradient = "value_grad_norm" in names
        self.sweep = sweep_for(scores)
        self._room = Room()

    def run(self, logsumexp: Tensor) -> None:
        """Fill ``sums``; ``logsumexp`` ``[N, T]`` is over ln 2."""
        scores, sums = self.scores, self.sums
        vectors = sums.vectors
        pairs = PairSums(
            limit=scores.limit,
            shift=logsumexp if sums.complete else torch.where(sums.rows, logsumexp, LARGEST),
            centre=vectors.centre,
            place=scores.positions.to(scores.dtype).repeat_interleave(scores.heads, 0),
            share=sums.shares,
            keys=scores.keys,
            partial=not sums.complete,
            extended=self.extended,
            compiled=compiled_tile(scores.device, scores.dtype),
        )
        if self.sweep is None:
            self._run_tiles(pairs)
        else:
            self.sweep.add(pairs, sums, lengths=self.lengths, value_gradient=self.wants_value_gradient)
            self._add_sink(scores.everything, pairs)
        if scores.plain:
            sums.count_readers()
        self._farthest = torch.where(sums.rows, pairs.row["mass"] - 1, 0).abs().amax()
        sums.finish(pairs)

    @property
    def certain(self) -> bool:
        """Whether the weights of every row added up to 1: the log-sum-exp was that of these scores."""
        return bool(self._farthest <= _CERTAIN[self.scores.dtype])

    def _run_tiles(self, pairs: PairSums) -> None:
        scores, sums, vectors = self.scores, self.sums, self.sums.vectors
        # Where asking costs nothing: no tile after the last first key has to be looked at for it.
        self._last_first = int(sums.first_key.max()) if scores.device.type == "cpu" else scores.keys
        # The value gradient needs the weights themselves, which the kernel keeps to itself.
        triton = kernels_for(scores) if self.record.kept is None and not self.wants_value_gradient else None
        for items in scores.bare_chunks() if scores.plain else scores.large_chunks():
            if scores.plain:
                items = sums.look_up(items, own=self.extended and triton is not None)
            if self.lengths:
                vectors.measure(items, queries=not scores.plain)
            error, value = vectors.errors(items), vectors.values(items)
            if triton is not None:
                triton.add(pairs, items, error, value)
            for inside, part in scores.parts(items) if triton is None else ():
                self._sweep(part, None if error is None else error[inside], value[inside], pairs)
            self._add_sink(items, pairs)

    def _sweep(self, items: Items, error: Tensor | None, value: Tensor, pairs: PairSums) -> None:
        scores = self.scores
        gradient = None
        if error is not None and self.wants_value_gradient:
            gradient = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        for rows, columns in scores.tiles():
            tile, visible = scores.unlimited_tile(items, rows, columns)
            self._look_at(items, rows, columns, tile)
            if not scores.plain:
                self._count_readers(items, rows, columns, visible, tile)
            dropout = scores.dropout(items, rows, columns)
            compatibilities = None
            if error is not None:
                compatibilities = product(error[:, rows], value[:, columns], self._room)
                if dropout is not None:
                    compatibilities *= dropout
            limited = scores.plain and scores.limited(rows, columns)
            weights = pairs.add(Tile(items.index, rows, columns, tile, compatibilities, visible, limited))
            if gradient is not None and error is not None:
                weights = weights if dropout is None else weights * dropout
                gradient[:, columns] += weights.mT @ error[:, rows]
        if gradient is not None:
            self.sums.value_gradient[items.index] = gradient.flatten(1).square().sum(-1, dtype=torch.float64)

    def _add_sink(self, items: Items, pairs: PairSums) -> None:
        """A learned sink: one key more, of value 0."""
        sink = self.scores.sink(items)
        if sink is not None:
            pairs.add_key(items.index, sink, None if self.record.error is None else 0.0)

    def _look_at(self, items: Items, rows: slice, columns: slice, tile: Tensor) -> None:
        """Two scores of each row, the first key's and its own: from the tile, where they round as in the softmax."""
        sums, scores = self.sums, self.scores
        if columns.start <= self._last_first:
            self._pick("sink_score", items, rows, columns, tile, sums.first_key[items.index, None])
        here = self.record.positions is not None or max(rows.start, columns.start) < min(rows.stop, columns.stop)
        if self.extended and sums.self_attention and here:
            own = scores.positions[items.batches, rows].repeat_interleave(items.number, 0)
            self._pick("self_score", items, rows, columns, tile, own)

    def _pick(self, name: str, items: Items, rows: slice, columns: slice, tile: Tensor, key: Tensor) -> None:
        """The score of key number ``key`` ``[n, I or 1]``, if it is in the tile and seen."""
        seen = (key >= columns.start) & (key < columns.stop)
        if self.scores.plain:
            seen = seen & (key < self.scores.limit[items.index, rows])
        where = (key - columns.start).clamp(0, tile.shape[-1] - 1).expand(-1, tile.shape[1])
        score = self.sums.row[name][items.index, rows]
        score.copy_(torch.where(seen, tile.gather(2, where[..., None])[..., 0], score))

    def _count_readers(self, items: Items, rows: slice, columns: slice, visible: Tensor | None, tile: Tensor) -> None:
        """How many rows see the columns of a tile."""
        sums, index = self.sums, items.index
        both = torch.stack([sums.rows[index, rows].to(tile.dtype), sums.shares[index, rows]], 1)
        readers = both.sum(-1, keepdim=True) if visible is None else both @ visible.to(tile.dtype).expand_as(tile)
        sums.column["rows"][index, columns] += readers[:, 0]
        sums.column["uniform"][index, columns] += readers[:, 1]

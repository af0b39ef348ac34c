"""What the two passes add up: vectors over rows ``[N, T]`` and over columns ``[N, S]``, ``N = B * H``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.statistics.scores import MASKED, Items, Scores

_SINK, _SELF, _DISTANCE = {"sink_mass"}, {"self_mass"}, {"mean_distance"}
_ALIGNMENT, _VALUE_GRADIENT = {"advantage_alignment"}, {"value_grad_norm"}


@dataclass(frozen=True)
class Block:
    """Weights of some items at some rows and columns; ``visible`` is 1 or 0, or None where all pairs are.

    A learned sink is a block of one weight for each row, and of no columns.
    """

    index: slice
    rows: slice
    columns: slice
    weights: Tensor
    visible: Tensor | None


class _Vectors(dict[str, Tensor]):
    """Zeros for a name at its first use; without a closure, whose cycle would keep the record alive."""

    def __init__(self, zeros: Tensor) -> None:
        self._zeros = zeros

    def __missing__(self, name: str) -> Tensor:
        self[name] = vector = torch.zeros_like(self._zeros)
        return vector


class Sums:
    """Accumulators of one record; ``row[name]`` is ``[N, T]``, ``column[name]`` ``[N, S]``, scores and
    entropies are in units of ln 2."""

    def __init__(self, scores: Scores, names: set[str]) -> None:
        self.scores, self.record, self.names = scores, scores.record, names
        self.row, self.column = _Vectors(self._zeros(scores.queries)), _Vectors(self._zeros(scores.keys))
        self.logsumexp, self.max_logit = self._zeros(scores.queries), self._zeros(scores.queries)
        self.mean_logit, self.visible_keys = self._zeros(scores.queries), self._zeros(scores.queries)
        self.seen = self._zeros(scores.keys).bool()
        self.value_gradient: Tensor | None = None
        if self.record.error is not None:
            self.row["advantage_min"].fill_(torch.inf)
            if names & _VALUE_GRADIENT:
                shape = (scores.count, scores.keys, self.record.value.shape[-1])
                self.value_gradient = torch.zeros(shape, dtype=scores.dtype, device=scores.device)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(self.scores.count, size, dtype=self.scores.dtype, device=self.scores.device)

    @property
    def self_attention(self) -> bool:
        return self.record.self_attention is True and self.scores.queries == self.scores.keys

    def add_scores(self, items: Items, logsumexp: Tensor, largest: Tensor, mean: Tensor, number: Tensor) -> None:
        """Keep what the first pass found, each ``[N, T]``."""
        self.logsumexp[items.index], self.max_logit[items.index] = logsumexp, largest
        self.mean_logit[items.index], self.visible_keys[items.index] = mean, number

    def find_padding(self) -> None:
        """Set ``keys_seen``, ``key_tokens`` ``[B, S]``, ``query_tokens`` ``[B, T]`` and ``rows`` ``[N, T]``."""
        scores, record = self.scores, self.record
        self.keys_seen = self.seen.unflatten(0, (scores.batch, scores.heads)).any(1)
        keys, queries = record.key_tokens, record.query_tokens
        if self.self_attention:
            keys, queries = (queries if keys is None else keys), (keys if queries is None else queries)
        self.key_tokens = self.keys_seen if keys is None else keys.to(scores.device, torch.bool)
        if queries is not None:
            self.query_tokens = queries.to(scores.device, torch.bool)
        elif self.self_attention:
            self.query_tokens = self.key_tokens
        else:
            self.query_tokens = torch.ones(scores.batch, scores.queries, dtype=torch.bool, device=scores.device)
        self.rows = self.query_tokens.repeat_interleave(scores.heads, 0) & (self.visible_keys > 0)
        self.complete = bool(self.rows.all())
        self.first_key = self.key_tokens.int().argmax(-1).repeat_interleave(scores.heads)

    def vectors(self, items: Items) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values ``[N, S, E]``, errors ``[N, T, E]`` and ``u . o`` ``[N, T]`` of the items.

        Keys that no query sees and rows that do not count are zeroed: whatever garbage padding holds,
        it must not reach the sums through ``0 * NaN``.
        """
        take, record = self.scores.take, self.record
        value = take(record.value, items.batch, items.head)
        value = value.masked_fill(~self.keys_seen[items.batch][..., None], 0)
        if record.error is None:
            return value, None, None
        outside = ~self.rows[items.index][..., None]
        error = take(record.error, items.batch, items.head).masked_fill(outside, 0)
        output = take(record.output, items.batch, items.head).masked_fill(outside, 0)
        self.row["u.o"][items.index] = centre = (error * output).sum(-1)
        return value, error, centre

    def add_routing(self, block: Block, log_weights: Tensor) -> None:
        """Entropy, concentration, column usage, sink, self and distance of one block."""
        self.add_spread(block, log_weights)
        index, rows, columns, weights = block.index, block.rows, block.columns, block.weights
        counts = self.rows[index, rows].to(weights.dtype)
        shares = torch.where(counts > 0, counts / self.visible_keys[index, rows], 0)
        both = torch.stack([counts, shares], 1)
        seen = both.sum(-1, keepdim=True) if block.visible is None else both @ block.visible.expand_as(weights)
        self.column["rows"][index, columns] += seen[:, 0]
        self.column["uniform"][index, columns] += seen[:, 1]
        self.column["mass"][index, columns] += weights.sum(-2)
        if self.names & _SINK:
            self._add_sink(block)
        if self.self_attention and self.names & _SELF:
            first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
            if first < last:
                inner = weights[:, first - rows.start : last - rows.start, first - columns.start : last - columns.start]
                self.row["self_mass"][index, first:last] = inner.diagonal(dim1=1, dim2=2)
        if self.self_attention and self.names & _DISTANCE:
            i, j = (torch.arange(s.start, s.stop, device=weights.device, dtype=weights.dtype) for s in (rows, columns))
            self.row["distance"][index, rows] += (weights * (i[:, None] - j).abs()).sum(-1)

    def add_spread(self, block: Block, log_weights: Tensor) -> None:
        """Entropy and concentration of one block."""
        self.row["entropy"][block.index, block.rows] -= (block.weights * log_weights).sum(-1)
        self.row["concentration"][block.index, block.rows] += block.weights.square().sum(-1)

    def _add_sink(self, block: Block) -> None:
        """Attention sink: weight on the first token of each sequence, and whether the row sees it."""
        first, start = self.first_key[block.index], block.columns.start
        inside = ((first >= start) & (first < block.columns.stop))[:, None]
        where = (first - start).clamp(0, block.weights.shape[-1] - 1)[:, None, None]
        where = where.expand(-1, block.weights.shape[1], 1)
        self.row["sink_mass"][block.index, block.rows] += block.weights.gather(2, where)[..., 0] * inside
        sees = inside.to(block.weights.dtype)
        if block.visible is not None:
            sees = sees * block.visible.expand_as(block.weights).gather(2, where)[..., 0]
        self.row["sees_sink"][block.index, block.rows] += sees

    def add_value_gradient(self, block: Block, error: Tensor, dropout: Tensor | None) -> None:
        if self.value_gradient is not None:
            weights = block.weights if dropout is None else block.weights * dropout
            self.value_gradient[block.index, block.columns] += weights.mT @ error

    def add_advantages(self, block: Block, centred: Tensor) -> None:
        """Sums over keys of ``c_ij = b_ij - u_i . o_i``, which is ``b_ij - E_i`` up to rounding or unknown dropout."""
        index, rows, weights, visible = block.index, block.rows, block.weights, block.visible
        lowest = (centred if visible is None else centred + (visible - 1).mul_(MASKED)).amin(-1)
        self.row["advantage_min"][index, rows] = torch.minimum(self.row["advantage_min"][index, rows], lowest)
        if self.names & _ALIGNMENT:
            self._add_alignment(block, centred if visible is None else centred * visible)
        weighted = weights * centred
        self.row["pc"][index, rows] += weighted.sum(-1)
        self.row["pcc"][index, rows] += (weighted * centred).sum(-1)
        self.row["ppc"][index, rows] += (weighted * weights).sum(-1)
        self.row["ppcc"][index, rows] += weighted.square().sum(-1)

    def _add_alignment(self, block: Block, centred: Tensor) -> None:
        """Moments for the correlation over visible keys of weight and compatibility."""
        index, rows, visible = block.index, block.rows, block.visible
        excess = block.weights - 1 / self.visible_keys[index, rows, None]
        if visible is not None:
            excess *= visible
        self.row["c"][index, rows] += centred.sum(-1)
        self.row["cc"][index, rows] += centred.square().sum(-1)
        self.row["ee"][index, rows] += excess.square().sum(-1)
        self.row["ec"][index, rows] += (excess * centred).sum(-1)

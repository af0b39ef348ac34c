"""Scores of a record, tile by tile, with what each query may see.

Heads of all sequences are *items* ``n = b * H + h``; a few items share a tile ``[N, I, J]`` when
``T`` is small, so that short sequences do not drown in per-call overhead. Nothing here is of
size ``T x S`` per head, unless the model made it (``logits``).

Scores are in units of ln 2: torch's ``exp`` is 15 times slower where it underflows, ``exp2`` is not;
and masking adds a large negative number, because ``masked_fill`` costs more than the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.modifications import Modification

ROWS, COLUMNS = 256, 1024
LN2 = math.log(2)
#: Stands for -inf in a tile: its weight underflows to 0, and 0 times it is 0 rather than NaN.
MASKED = -1e30
#: An additive value, or a logit, from here down means "masked" (Hugging Face writes -1e4 and lower).
MASK_VALUE = -1e4


@dataclass(frozen=True)
class Items:
    """Some heads of some sequences: their indices and their own copies of the inputs in the working dtype."""

    index: slice
    batch: Tensor
    head: Tensor
    query: Tensor | None
    key: Tensor | None


class Scores:
    """Tiles of the scores of one record, in float64 for float64 inputs, else float32."""

    def __init__(self, record: AttentionRecord) -> None:
        self.record = record
        self.batch, self.heads, self.groups, self.queries, self.keys = record.shape
        self.dtype = torch.float64 if record.value.dtype == torch.float64 else torch.float32
        self.device = record.value.device
        self.threshold = _mask_threshold(record)
        sizes = (self.batch, self.heads, self.queries, self.keys)
        self.score_mod = self.mask_mod = None
        if record.score_mod is not None:
            self.score_mod = Modification(record.score_mod, sizes, self.device, self.dtype)
        if record.mask_mod is not None:
            self.mask_mod = Modification(record.mask_mod, sizes, self.device)
        self._triangles: dict[tuple[int, int, int], Tensor] = {}

    @property
    def count(self) -> int:
        return self.batch * self.heads

    def chunks(self) -> Iterator[Items]:
        tile = min(ROWS, self.queries) * min(COLUMNS, self.keys)
        size = max(1, ROWS * COLUMNS // max(1, tile))
        for start in range(0, self.count, size):
            index = slice(start, min(start + size, self.count))
            n = torch.arange(index.start, index.stop, device=self.device)
            batch, head = n // self.heads, n % self.heads
            query = key = None
            if self.record.logits is None:
                factor = self.record.scale / (1 if self.score_mod else LN2)
                query = self.take(self.record.query, batch, head) * factor
                key = self.take(self.record.key, batch, head)
            yield Items(index, batch, head, query, key)

    def take(self, tensor: Tensor | None, batch: Tensor, head: Tensor) -> Tensor:
        """``[B, H or G, ...]`` -> ``[N, ...]`` in the working dtype; a group serves its query heads."""
        assert tensor is not None
        return tensor[batch, head * tensor.shape[1] // self.heads].to(self.dtype)

    def sink(self, items: Items) -> Tensor | None:
        """Learned sink logits / ln 2 of the items ``[N, T]``."""
        if self.record.sink is None:
            return None
        return (self.take(self.record.sink, items.batch, items.head) / LN2).clamp_(min=MASKED)

    def dropout(self, items: Items, rows: slice, columns: slice) -> Tensor | None:
        """What dropout multiplied the weights by ``[N, I, J]``; None where there was none, or it is unknown."""
        if self.record.kept is None:
            return None
        kept = self.record.kept[:, :, rows, columns][items.batch, items.head]
        return kept.to(self.dtype) * self.record.survivor_factor

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        for top in range(0, self.queries, ROWS):
            rows = slice(top, min(top + ROWS, self.queries))
            for left in range(0, self.keys, COLUMNS):
                if self.record.logits is None and self.record.causal and left >= rows.stop:
                    break
                yield rows, slice(left, min(left + COLUMNS, self.keys))

    def tile(self, items: Items, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Scores / ln 2 ``[N, I, J]``, <= MASKED where the query does not see the key, and who sees whom.

        The latter is 1 or 0 in the working dtype, ``[N or 1, I, J]``; None where every query sees every key.
        """
        record = self.record
        visible: Tensor | None = None
        mask = self._mask_tile(items, rows, columns)
        if record.logits is not None:
            scores = record.logits[:, :, rows, columns][items.batch, items.head].to(self.dtype)
        else:
            assert items.query is not None
            assert items.key is not None
            scores = items.query[:, rows] @ items.key[:, columns].mT
        if self.score_mod:
            scores = self.score_mod(items.batch, items.head, rows, columns, scores).to(self.dtype)
        if record.logits is not None or self.score_mod:
            visible = ~(scores <= MASK_VALUE)  # a NaN is visible: it is a finding, not a mask
            scores = (scores / LN2).clamp_(min=MASKED)
        if self.mask_mod:
            unmasked = self.mask_mod(items.batch, items.head, rows, columns)
            visible = unmasked if visible is None else visible & unmasked
        if mask is not None:
            if record.logits is None and mask.dtype != torch.bool:
                scores += (mask / LN2).clamp_(min=MASKED)
            unmasked = mask if mask.dtype == torch.bool else ~(mask <= self.threshold)
            visible = unmasked if visible is None else visible & unmasked
        seen = None if visible is None else visible.to(self.dtype)
        if record.logits is None and record.causal and columns.stop - 1 > rows.start:
            triangle = self._triangle(rows.start - columns.start, rows.stop - rows.start, columns.stop - columns.start)
            seen = triangle if seen is None else seen * triangle
        if seen is not None:
            scores += (1 - seen).mul_(MASKED)
        return scores, seen

    def _triangle(self, offset: int, rows: int, columns: int) -> Tensor:
        """``[1, I, J]``: 1 where key ``j <= i + offset``; all diagonal tiles of one shape share it."""
        key = (offset, rows, columns)
        if key not in self._triangles:
            ones = torch.ones(rows, columns, dtype=self.dtype, device=self.device)
            self._triangles[key] = ones.tril_(offset)[None]
        return self._triangles[key]

    def _mask_tile(self, items: Items, rows: slice, columns: slice) -> Tensor | None:
        mask = self.record.mask
        if mask is None:
            return None
        mask = mask.expand(self.batch, self.heads, self.queries, self.keys)[:, :, rows, columns]
        shared = mask.stride(0) == 0 and mask.stride(1) == 0
        tile = mask[:1, 0] if shared else mask[items.batch, items.head]
        return tile if tile.dtype == torch.bool else tile.to(self.dtype)


def _mask_threshold(record: AttentionRecord) -> float:
    """The additive value from which on a pair counts as masked.

    A mask that holds exactly two values, 0 and something at or below -50, is a mask whatever its lower value. So is
    one with nothing between -75 and -25 and something below: a bias to which a mask of 0 and -100 was added. Any
    other additive mask is a bias that may also mask.
    """
    mask = record.mask
    if mask is None or mask.dtype == torch.bool or mask.numel() == 0:
        return MASK_VALUE
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:  # expanded: one slice says it all
            mask = mask.narrow(dim, 0, 1)
    low, high = mask.amin(), mask.amax()
    strips = mask.split(max(1, ROWS * COLUMNS * mask.shape[-2] // mask.numel()), -2) if mask.ndim > 1 else (mask,)
    binary = torch.stack([((strip == 0) | (strip == low)).all() for strip in strips]).all()
    gap = torch.stack([((strip <= -75) | (strip >= -25)).all() for strip in strips]).all()
    two_levels = torch.where(binary & (low <= -50) & (high == 0), low, MASK_VALUE)
    return max(float(torch.where(gap & (low <= -75) & (high >= -25), -50, two_levels)), MASK_VALUE)

"""Scores of a record, tile by tile, with what each query may see.

Heads of all sequences are *items* ``n = b * H + h``; a few items share a tile ``[n, I, J]`` when
``T`` is small, so that short sequences do not drown in per-call overhead. Nothing here is of
size ``T x S`` per head, unless the model made it (``logits``).

Scores are in units of ln 2: torch's ``exp`` is 15 times slower where it underflows, ``exp2`` is not.
What is masked holds a large negative number: its weight underflows to 0, and 0 times it is 0 rather than NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.compiler import usable
from attnprobe.statistics.modifications import Modification

#: Pairs in a tile. On the CPU it has to fit into the second cache of a core: two of them in single precision for the
#: compiled pass, and more, as torch goes over a tile many times. Other devices want much to do at once.
COMPILED_PAIRS, PAIRS, DEVICE_PAIRS = 2**18, 2**17, 2**22
ROWS, COLUMNS, LEAST_ROWS = 256, 256, 128
#: Queries or keys whose vectors are looked at together.
VECTORS = 4096
LN2 = math.log(2)
#: Stands for -inf in a tile.
MASKED = -1e30
#: An additive value, or a logit, from here down means "masked" (Hugging Face writes -1e4 and lower).
MASK_VALUE = -1e4


@dataclass(frozen=True)
class Items:
    """Some heads of some sequences and their queries and keys in the working dtype.

    ``query`` is over ln 2 and ``[n, T, D]``, ``key`` ``[n, S, D]``; None where only logits are known.
    """

    index: slice
    batches: slice
    heads: slice
    query: Tensor | None = None
    key: Tensor | None = None

    @property
    def number(self) -> int:
        """Of heads."""
        return int(self.heads.stop - self.heads.start)


class Room:
    """Memory that is used again and again: new memory for each tile would cost more than what is done in it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._views: dict[Sequence[int], Tensor] = {}

    def __call__(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = math.prod(shape)
        if self._memory is None or len(self._memory) < size:
            self._memory = torch.empty(size, dtype=like.dtype, device=like.device)
            self._views.clear()
        if shape not in self._views:
            self._views[shape] = self._memory[:size].view(shape)
        return self._views[shape]


class Scores:
    """Tiles of the scores of one record, in float64 for float64 inputs, else float32."""

    def __init__(self, record: AttentionRecord) -> None:
        self.record = record
        self.batch, self.heads, self.groups, self.queries, self.keys = record.shape
        self.count = self.batch * self.heads
        #: Whether the scores themselves say what is masked.
        self.masked_by_scores = record.logits is not None or record.score_mod is not None
        self.causal = record.causal and record.logits is None
        #: Whether each row sees the keys before its limit, and that is all.
        self.plain = not self.masked_by_scores and record.mask is None and record.mask_mod is None
        self.dtype = torch.float64 if record.value.dtype == torch.float64 else torch.float32
        self.device = record.value.device
        self.threshold = mask_threshold(record)
        sizes = (self.batch, self.heads, self.queries, self.keys)
        self.score_mod = self.mask_mod = None
        if record.score_mod is not None:
            self.score_mod = Modification(record.score_mod, sizes, self.device, self.dtype)
        if record.mask_mod is not None:
            self.mask_mod = Modification(record.mask_mod, sizes, self.device)
        self.empty: frozenset[tuple[int, int]] = frozenset()
        self._room = Room()
        self._reach: list[int] | None = None
        if record.positions is not None:  # asking the device would make it wait
            on_host = self.device.type == "cpu"
            self._reach = record.positions.amax(0).tolist() if on_host else [self.keys - 1] * self.queries
        # A causal tile is half wasted where it stands on the diagonal: smaller steps, smaller waste.
        pairs = _pairs(self.device, self.dtype)
        self.columns = max(1, min(COLUMNS, self.keys))
        rows = max(LEAST_ROWS, min(ROWS, self.queries // 8)) if self.causal else pairs // self.columns
        self.rows = max(1, min(rows, self.queries))
        self.at_once = max(1, pairs // (self.rows * self.columns))  # items that share a tile

    @property
    def factor(self) -> float:
        """On queries, which makes them give scores / ln 2."""
        return self.record.scale / (1 if self.score_mod else LN2)

    @property
    def masks_differ(self) -> bool:
        """Whether heads may have masks of their own."""
        mask = self.record.mask
        own = mask is not None and mask.ndim > 2 and mask.shape[-3] > 1 and mask.stride(-3) != 0
        return own or self.mask_mod is not None

    @cached_property
    def positions(self) -> Tensor:
        """``[B, T]``, where each query stands."""
        if self.record.positions is not None:
            return self.record.positions
        return torch.arange(self.queries, device=self.device).expand(self.batch, -1)

    @cached_property
    def limit(self) -> Tensor:
        """``[N, T]`` int32: how many of the first keys a row may see."""
        limit = (self.positions + 1).clamp(max=self.keys) if self.causal else torch.full_like(self.positions, self.keys)
        return limit.int().repeat_interleave(self.heads, 0)

    @property
    def everything(self) -> Items:
        """All items, without queries and keys."""
        return Items(slice(0, self.count), slice(0, self.batch), slice(0, self.heads))

    def chunks(self) -> Iterator[Items]:
        """All items, with as many at a time as share a tile."""
        return self._chunks(self.at_once)

    def large_chunks(self) -> Iterator[Items]:
        """All items, with as many at a time as make it worth while to call torch for their vectors."""
        return self._chunks(self._vectors_at_once)

    @property
    def _vectors_at_once(self) -> int:
        """A multiple of ``at_once``."""
        return self.at_once * max(1, VECTORS // (self.at_once * max(self.queries, self.keys)))

    def parts(self, items: Items) -> Iterator[tuple[slice, Items]]:
        """A large chunk as those that share a tile, and where in it they are."""
        first, step = items.index.start, self.at_once
        whole = len(range(self.heads)[items.heads]) == self.heads and step >= self.heads
        step = step // self.heads * self.heads if whole else min(step, self.heads)
        start = first
        while start < items.index.stop:
            stop = min(start + step, items.index.stop, *([] if whole else [(start // self.heads + 1) * self.heads]))
            batches = slice(start // self.heads, (stop - 1) // self.heads + 1)
            heads = slice(start % self.heads, (stop - 1) % self.heads + 1)
            inside = slice(start - first, stop - first)
            query, key = (None if x is None else x[inside] for x in (items.query, items.key))
            yield inside, Items(slice(start, stop), batches, heads, query, key)
            start = stop

    def bare_chunks(self) -> Iterator[Items]:
        """The same without queries and keys."""
        return self._slices(self._vectors_at_once)

    def _chunks(self, size: int) -> Iterator[Items]:
        for items in self._slices(size):
            if self.record.logits is None:
                query, key = self.take(self.record.query, items) * self.factor, self.take(self.record.key, items)
                items = replace(items, query=query, key=key)
            yield items

    def _slices(self, size: int) -> Iterator[Items]:
        whole = max(1, size // self.heads)  # sequences, or else heads of one
        step = min(size, self.heads)
        for b in range(0, self.batch, whole):
            batches = slice(b, min(b + whole, self.batch))
            for h in range(0, self.heads, step):
                heads = slice(h, min(h + step, self.heads))
                index = slice(b * self.heads + h, (batches.stop - 1) * self.heads + heads.stop)
                yield Items(index, batches, heads)

    def take(self, tensor: Tensor | None, items: Items) -> Tensor:
        """``[B, H or G, ...]`` -> ``[n, ...]`` in the working dtype; a group serves its query heads."""
        assert tensor is not None
        return self.select(tensor, items).flatten(0, 1).to(self.dtype)

    def select(self, tensor: Tensor, items: Items) -> Tensor:
        """``[B, H or G, ...]`` -> ``[b, h, ...]``, a view unless a group serves several heads."""
        if tensor.shape[1] == self.heads:
            return tensor[items.batches, items.heads]
        groups = torch.arange(items.heads.start, items.heads.stop, device=self.device) * tensor.shape[1] // self.heads
        return tensor[items.batches, groups]

    def sink(self, items: Items) -> Tensor | None:
        """Learned sink logits / ln 2 of the items ``[n, T]``."""
        if self.record.sink is None:
            return None
        return (self.take(self.record.sink, items) / LN2).clamp_(min=MASKED)

    def dropout(self, items: Items, rows: slice, columns: slice) -> Tensor | None:
        """What dropout multiplied the weights by ``[n, I, J]``; None where there was none, or it is unknown."""
        if self.record.kept is None:
            return None
        kept = self.select(self.record.kept, items)[:, :, rows, columns].flatten(0, 1)
        return kept.to(self.dtype) * self.record.survivor_factor

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the tiles in which a query may see a key."""
        for top in range(0, self.queries, self.rows):
            rows = slice(top, min(top + self.rows, self.queries))
            for left in range(0, self.keys, self.columns):
                if self.causal and left > self._last(rows):
                    break
                if (top, left) not in self.empty:
                    yield rows, slice(left, min(left + self.columns, self.keys))

    def limited(self, rows: slice, columns: slice) -> bool:
        """Whether causality hides a pair of a tile."""
        return self.causal and (self.record.positions is not None or columns.stop - 1 > rows.start)

    def tile(self, items: Items, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Scores / ln 2 ``[n, I, J]``, <= MASKED where the query does not see the key, and who sees whom.

        The latter is boolean, ``[n or 1, I, J]``; None where every query sees every key. The former is valid until
        the next call.
        """
        scores, visible = self.unlimited_tile(items, rows, columns)
        if self.plain and self.limited(rows, columns):
            visible = self._before_limit(items, rows, columns)
            scores = torch.where(visible, scores, MASKED)
        return scores, visible

    def unlimited_tile(self, items: Items, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """``tile`` without causality where there is no other mask."""
        if self.record.logits is not None:
            scores = self.select(self.record.logits, items)[:, :, rows, columns].flatten(0, 1).to(self.dtype)
        else:
            assert items.query is not None
            assert items.key is not None
            query, key = items.query[:, rows], items.key[:, columns]
            scores = product(query, key, self._room)
        if self.plain:
            return scores, None
        visible: Tensor | None = None
        if self.score_mod:
            scores = self.score_mod(*self._indices(items), rows, columns, scores).to(self.dtype)
        if self.masked_by_scores:
            visible = ~(scores <= MASK_VALUE)  # a NaN is visible: it is a finding, not a mask
            scores = (scores / LN2).clamp_(min=MASKED)
        mask = self.record.mask
        if mask is not None and mask.dtype != torch.bool and self.record.logits is None:
            scores += (self._mask_tile(mask, items, rows, columns).to(self.dtype) / LN2).clamp_(min=MASKED)
        unmasked = self.visible(items, rows, columns)
        if unmasked is not None:
            visible = unmasked if visible is None else visible & unmasked
        if visible is not None:
            scores = torch.where(visible, scores, MASKED)
        return scores, visible

    def visible(self, items: Items, rows: slice, columns: slice) -> Tensor | None:
        """Who sees whom as far as that is known without the scores, boolean ``[n or 1, I, J]``; None if all do."""
        visible = None
        if self.mask_mod:
            visible = self.mask_mod(*self._indices(items), rows, columns)
        if self.record.mask is not None:
            mask = self._mask_tile(self.record.mask, items, rows, columns)
            mask = mask if mask.dtype == torch.bool else ~(mask <= self.threshold)
            visible = mask if visible is None else visible & mask
        if self.limited(rows, columns):
            before = self._before_limit(items, rows, columns)
            visible = before if visible is None else visible & before
        return visible

    def _before_limit(self, items: Items, rows: slice, columns: slice) -> Tensor:
        keys = torch.arange(columns.start, columns.stop, device=self.device)
        if self.record.positions is None:
            return (keys <= torch.arange(rows.start, rows.stop, device=self.device)[:, None])[None]
        return keys <= self.record.positions[items.batches, rows].repeat_interleave(items.number, 0)[..., None]

    def _last(self, rows: slice) -> int:
        """The last key that one of these causal rows may see."""
        return int(rows.stop - 1 if self._reach is None else self._reach[rows.stop - 1])

    def _indices(self, items: Items) -> tuple[Tensor, Tensor]:
        """Sequence and head of each item, ``[n]``."""
        n = torch.arange(items.index.start, items.index.stop, device=self.device)
        return n // self.heads, n % self.heads

    def _mask_tile(self, mask: Tensor, items: Items, rows: slice, columns: slice) -> Tensor:
        mask = mask.expand(self.batch, self.heads, self.queries, self.keys)[:, :, rows, columns]
        shared = mask.stride(0) == 0 and mask.stride(1) == 0
        return mask[:1, 0] if shared else mask[items.batches, items.heads].flatten(0, 1)


def _pairs(device: torch.device, dtype: torch.dtype) -> int:
    """In a tile."""
    if device.type != "cpu":
        return DEVICE_PAIRS
    threads = max(1, min(torch.get_num_threads(), 8))
    return threads * (COMPILED_PAIRS if usable(device, dtype) else PAIRS)


def product(left: Tensor, right: Tensor, room: Room) -> Tensor:
    """``left @ right^T`` of ``[n, I, X]`` and ``[n, J, X]``, in the room."""
    return torch.bmm(left, right.mT, out=room((left.shape[0], left.shape[1], right.shape[1]), left))


def mask_threshold(record: AttentionRecord) -> float:
    """The additive value from which on a pair counts as masked.

    A mask that holds exactly two values, 0 and something at or below -50, is a mask whatever its lower value. So is
    one with nothing between -75 and -25 and something below: a bias to which a mask of 0 and -100 was added. Any
    other additive mask is a bias that may also mask.
    """
    if record.mask_threshold is not None:
        return record.mask_threshold
    mask = record.mask
    if mask is None or mask.dtype == torch.bool or mask.numel() == 0:
        return MASK_VALUE
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:  # expanded: one slice says it all
            mask = mask.narrow(dim, 0, 1)
    low, high = mask.amin(), mask.amax()
    strips = mask.split(max(1, PAIRS * mask.shape[-2] // mask.numel()), -2) if mask.ndim > 1 else (mask,)
    binary = torch.stack([((strip == 0) | (strip == low)).all() for strip in strips]).all()
    gap = torch.stack([((strip <= -75) | (strip >= -25)).all() for strip in strips]).all()
    two_levels = torch.where(binary & (low <= -50) & (high == 0), low, MASK_VALUE)
    return max(float(torch.where(gap & (low <= -75) & (high >= -25), -50, two_levels)), MASK_VALUE)

"""The sums of ``pair_sums`` over a tile as a single pass in C: a third of the time of torch's."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnprobe.statistics.compiler import load, usable

if TYPE_CHECKING:
    from attnprobe.statistics.pair_sums import PairSums, Tile

ERROR, EXTENDED, MASKED = 1, 2, 4


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="attnprobe")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_threads.cache_clear)


def together(work: Sequence[Callable[[], None]]) -> None:
    """At the same time; nothing of it runs on when this has been interrupted."""
    if len(work) == 1:
        work[0]()
        return
    submitted = [_threads().submit(each) for each in work]
    try:
        for done in submitted:
            done.result()
    finally:
        for left in submitted:
            left.cancel()
        wait(submitted)


class CompiledTile:
    """Adds a tile of float32 pairs on the CPU to ``PairSums``."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, sums: PairSums, tile: Tile) -> Tensor:
        """Add the tile; the weights, if ``sums`` are extended."""
        if not tile.scores.is_contiguous():  # the model's own, where it laid them out in another way
            tile = replace(tile, scores=tile.scores.contiguous())
        items, rows, columns = tile.scores.shape
        number = torch.get_num_threads()
        if number == 1:
            self._add(sums, tile, slice(0, items), slice(0, rows), sums.usage[tile.index, tile.columns])
            return tile.scores
        # A share of the rows, and with it usage of its own, for each thread.
        step = max(1, -(-rows * items // number))
        parts = [(n, slice(i, min(i + step, rows))) for n in range(items) for i in range(0, rows, step)]
        usages = sums.usage.new_zeros(len(parts), 1, columns)
        work = zip(parts, usages, strict=True)
        together([partial(self._add, sums, tile, slice(n, n + 1), i, u) for (n, i), u in work])
        for (n, _), usage in zip(parts, usages, strict=True):
            sums.usage[tile.index.start + n, tile.columns] += usage[0]
        return tile.scores

    def _add(self, sums: PairSums, tile: Tile, items: slice, rows: slice, usage: Tensor) -> None:
        scores, compatibilities = tile.scores, tile.compatibilities
        first = tile.index.start + items.start
        whole = scores.shape[1]
        skipped = 4 * (items.start * whole + rows.start) * scores.shape[2]
        length = sums.share.shape[1]
        row = first * length + tile.rows.start + rows.start
        what = (EXTENDED if sums.extended else 0) | (MASKED if tile.visible is not None else 0)
        self._function(
            _address(scores, skipped),
            None if compatibilities is None else _address(compatibilities, skipped),
            items.stop - items.start,
            rows.stop - rows.start,
            scores.shape[2],
            tile.columns.start,
            _address(sums.limit, 4 * row),
            *(_address(vector, 4 * row) for vector in (sums.shift, sums.centre, sums.share, sums.place)),
            length,
            _address(sums.sums, 4 * row),
            sums.share.numel(),
            _address(usage),
            usage.stride(0),
            what | (0 if compatibilities is None else ERROR),
        )


def _address(tensor: Tensor, offset: int = 0) -> int:
    return tensor.data_ptr() + offset


def compiled_tile(device: torch.device, dtype: torch.dtype) -> CompiledTile | None:
    """The compiled pass, where it can be used."""
    return CompiledTile(library().attnprobe_tile) if usable(device, dtype) else None


def library() -> ctypes.CDLL:
    loaded = load()[0]
    assert loaded is not None
    return loaded

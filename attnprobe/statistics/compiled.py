"""The sums of ``pair_sums`` and the lengths of ``vectors`` as single passes in C: a third of the time of torch's."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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


class CompiledTile:
    """Adds a tile of float32 pairs on the CPU to ``PairSums``."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, sums: PairSums, tile: Tile) -> Tensor:
        """Add the tile; the weights, if ``sums`` are extended."""
        if not tile.scores.is_contiguous():  # the model's own, where it laid them out in another way
            tile = replace(tile, scores=tile.scores.contiguous())
        items, rows, columns = tile.scores.shape
        threads = torch.get_num_threads()
        if threads == 1:
            self._add(sums, tile, slice(0, items), slice(0, rows), sums.usage[tile.index, tile.columns])
            return tile.scores
        # A share of the rows, and with it usage of its own, for each thread.
        step = max(1, -(-rows * items // threads))
        parts = [(n, slice(i, min(i + step, rows))) for n in range(items) for i in range(0, rows, step)]
        usages = sums.usage.new_zeros(len(parts), 1, columns)
        work = zip(parts, usages, strict=True)
        for done in [_threads().submit(self._add, sums, tile, slice(n, n + 1), i, u) for (n, i), u in work]:
            done.result()
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
    return CompiledTile(_library().attnprobe_tile) if usable(device, dtype) else None


def _library() -> ctypes.CDLL:
    library = load()[0]
    assert library is not None
    return library


def scaled(vectors: Tensor, factor: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``vectors`` ``[n, T, D]`` times ``factor`` ``[n]``, their lengths, products with ``other``, and its lengths."""
    other = other.expand_as(vectors)
    copy = torch.empty(vectors.shape)
    length, product, other_length = torch.empty(3, *vectors.shape[:2])
    outputs = (x.data_ptr() for x in (copy, length, product, other_length))
    inputs = (*_given(vectors), factor.data_ptr(), other.data_ptr(), *other.stride()[:2])
    _library().attnprobe_vectors(*inputs, *outputs, length.shape[1])
    return copy, length, product, other_length


def lengths(vectors: Tensor) -> Tensor:
    """Of ``vectors`` ``[n, T, D]``."""
    length = torch.empty(vectors.shape[:2])
    nothing = (None, None, 0, 0, None)
    _library().attnprobe_vectors(*_given(vectors), *nothing, length.data_ptr(), None, None, length.shape[1])
    return length


def largest(vectors: Tensor) -> Tensor:
    """Largest absolute value of each item, ``[n]``; NaN if there is one."""
    found = torch.empty(len(vectors))
    _library().attnprobe_largest(*_given(vectors), found.data_ptr())
    return found


def _given(vectors: Tensor) -> tuple[int, ...]:
    """A tensor whose last dimension is contiguous, as the C functions take it."""
    return (vectors.data_ptr(), *vectors.shape, *vectors.stride()[:2])


def differs(library: Any) -> bool:
    """Whether the compiled pass and torch disagree on a tile of everything."""
    from attnprobe.statistics.pair_sums import PairSums, Tile

    wave = torch.arange(2 * 5 * 67, dtype=torch.float32).view(2, 5, 67).sin()
    limit = torch.tensor([[67, 1, 0, 40, 67]] * 2, dtype=torch.int32)
    results = []
    for compiled in (CompiledTile(library.attnprobe_tile), None):
        shift = limit.clamp(min=1).log2()
        vectors = {"limit": limit, "shift": shift, "centre": shift.sin(), "place": limit.float()}
        sums = PairSums(**vectors, share=(-shift).exp2(), keys=67, extended=True, compiled=compiled)
        index, rows, columns = slice(0, 2), slice(0, 5), slice(0, 67)
        sums.add(Tile(index, rows, columns, 4 * wave, wave.roll(1), None, limited=True))
        results.append((sums.sums, sums.usage))
    return not all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(*results, strict=True))

"""The sums of ``pair_sums`` and the lengths of ``vectors`` as single passes in C: a third of the time of torch's."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
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


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_threads.cache_clear)


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


def scaled(
    vectors: Tensor, factor: Tensor, other: Tensor, library: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``vectors`` ``[n, T, D]`` times ``factor`` ``[n]``, their lengths, products with ``other``, and its lengths."""
    other = other.expand_as(vectors)
    copy = _empty(vectors.shape)
    length, product, other_length = (_empty(vectors.shape[:2]) for _ in range(3))
    outputs = (x.data_ptr() for x in (copy, length, product, other_length))
    inputs = (*_given(vectors), factor.data_ptr(), other.data_ptr(), *other.stride()[:2])
    (library or _library()).attnprobe_vectors(*inputs, *outputs, length.shape[1])
    return copy, length, product, other_length


def lengths(vectors: Tensor, library: Any = None) -> Tensor:
    """Of ``vectors`` ``[n, T, D]``."""
    length = _empty(vectors.shape[:2])
    nothing = (None, None, 0, 0, None)
    (library or _library()).attnprobe_vectors(
        *_given(vectors), *nothing, length.data_ptr(), None, None, length.shape[1]
    )
    return length


def largest(vectors: Tensor, library: Any = None) -> Tensor:
    """Largest absolute value of each item, ``[n]``; NaN if there is one."""
    found = _empty((len(vectors),))
    (library or _library()).attnprobe_largest(*_given(vectors), found.data_ptr())
    return found


def _empty(shape: Sequence[int]) -> Tensor:
    """Whatever default dtype or device the user has chosen."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _given(vectors: Tensor) -> tuple[int, ...]:
    """A tensor whose last dimension is contiguous, as the C functions take it."""
    return (vectors.data_ptr(), *vectors.shape, *vectors.stride()[:2])


def differs(library: Any) -> bool:
    """Whether a function of the library and torch disagree, in any variant, also about NaN and Inf."""
    from attnprobe.statistics.vectors import torch_largest, torch_scaled

    pairs = all(
        torch.allclose(a, b, 1e-5, 1e-5, equal_nan=True)
        for masked in (False, True)
        for error in (False, True)
        for extended in (False, True)
        for a, b in zip(
            *(_example(kernel, masked, error, extended) for kernel in (CompiledTile(library.attnprobe_tile), None)),
            strict=True,
        )
    )
    vectors = _wave(2, 5, 19)
    factor, other = vectors[:, 0, 1].contiguous(), vectors.roll(1, 0)[:, :1]
    ours, theirs = scaled(vectors, factor, other, library), torch_scaled(vectors, factor, other)
    same = all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(ours, theirs, strict=True))
    same &= torch.allclose(lengths(vectors, library), torch.linalg.vector_norm(vectors, dim=-1), 1e-5)
    vectors[1, 2, 3] = torch.nan
    same &= torch.equal(largest(vectors, library).nan_to_num(-1), torch_largest(vectors).nan_to_num(-1))
    return not (pairs and same)


def _wave(*shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32, device="cpu").view(shape).sin()


def _example(kernel: CompiledTile | None, masked: bool, error: bool, extended: bool) -> tuple[Tensor, Tensor]:
    """Sums over a tile with rows that see little or nothing, and one each with NaN and Inf."""
    from attnprobe.statistics.pair_sums import LARGEST, PairSums, Tile

    wave = _wave(2, 6, 67)
    limit = torch.tensor([[67, 1, 0, 40, 67, 67]] * 2, dtype=torch.int32, device="cpu")
    shift = limit.clamp(min=1).float().log2()
    sums = PairSums(
        limit=limit,
        shift=shift,
        centre=shift.sin(),
        place=limit.float(),
        share=(-shift).exp2(),
        keys=67,
        extended=extended,
        compiled=kernel,
    )
    scores, compatibilities = 4 * wave, wave.roll(1)
    scores[1, 4, 5] = compatibilities[1, 4, 5] = torch.nan
    compatibilities[1, 5, 7] = torch.inf
    visible = None
    if masked:
        visible = torch.arange(67, device="cpu") % 3 > 0
        scores = torch.where(visible, scores, -LARGEST)
        limit.fill_(67)
    whole = slice(0, 2), slice(0, 6), slice(0, 67)
    sums.add(Tile(*whole, scores, compatibilities if error else None, visible, limited=not masked))
    return sums.sums, sums.usage

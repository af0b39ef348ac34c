"""Whether what a compiler made gives the numbers that torch gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.compiled import CompiledTile, largest, lengths, scaled
from attnprobe.statistics.pair_sums import LARGEST, PairSums, Tile
from attnprobe.statistics.row_pass import first_pass, log_sum_exp
from attnprobe.statistics.sweep import Sweep
from attnprobe.statistics.vectors import torch_largest, torch_scaled
from attnprobe.statistics.weight_pass import WeightPass


@torch.no_grad()
def differs(library: Any) -> bool:
    """Whether a function of the library and torch disagree, in any variant, also about NaN and Inf."""
    return not (_same_tiles(library) and _same_vectors(library) and _same_sweeps(library))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, 1e-5, 1e-5, equal_nan=True)


def _wave(*shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32, device="cpu").view(shape).sin()


def _same_vectors(library: Any) -> bool:
    vectors = _wave(2, 5, 19)
    factor, other = vectors[:, 0, 1].contiguous(), vectors.roll(1, 0)[:, :1]
    same = all(map(_close, scaled(vectors, factor, other, library), torch_scaled(vectors, factor, other)))
    same &= _close(lengths(vectors, library), torch.linalg.vector_norm(vectors, dim=-1))
    vectors[1, 2, 3] = torch.nan
    return same and torch.equal(largest(vectors, library).nan_to_num(-1), torch_largest(vectors).nan_to_num(-1))


def _same_tiles(library: Any) -> bool:
    kernel = CompiledTile(library.attnprobe_tile)
    variants = product((False, True), repeat=3)
    return all(all(map(_close, _tile(kernel, *each), _tile(None, *each))) for each in variants)


def _tile(kernel: CompiledTile | None, masked: bool, error: bool, extended: bool) -> tuple[Tensor, Tensor]:
    """Sums over a tile with rows that see little or nothing, and one each with NaN and Inf."""
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


def _same_sweeps(library: Any) -> bool:
    return all(
        all(map(_alike, _swept(record, names, library), _swept(record, names, None)))
        for record in _records()
        for names in ({"entropy"}, {"self_mass", "value_grad_norm"})
    )


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Close; what one NaN spoils may differ a little: a minimum of its row, columns that its row does not see."""
    spoiled = ours.isnan() | theirs.isnan()
    return bool(ours.isnan().sum() <= theirs.isnan().sum() + 1) and _close(ours[~spoiled], theirs[~spoiled])


def _records() -> Iterator[AttentionRecord]:
    """Two query heads for each key, more keys than are looked at at once, and rows with NaN or that see nothing."""
    for length, keys in ((19, 19), (10, 530)):
        output = _wave(2, length, 4, 11).transpose(1, 2)
        query, error = _wave(2, 4, length, 5), output - 0.3
        query[1, 2, 7, 1] = error[0, 1, 8, 2] = torch.nan
        record = AttentionRecord(
            query=query,
            key=_wave(2, 2, keys, 5).cos(),
            value=_wave(2, 2, keys, 11),
            output=output,
            error=error,
            scale=3.0,
            self_attention=length == keys,
        )
        if length == keys:
            yield replace(record, causal=True)
            yield replace(record, error=None)
            continue
        wave = _wave(2, 4, length, keys)
        visible = wave > -0.2
        visible[1, :, 3] = visible[..., :2] = False
        error[1, :, 3] = torch.nan
        yield replace(record, mask=visible, causal=True)
        yield replace(record, mask=torch.where(visible, wave, -torch.inf)[:1])


def _swept(record: AttentionRecord, names: set[str], library: Any) -> list[Tensor]:
    """Everything that a pass finds, in C or not."""
    scores, sums, _ = first_pass(record)
    weights = WeightPass(scores, sums, names)
    weights.sweep = None if library is None else Sweep(scores, library)
    logsumexp = log_sum_exp(scores, weights.sweep)
    weights.run(logsumexp)
    vectors, rows = sums.vectors, sums.rows
    found = {**sums.row, "logsumexp": logsumexp, "centre": vectors.centre, "error": vectors.length["error"]}
    by_row = [torch.where(rows, found[name], 0) for name in sorted(found)]
    others = [*sums.column.values(), *(vectors.length[name] for name in ("query", "key", "value", "output"))]
    return [*by_row, *others, vectors.unit, vectors.largest, vectors.direction, sums.value_gradient]

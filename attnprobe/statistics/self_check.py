"""Whether what a compiler made gives the numbers that torch gives."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.compiled import CompiledTile
from attnprobe.statistics.pair_sums import LARGEST, PairSums, Tile
from attnprobe.statistics.row_pass import first_pass, log_sum_exp
from attnprobe.statistics.sums import Sums
from attnprobe.statistics.sweep import Sweep
from attnprobe.statistics.sweep_call import Call
from attnprobe.statistics.weight_pass import WeightPass


@torch.no_grad()
def differs(library: Any) -> bool:
    """Whether a function of the library and torch disagree, in any variant, also about NaN and Inf."""
    if library.attnprobe_size() != ctypes.sizeof(Call):
        return True
    return not (_same_tiles(library) and _same_sweeps(library))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, 1e-5, 1e-5, equal_nan=True)


def _wave(*shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32, device="cpu").view(shape).sin()


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
        all(map(_alike, *(made(record, names, each) for each in (library, None))))
        for record in _records()
        for made, names in ((_swept, {"entropy"}), (_swept, {"self_mass", "value_grad_norm"}), (_looked_at, set()))
    )


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Close; a NaN in some row also spoils columns, but not those that the row does not see."""
    if ours.shape[-1] != theirs.shape[-1]:
        return False
    spoiled = theirs.isnan()
    return not (ours.isnan() & ~spoiled).any() and _close(ours[~spoiled], theirs[~spoiled])


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
            tokens = torch.arange(length, device="cpu") > 1
            yield replace(record, causal=True, key_tokens=tokens.expand(2, -1))
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
    found = {**sums.row, "logsumexp": logsumexp, "centre": sums.vectors.centre}
    spoiled = found["plogp"].isnan()  # where a minimum may, or may not, be lost
    found["min_c"] = torch.where(spoiled, torch.nan, found["min_c"])
    by_row = [torch.where(sums.rows, found[name], 0) for name in sorted(found)]
    lost = torch.stack([each.isnan().sum() for each in by_row])
    return [*by_row, lost, *sums.column.values(), sums.value_gradient, *_vectors(sums)]


def _looked_at(record: AttentionRecord, _names: set[str], library: Any) -> list[Tensor]:
    """What a sample needs of the whole record."""
    scores, sums, _ = first_pass(record)
    if library is not None:
        Sweep(scores, library).describe(sums)
    for items in scores.bare_chunks() if library is None else ():
        sums.vectors.measure(items, queries=True)
        sums.vectors.errors(items)
    found = _vectors(sums)
    if scores.plain:
        sums.find_landmarks(torch.zeros_like(sums.shares), None if library is None else Sweep(scores, library))
        found += [sums.row["sink_mass"], sums.row["self_mass"]]
    return found


def _vectors(sums: Sums) -> list[Tensor]:
    vectors = sums.vectors
    return [
        *(vectors.length[name] for name in sorted(vectors.length)),
        vectors.unit,
        vectors.largest,
        vectors.direction,
    ]

"""The tiled pass as one Triton kernel, on CUDA, once it has shown there that it gives the same numbers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from attnprobe.errors import AttnProbeWarning
from attnprobe.statistics.pair_sums import PairSums, Tile
from attnprobe.statistics.scores import Items, Scores

DIFFERS = (
    "attnprobe: the Triton kernel does not work on {device}, or not as torch's own operations; these are used instead, "
    "which takes longer"
)


class TritonPath:
    """Kernels for float32 records without masks."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def log_sum_exp(self, items: Items, limit: Tensor) -> Tensor:
        """Over ln 2, ``[n, T]``."""
        result: Tensor = self._kernels.log_sum_exp(items.query, items.key, limit[items.index])
        return result

    def add(self, pairs: PairSums, items: Items, error: Tensor | None, value: Tensor) -> None:
        """Add all pairs of some items."""
        index = items.index
        shift, limit = pairs.shift[index], pairs.limit[index]
        errors = {} if error is None else {"error": error, "value": value, "centre": pairs.centre[index]}
        sums, usage = self._kernels.pair_sums(
            items.query,
            items.key,
            shift,
            limit,
            pairs.place[index].int(),
            pairs.share[index],
            extended=pairs.extended,
            **errors,
        )
        sums["max_score"] = sums.pop("max_log") + shift
        sums["scores"] = sums.pop("logs") + limit * shift
        for name, values in sums.items():
            pairs.row[name][index] = values
        pairs.usage[index] = usage


def kernels_for(scores: Scores) -> TritonPath | None:
    """The kernels, where a record can have them."""
    return triton_path(scores.device) if scores.plain and scores.dtype == torch.float32 else None


@functools.cache
def triton_path(device: torch.device) -> TritonPath | None:
    """The kernels for a device, None where they are not to be used."""
    if device.type != "cuda":
        return None
    try:
        from attnprobe.statistics import triton_kernel

        path = TritonPath(triton_kernel)
        same = agrees(path, device)
    except Exception:  # no Triton, or one that cannot compile here
        same = False
    if same:
        return path
    warnings.warn(DIFFERS.format(device=device), AttnProbeWarning, stacklevel=2)
    return None


def agrees(path: TritonPath, device: torch.device) -> bool:
    """Whether kernels and torch agree on a call in which all that there is to see is seen."""
    generator = torch.Generator().manual_seed(0)
    query, key, error, value = (torch.randn(4, 70, 24, generator=generator).to(device) for _ in range(4))
    items = Items(slice(0, 4), slice(0, 1), slice(0, 4), query, key)
    place = torch.arange(70, device=device).expand(4, -1)
    limit = (place + 1).int()
    found = []
    scores = query @ key.mT
    shift = torch.where(place[:, None] <= place[..., None], scores, -torch.inf).exp2().sum(-1).log2()
    for kernels in (True, False):
        pairs = PairSums(
            limit=limit,
            shift=shift,
            centre=shift.sin(),
            place=place.float(),
            share=1 / (limit + 1),
            keys=70,
            extended=True,
        )
        if kernels:
            path.add(pairs, items, error, value)
        else:
            whole = slice(0, 70)
            pairs.add(Tile(slice(0, 4), whole, whole, scores.clone(), error @ value.mT, None, limited=True))
        found.append((pairs.sums, pairs.usage))
    found.append((path.log_sum_exp(items, limit), shift))
    return all(torch.allclose(a, b, 1e-4, 1e-4) for a, b in (*zip(*found[:2], strict=True), found[2]))

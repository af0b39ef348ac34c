"""Some rows, heads or sequences of a record as a record of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.scores import mask_threshold

#: Fields that are ``[B, H, ...]`` and ``[B, H, T, ...]``.
_BY_HEAD = ("query", "output", "error", "logits", "kept", "sink", "logsumexp", "lse_error")


def some_heads(record: AttentionRecord, heads: Sequence[int], sequences: int | None = None) -> AttentionRecord:
    """The given query heads of the first ``sequences`` sequences, all if None; their keys are no longer shared."""
    batch, total, groups, _, _ = record.shape
    first = slice(0, batch if sequences is None else min(sequences, batch))
    chosen = torch.tensor(heads, dtype=torch.long, device=record.value.device)
    everything = [*heads] == [*range(total)]

    def pick(tensor: Tensor | None, index: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[first] if everything else tensor[first, index]

    changes: dict[str, Any] = {name: pick(getattr(record, name), chosen) for name in _BY_HEAD}
    changes |= {name: pick(getattr(record, name), chosen * groups // total) for name in ("key", "value")}
    for name in ("query_tokens", "key_tokens", "positions"):
        tokens = getattr(record, name)
        changes[name] = None if tokens is None else tokens[first]
    if record.mask is not None:
        mask = _aligned(record.mask)
        mask = mask[first] if mask.shape[0] > 1 else mask
        changes["mask"] = mask[:, chosen] if mask.shape[1] > 1 and not everything else mask
        changes["mask_threshold"] = mask_threshold(record)
    if not everything:
        changes |= {
            name: _reindexed(getattr(record, name), lambda b, h, q: (b, chosen[h], q))
            for name in ("score_mod", "mask_mod")
        }
    return replace(record, **changes)


def some_rows(record: AttentionRecord, positions: Tensor) -> AttentionRecord:
    """The rows at ``positions`` ``[B, R]``, ascending; the record must not be such a sample already."""
    batch, heads, _, queries, _ = record.shape
    sequence = torch.arange(batch, device=positions.device)[:, None, None]
    changes: dict[str, Any] = {"positions": positions, "sampled_from": queries}
    for name in _BY_HEAD:
        tensor = getattr(record, name)
        if tensor is not None:
            head = torch.arange(heads, device=positions.device)[None, :, None]
            changes[name] = tensor[sequence, head, positions[:, None]]
    mask = record.mask
    if mask is not None:
        changes["mask_threshold"] = mask_threshold(record)
    if mask is not None and mask.ndim > 1 and mask.shape[-2] == queries:
        mask = _aligned(mask).expand(batch, -1, -1, -1)
        changes["mask"] = mask[
            sequence, torch.arange(mask.shape[1], device=mask.device)[None, :, None], positions[:, None]
        ]
    if record.query_tokens is not None:
        changes["query_tokens"] = record.query_tokens.gather(1, positions)
    changes |= {
        name: _reindexed(getattr(record, name), lambda b, h, q: (b, h, positions[b, q]))
        for name in ("score_mod", "mask_mod")
    }
    return replace(record, **changes)


def _aligned(mask: Tensor) -> Tensor:
    """With four dimensions, of which those are 1 that are shared."""
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def _reindexed(
    modification: Callable[..., Tensor] | None, index: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
) -> Callable[..., Tensor] | None:
    """A ``score_mod`` or ``mask_mod``, which end in ``b, h, q_idx, kv_idx``, for other indices."""
    if modification is None:
        return None
    return lambda *args: modification(*args[:-4], *index(*args[-4:-1]), args[-1])

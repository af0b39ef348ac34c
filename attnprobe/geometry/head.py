"""Value vectors of one head, with what it takes to say who reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.row_pass import first_pass
from attnprobe.statistics.subset import some_heads


@dataclass(frozen=True, eq=False)
class HeadValues:
    """Value vectors of one head, or of the query heads that share them.

    Attributes:
        layer: module name, with ``#index`` where a module was called more than once.
        heads: the query heads that read these values.
        values: ``[n, E]``, on the CPU, of keys that are no padding, evenly spaced where there are more than the limit.
        sequences, positions: ``[n]`` each, whose keys they are: sequence of the batch, and index in it.
        tokens: ``[B, S]`` boolean, on the CPU, which keys are no padding.
        call: the whole layer's attention call, on the model's device.
    """

    layer: str
    heads: tuple[int, ...]
    values: Tensor
    sequences: Tensor
    positions: Tensor
    tokens: Tensor
    call: AttentionRecord

    @property
    def name(self) -> str:
        """``layer:head``, or ``layer:first-last`` of heads that share their values."""
        first, last = self.heads[0], self.heads[-1]
        return f"{self.layer}:{first}" if first == last else f"{self.layer}:{first}-{last}"

    @property
    def record(self) -> AttentionRecord:
        """The call of these heads alone: all queries and keys, ``value`` ``[B, 1, S, E]``."""
        group = slice(self.heads[0] // len(self.heads), self.heads[0] // len(self.heads) + 1)
        key = None if self.call.key is None else self.call.key[:, group]
        return replace(some_heads(self.call, self.heads), value=self.call.value[:, group], key=key)


@torch.no_grad()
def heads_of(layer: str, call: AttentionRecord, limit: int) -> list[HeadValues]:
    """One for each group of query heads that share their values, with ``limit`` values at most."""
    _, heads, groups, _, _ = call.shape
    with torch.autocast(call.value.device.type, enabled=False):
        tokens = first_pass(call)[1].key_tokens
    sequences, positions = tokens.nonzero(as_tuple=True)
    even = torch.linspace(0, len(positions) - 1, min(limit, len(positions)), dtype=torch.float64)
    chosen = even.round().long().to(positions.device)
    sequences, positions = sequences[chosen], positions[chosen]
    shared = heads // groups
    result = []
    for group in range(groups):
        values = call.value[sequences, group, positions]
        values = values.to(torch.promote_types(values.dtype, torch.float32)).cpu()
        mine = tuple(range(group * shared, (group + 1) * shared))
        result.append(HeadValues(layer, mine, values, sequences.cpu(), positions.cpu(), tokens.cpu(), call))
    return result


def grouped(record: AttentionRecord) -> AttentionRecord:
    """With keys and values once per group, where the model has repeated them for its query heads."""
    sources = [tensor for tensor in (record.value, record.key) if tensor is not None]
    groups = record.shape[2]
    repeats = 1
    while repeats < groups and all(torch.equal(x[:, repeats], x[:, 0]) for x in sources):
        repeats += 1
    if groups % repeats or not record.value.any():  # values that are zero yet are not shared for that
        return record
    each = [x.unflatten(1, (-1, repeats)) for x in sources]
    if not all(torch.equal(x, x[:, :, :1].expand_as(x)) for x in each):
        return record
    key = None if record.key is None else record.key[:, ::repeats]
    return replace(record, value=record.value[:, ::repeats], key=key)

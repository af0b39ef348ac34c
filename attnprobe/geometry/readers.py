"""Which clusters of keys each query reads, without a ``T x S`` tensor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.geometry.points import Numbers, as_labels
from attnprobe.record import AttentionRecord
from attnprobe.statistics.row_pass import first_pass
from attnprobe.statistics.streaming import context


@torch.no_grad()
def who_uses(record: AttentionRecord, labels: Numbers, clusters: int | None = None) -> Tensor:
    """Share of each query's attention on each cluster of keys, ``[B, H, T, C]``, exact, on the CPU.

    Attention's output where the values are one-hot labels: scale, masks, causality, bias, softcap and sink are the
    record's. Weights are those before dropout. A row adds up to 1 less what goes to a learned sink or to keys in no
    cluster; rows of padding, and those that see no key, are NaN.

    Args:
        record: as from ``HeadValues.record``.
        labels: ``[B, S]`` or ``[B, G, S]`` clusters of the keys, whole numbers from 0; -1 for a key in none.
        clusters: ``C``; None for the largest label and one.

    Raises:
        ConfigurationError: labels of another shape, or outside of -1 to C - 1.
    """
    batch, heads, groups, queries, keys = record.shape
    given = torch.from_numpy(as_labels(labels, "labels"))
    if tuple(given.shape) not in ((batch, keys), (batch, groups, keys)):
        raise ConfigurationError(
            f"labels must have shape {[batch, keys]} or {[batch, groups, keys]}, one for each key, got {[*given.shape]}"
        )
    number = int(given.max()) + 1 if clusters is None else clusters
    if number < 1 or given.min() < -1 or given.max() >= number:
        raise ConfigurationError(
            f"labels must be -1 (no cluster) to {number - 1}, and one of them a cluster; "
            f"got {int(given.min())} to {int(given.max())}"
        )
    given = given.to(record.value.device)
    marks = (given[..., None] == torch.arange(number, device=given.device)).to(record.value.dtype)
    marks = (marks if marks.ndim == 4 else marks[:, None]).expand(batch, groups, keys, number)
    record = replace(record, value=marks, output=None, error=None, lse_error=None, dropout=0.0, kept=None)
    with torch.autocast(record.value.device.type, enabled=False):
        counted = first_pass(record)[1].rows.view(batch, heads, queries, 1)
        return torch.where(counted, context(record), torch.nan).cpu()

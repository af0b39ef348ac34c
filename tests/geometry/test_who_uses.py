"""Shares of attention against dense float64 weights, for every kind of record that a model could hand over."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import AttentionRecord, geometry
from attnprobe.errors import ConfigurationError
from attnprobe.statistics.dense import dense_parts

from ..reproducible import reproducible
from ..statistics.strategies import records


def _dense(record: AttentionRecord, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """``[B, H, T, C]`` from the weights themselves; NaN in rows that do not count."""
    parts = dense_parts(record)
    batch, heads, groups, _, keys = record.shape
    labels = labels.view(batch, -1, keys).expand(batch, groups, keys).repeat_interleave(heads // groups, 1)
    shares = [(parts.alpha * (labels == c)[:, :, None]).sum(-1) for c in range(clusters)]
    return torch.where(parts.rows[..., None], torch.stack(shares, -1), torch.nan)


@given(records(torch.float64), st.integers(0, 2**31), st.integers(1, 5), st.booleans())
@reproducible(60)
def test_equals_the_dense_weights(record: AttentionRecord, seed: int, clusters: int, by_group: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, _, groups, _, keys = record.shape
    shape = (batch, groups, keys) if by_group else (batch, keys)
    labels = torch.randint(-1, clusters, shape, generator=generator)
    found = geometry.who_uses(record, labels, clusters)
    expected = _dense(record, labels, clusters)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0, equal_nan=True)


@given(records())
@reproducible(30)
def test_rows_add_up_to_one_less_the_sink(record: AttentionRecord) -> None:
    found = geometry.who_uses(record, np.arange(record.shape[4])[None].repeat(record.shape[0], 0) % 3, 3).double()
    parts = dense_parts(record)
    left = 1 - parts.sink.sum(-1)
    torch.testing.assert_close(found.sum(-1)[parts.rows], left[parts.rows], atol=1e-5, rtol=0)
    assert found[~parts.rows].isnan().all()


def test_what_is_refused() -> None:
    record = AttentionRecord(value=torch.randn(2, 1, 5, 3), query=torch.randn(2, 2, 4, 3), key=torch.randn(2, 1, 5, 3))
    assert geometry.who_uses(record, torch.ones(2, 5, dtype=torch.int32)).shape == (2, 2, 4, 2)
    for labels, clusters, message in (
        (torch.zeros(2, 4, dtype=torch.long), None, "must have shape"),
        (torch.zeros(2, 5), None, "whole numbers"),
        (torch.full((2, 5), 3), 3, "-1 .no cluster. to 2"),
        (torch.full((2, 5), -2), 3, "got -2 to -2"),
        (torch.full((2, 5), -1), None, "one of them a cluster"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            geometry.who_uses(record, labels, clusters)

"""Some heads, sequences or rows of a record against the same part of the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from attnprobe.catalog import STATISTICS, select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.columns import COLUMN_STATISTICS
from attnprobe.statistics.dense import dense_parts
from attnprobe.statistics.maps import head_map
from attnprobe.statistics.reduce import combine
from attnprobe.statistics.streaming import measure
from attnprobe.statistics.subset import some_heads, some_rows
from tests.statistics.compare import NAMES, TOLERANCE, assert_close
from tests.statistics.strategies import batch_slice
from tests.statistics.test_streaming import finished, measured

B, H, T, S = 3, 4, 40, 50
#: Of a head, whatever the others are.
OF_HEAD = tuple(name for name in NAMES if STATISTICS[name].level == "head" and name != "head_similarity")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(groups: int = H, keys: int = S, **changes: Any) -> AttentionRecord:
    record = AttentionRecord(
        value=normal(B, groups, keys, 6, seed=1),
        query=2 * normal(B, H, T, 5, seed=2),
        key=normal(B, groups, keys, 5, seed=3),
        error=normal(B, H, T, 6, seed=4),
        scale=0.5,
        self_attention=keys == T,
    )
    return dataclasses.replace(record, **changes)


SHOWN = normal(B, H, T, S, seed=5) > -1
SHOWN[..., 0] = True
SLOPE = torch.linspace(0.01, 0.2, B * H).view(B, H)
TOKENS = torch.arange(T) < torch.tensor([[T], [30], [9]])


def bias_of_head(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - SLOPE[b, h] * (q_idx - kv_idx).abs()


def shown(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return SHOWN[b, h, q_idx, kv_idx]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "keys": T},
    "GQA": {"groups": 2},
    "one group": {"groups": 1, "causal": True, "keys": T},
    "mask [T, S]": {"mask": SHOWN[0, 0]},
    "mask [1, T, S]": {"mask": SHOWN[0, :1]},
    "mask [H, T, S]": {"mask": SHOWN[0]},
    "mask [B, 1, 1, S]": {"mask": SHOWN[:, :1, :1]},
    "mask [B, 1, T, S]": {"mask": SHOWN[:, :1]},
    "mask [1, H, T, S]": {"mask": SHOWN[:1]},
    "mask [B, H, T, S]": {"mask": SHOWN, "groups": 2},
    "mask [B, 1, T, 1]": {"mask": SHOWN[:, :1, :, 7:8]},
    "added": {"mask": normal(1, H, T, S, seed=6).masked_fill(~SHOWN[:1], -torch.inf)},
    "score_mod": {"score_mod": bias_of_head, "groups": 2},
    "mask_mod": {"mask_mod": shown},
    "both": {"score_mod": bias_of_head, "mask_mod": shown},
    "logits": {"logits": 3 * normal(B, H, T, S, seed=7).masked_fill(~SHOWN, -torch.inf), "query": None, "key": None},
    "sink": {"sink": normal(B, H, T, seed=8)},
    "dropout": {"kept": SHOWN, "dropout": 0.3},
    "tokens": {"keys": T, "causal": True, "query_tokens": TOKENS, "key_tokens": TOKENS},
    "log-sum-exp used": {"lse_error": normal(B, H, T, seed=9)},
    "output": {"output": normal(B, H, T, 6, seed=10)},
    "forward only": {"error": None},
    "keys from a cache": {"self_attention": True},
    "unknown": {"self_attention": None, "keys": T},
}
each_call = pytest.mark.parametrize("record", [example(**changes) for changes in CALLS.values()], ids=CALLS.keys())


@each_call
@pytest.mark.parametrize(("heads", "sequences"), [([1], None), ([0, 3], 2), ([0, 1, 2, 3], 1)], ids=str)
def test_heads_are_those_of_the_whole(record: AttentionRecord, heads: list[int], sequences: int | None) -> None:
    if record.key_tokens is None:  # which keys are padding depends on what all heads see: a part of them is told
        record = dataclasses.replace(record, key_tokens=dense_parts(record).keys)
    part = some_heads(record, heads, sequences)
    assert part.shape[:2] == (min(sequences or B, B), len(heads))
    first = record if sequences is None else batch_slice(record, slice(0, sequences))
    whole, found = measured(first, OF_HEAD), measured(part, OF_HEAD)
    for name in OF_HEAD:
        torch.testing.assert_close(found[name], whole[name][heads], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)
    assert_close(measured(part), part, TOLERANCE[torch.float32])


@each_call
def test_all_rows_are_the_record(record: AttentionRecord) -> None:
    everything = some_rows(record, torch.arange(T).expand(B, -1))
    whole, found = measured(record), measured(everything)
    for name in NAMES:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


@each_call
def test_rows_can_be_measured_in_parts(record: AttentionRecord) -> None:
    """Sums over rows are those of any division of the rows, which may differ between sequences."""
    tokens = dense_parts(record)
    queries = tokens.rows.any(1) if record.query_tokens is None else record.query_tokens
    record = dataclasses.replace(record, key_tokens=tokens.keys, query_tokens=queries)
    order = normal(B, T, seed=11).argsort(-1)
    parts = [some_rows(record, rows.sort(-1).values) for rows in order.split([7, T - 7], -1)]
    over_rows = [name for name in OF_HEAD if STATISTICS[name].reduce in ("mean", "root", "max", "norm")]
    names = tuple(name for name in over_rows if name not in (*COLUMN_STATISTICS, "value_grad_norm"))
    found = finished(combine(measure(part, select(names)) for part in parts), names)
    whole = measured(record, names)
    for name in names:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def test_repeated_rows_count_as_often() -> None:
    record = example(keys=T, causal=True)
    twice = some_rows(record, torch.tensor([[5, 5, 20]] * B))
    once, last = (some_rows(record, torch.tensor([[i]] * B)) for i in (5, 20))
    one, two, found = (measured(part, ("entropy", "error_norm", "self_mass")) for part in (once, last, twice))
    for name in ("entropy", "self_mass"):
        torch.testing.assert_close(found[name], (2 * one[name] + two[name]) / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("name", ["GQA", "mask [H, T, S]", "both", "logits", "dropout"])
def test_pictures_are_of_the_head(name: str, head: int) -> None:
    record = example(**CALLS[name])
    picture, parts = head_map("layer", head, record), dense_parts(record)
    visible = parts.visible[0, head]
    for found, wanted in (
        (picture.attention, parts.alpha),
        (picture.compatibility, parts.b),
        (picture.advantage, parts.advantage),
    ):
        assert found is not None
        if name == "dropout" and wanted is parts.b:
            continue  # a picture of u . v before dropout
        expected = wanted[0, head].where(visible, torch.nan).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(picture.values, parts.value[0, head].float())

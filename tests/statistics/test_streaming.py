"""The streaming statistics against the dense reference, over random records."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.compiler import load
from attnprobe.statistics.reduce import Partial, combine, finish
from attnprobe.statistics.streaming import measure
from tests.reproducible import reproducible
from tests.statistics.compare import NAMES, TOLERANCE, assert_close
from tests.statistics.strategies import batch_slice, records


def finished(partial: Partial, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {statistic.name: finish(statistic, partial) for statistic in select(names)}


def measured(record: AttentionRecord, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return finished(measure(record, select(names)), names)


@pytest.fixture(params=["compiled", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a C compiler."""
    if request.param == "torch":
        monkeypatch.setenv("ATTNPROBE_COMPILED", "0")
    elif load()[0] is None:
        pytest.skip(load()[1])


@pytest.mark.usefixtures("kernel")
@reproducible(200)
@given(records(torch.float32))
def test_float32_agrees_with_the_reference(record: AttentionRecord) -> None:
    assert_close(measured(record), record, TOLERANCE[torch.float32])


@reproducible(50)
@given(records(torch.float64))
def test_float64_agrees_with_the_reference(record: AttentionRecord) -> None:
    assert_close(measured(record), record, TOLERANCE[torch.float64])


@reproducible(50)
@given(records(torch.bfloat16))
def test_bfloat16_agrees_with_the_reference_on_the_same_rounded_inputs(record: AttentionRecord) -> None:
    assert_close(measured(record), record, TOLERANCE[torch.bfloat16])


@reproducible(50)
@given(records(torch.float32, min_batch=2), st.integers(1, 2))
def test_micro_batches_combine_to_the_whole_batch(record: AttentionRecord, first: int) -> None:
    first = min(first, record.shape[0] - 1)
    halves = (batch_slice(record, slice(None, first)), batch_slice(record, slice(first, None)))
    partials = [measure(half, select(NAMES)) for half in halves]
    assert_close(finished(combine(partials)), record, TOLERANCE[torch.float32])


@reproducible(50)
@given(records(torch.float32), st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
def test_any_choice_of_statistics_can_be_measured_alone(record: AttentionRecord, names: list[str]) -> None:
    assert_close(measured(record, tuple(names)), record, TOLERANCE[torch.float32])


@reproducible(20)
@given(records(torch.float32))
def test_a_partial_holds_float64_on_the_host(record: AttentionRecord) -> None:
    heads = record.shape[1]
    for key, value in measure(record, select(NAMES)).items():
        assert value.dtype == torch.float64, key
        assert value.device.type == "cpu", key
        assert value.shape[0] in (1, heads), key


def edge(batch: int = 1, heads: int = 2, queries: int = 10, keys: int = 10, **changes: Any) -> AttentionRecord:
    generator = torch.Generator().manual_seed(3)

    def normal(length: int) -> Tensor:
        return torch.randn(batch, heads, length, 8, generator=generator)

    record = AttentionRecord(
        value=normal(keys), query=normal(queries), key=normal(keys), error=normal(queries), scale=0.3
    )
    return dataclasses.replace(record, **changes)


NOTHING = torch.zeros(10, 10, dtype=torch.bool)
LEFT_PADDING = (torch.arange(10) >= 4)[None, None, None]
EDGES = {
    "everything masked": edge(mask=NOTHING),
    "everything masked, added": edge(mask=NOTHING.float().masked_fill(~NOTHING, -torch.inf)),
    "a mask that hides nothing": edge(mask=~NOTHING),
    "a constant added to all scores": edge(mask=torch.full((10, 10), -100.0)),
    "a constant added to all scores of a sequence": edge(
        batch=2, mask=torch.tensor([-100.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 10, 10)
    ),
    "a bias just above the mask": edge(mask=torch.linspace(-9000, 0, 100).view(10, 10)),
    "left padding, causal": edge(mask=LEFT_PADDING, causal=True, self_attention=True),
    "left padding, causal, added": edge(
        mask=torch.zeros(1, 1, 1, 10).masked_fill(~LEFT_PADDING, torch.finfo(torch.float32).min),
        causal=True,
        self_attention=True,
    ),
    "all tokens are padding": edge(key_tokens=torch.zeros(1, 10, dtype=torch.bool), self_attention=True),
    "one token": edge(queries=1, keys=1, causal=True, self_attention=True),
    "one key": edge(queries=10, keys=1),
    "one query": edge(queries=1, keys=10),
    "keys from a cache": edge(queries=3, keys=10, self_attention=True),
    "no error at all": edge(error=torch.zeros(1, 2, 10, 8)),
    "no error, output lost, bare logits": edge(
        error=None, query=None, key=None, logits=torch.randn(1, 2, 10, 10, generator=torch.Generator().manual_seed(0))
    ),
    "scores in the thousands": edge(scale=2000.0),
    "values far from 0": edge(value=edge().value + 300),
    "identical keys": edge(key=torch.ones(1, 2, 10, 8)),
    "output after dropout, which is not alpha v": edge(output=edge().query, dropout=0.3),
    "half precision bias": edge(mask=torch.linspace(-3, 3, 100).view(10, 10).half()),
    "a mask for each head": edge(mask=(torch.arange(200) % 3 > 0).view(1, 2, 10, 10)),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("record", EDGES.values(), ids=EDGES.keys())
def test_edges(record: AttentionRecord, dtype: torch.dtype) -> None:
    names = ("query", "key", "value", "output", "error", "logits")
    tensors = {name: getattr(record, name) for name in names}
    record = dataclasses.replace(record, **{name: x if x is None else x.to(dtype) for name, x in tensors.items()})
    assert_close(measured(record), record, TOLERANCE[dtype])


def long_record(queries: int, keys: int, heads: int = 1, **changes: Any) -> AttentionRecord:
    generator = torch.Generator().manual_seed(queries + keys)

    def normal(length: int) -> Tensor:
        return torch.randn(1, heads, length, 16, generator=generator)

    record = AttentionRecord(
        value=normal(keys), query=normal(queries), key=normal(keys), error=normal(queries), scale=0.25
    )
    return dataclasses.replace(record, **changes)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("queries", "keys", "changes"),
    [
        (1100, 1100, {"causal": True, "self_attention": True}),
        (300, 2300, {"self_attention": False}),
        (300, 2300, {"causal": True}),
        (700, 1500, {"mask": (torch.arange(1500) < 1400)[None, None, None]}),
        (700, 1500, {"mask": torch.linspace(-3, 3, 700 * 1500).view(700, 1500)}),
    ],
    ids=["causal", "cross", "causal cross", "padding", "bias"],
)
def test_sequences_longer_than_a_tile(queries: int, keys: int, changes: dict[str, Any]) -> None:
    record = long_record(queries, keys, **changes)
    assert_close(measured(record), record, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
def test_outputs_that_are_all_alike_do_not_vary(known: bool, dtype: torch.dtype) -> None:
    value = torch.linspace(1, 3, 8).expand(1, 2, 10, 8).to(dtype)
    record = edge(value=value, output=value if known else None)
    assert measured(record)["output_variation"].tolist() == [0, 0]
    assert measured(record)["output_stable_rank"].isnan().all()
    output = value.clone()
    output[:, 1, 3] = torch.nan
    assert measured(edge(value=value, output=output))["output_variation"].isnan().tolist() == [False, True]
    assert measured(edge(value=0 * value, output=0 * value))["output_variation"].isnan().all()


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor holds that any operation produces; a broadcast view holds few."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(tensor.numel(), stored))
        return result


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["core", "every"])
def test_no_tensor_of_queries_times_keys_is_ever_held(heads: int, dtype: torch.dtype, wanted: str) -> None:
    length = 2048
    record = long_record(length, length, heads, causal=True, self_attention=True)
    record = dataclasses.replace(record, mask=(torch.arange(length) < 2000)[None, None, None])
    record = dataclasses.replace(
        record, **{name: getattr(record, name).to(dtype) for name in ("query", "key", "value", "error")}
    )
    statistics = select("core" if wanted == "core" else NAMES)
    with LargestTensor() as largest:
        measure(record, statistics)
    assert 0 < largest.elements < length * length / 4

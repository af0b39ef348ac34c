"""How exact the statistics are where it is hardest, and what measuring them costs a device that is not asked."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense, dense_parts
from attnprobe.statistics.streaming import measure, weighed
from tests.statistics.compare import NAMES, TOLERANCE, assert_close
from tests.statistics.strategies import batch_slice
from tests.statistics.test_streaming import kernel, measured  # noqa: F401

T, D = 700, 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captured(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    heads: int = 2,
    length: int = T,
    sharpness: float = 2.0,
    causal: bool = False,
    mask: Tensor | None = None,
) -> AttentionRecord:
    """What torch's own kernel computed, with the log-sum-exp that it left."""
    query, key, value = (normal(batch, heads, length, D, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    query = query * sharpness
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    assert output.grad_fn is not None
    logsumexp = output.grad_fn._saved_logsumexp  # type: ignore[attr-defined]
    assert logsumexp.shape == output.shape[:3]
    return AttentionRecord(
        value=value.detach(),
        query=query.detach(),
        key=key.detach(),
        output=output.detach(),
        error=normal(batch, heads, length, D, seed=3).to(dtype),
        logsumexp=logsumexp.detach(),
        scale=D**-0.5,
        mask=mask,
        causal=causal,
        self_attention=True,
    )


PADDED = (torch.arange(T) < 650)[None, None, None]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"mask": PADDED}, {"sharpness": 20.0}], ids=lambda o: "".join(o)
)
def test_float32_with_the_log_sum_exp_of_the_kernel(options: dict[str, Any]) -> None:
    record = captured(**options, heads=1)
    if "sharpness" not in options:  # with scores of a hundred, the weights of a row add up to 1 less exactly
        assert weighed(record, set(NAMES)).kernel_lse
    assert_close(measured(record), record, 5e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("given", ["output", "no output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_costs_nothing_beyond_its_rounded_inputs(dtype: torch.dtype, causal: bool, given: str) -> None:
    record = captured(dtype, length=400, causal=causal)
    if given == "no output":
        record = dataclasses.replace(record, output=None)
    assert_close(measured(record), record, 1e-6)


def test_half_precision_with_masks_and_logits() -> None:
    plain = captured(torch.float16, length=200)
    shown = normal(1, 2, 200, 200, seed=4) > -1
    scores = dense_parts(plain).scores.half()
    for changes in (
        {"mask": shown},
        {"mask": torch.zeros(shown.shape).half().masked_fill(~shown, torch.finfo(torch.float16).min)},
        {"query": None, "key": None, "logits": scores.masked_fill(~shown, -torch.inf)},
        {"query": None, "key": None, "logits": scores.masked_fill(~shown, torch.finfo(torch.float16).min)},
        {"sink": normal(1, 2, 200, seed=5).half()},
    ):
        record = dataclasses.replace(plain, logsumexp=None, output=None, **changes)
        assert_close(measured(record), record, 1e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_logits_up_to_ten_thousand(size: float, dtype: torch.dtype) -> None:
    """The softmax of numbers that large takes one key, and must say so without overflow."""
    logits = normal(2, 2, 60, 80, seed=6).to(dtype)
    logits *= size / logits.abs().amax()
    logits.clamp_(min=-0.99 * size)  # -1e4 would be a mask
    record = AttentionRecord(value=normal(2, 2, 80, 8).to(dtype), logits=logits, error=normal(2, 2, 60, 8).to(dtype))
    found = measured(record)
    assert_close(found, record, TOLERANCE[dtype])
    # Rounding of the logits is that of the weights, in every precision: relative to it the weights are exact.
    exact = dense(record, ["max_logit", "entropy", "max_weight"])
    torch.testing.assert_close(found["max_logit"], exact["max_logit"], rtol=1e-6, atol=0)
    assert all(found[name].isfinite().all() for name in ("entropy", "max_weight", "score_grad_norm", "advantage_std"))


@pytest.mark.usefixtures("kernel")
def test_scores_up_to_ten_thousand_from_queries_and_keys() -> None:
    """Whole numbers, whose products are exact: what is left is the softmax."""
    query, key = (torch.randint(-9, 10, (1, 2, 300, 8), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    scores = query.float() @ key.float().mT
    scale = 1e4 / float(scores.abs().amax())
    record = AttentionRecord(
        value=normal(1, 2, 300, 8),
        query=query.float(),
        key=key.float(),
        error=normal(1, 2, 300, 8, seed=1),
        scale=scale,
    )
    found, expected = measured(record), dense(record)
    for name in ("entropy", "max_weight", "concentration", "dead_column_fraction", "column_gini", "output_norm"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-3, msg=name)  # 1e4 * 2^-24 = 6e-4
    assert float(found["max_logit"].max()) == pytest.approx(1e4, rel=0.1)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("how", ["bool", "added", "logits", "causal, left padding", "kernel"])
def test_rows_that_see_nothing_count_nowhere(how: str) -> None:
    shown = torch.ones(2, 1, 90, 90, dtype=torch.bool)
    shown[0, :, 10:20], shown[1, :, 40:] = False, False
    record = captured(batch=2, length=90, mask=shown if how == "kernel" else None)
    scores = dense_parts(dataclasses.replace(record, mask=None)).scores.float()
    left = (torch.arange(90) >= 30)[None, None, None]
    changes: dict[str, Any] = {
        "kernel": {},
        "bool": {"mask": shown},
        "added": {"mask": torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)},
        "logits": {"logits": scores.masked_fill(~shown, -torch.inf), "query": None, "key": None},
        "causal, left padding": {"mask": left, "causal": True},
    }[how]
    if changes:
        record = dataclasses.replace(record, output=None, logsumexp=None, **changes)
    found = measured(record)
    assert_close(found, record, 5e-6)
    assert found["entropy"].isfinite().all()
    assert float(measure(record, select(NAMES))["masked_rows.sum"]) == 120


# What is not finite


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "error"])
@pytest.mark.parametrize("lse", [True, False])
def test_what_is_not_finite_stays_with_its_row_head_and_sequence(lse: bool, where: str, bad: float) -> None:
    clean = captured(batch=2, heads=3, length=130, causal=True)
    if not lse:
        clean = dataclasses.replace(clean, logsumexp=None)
    tensor = getattr(clean, where).clone()
    tensor[1, 2, 77, 5] = bad
    record = dataclasses.replace(clean, **{where: tensor})
    if where == "query":  # as the model would have got it
        output = clean.output.clone()  # type: ignore[union-attr]
        output[1, 2, 77] = math.nan
        record = dataclasses.replace(record, output=output)
        if lse:
            logsumexp = clean.logsumexp.clone()  # type: ignore[union-attr]
            logsumexp[1, 2, 77] = math.nan
            record = dataclasses.replace(record, logsumexp=logsumexp)

    found, expected = measured(record), measured(clean)
    for name in set(NAMES) - {"head_similarity", "shared_dead_columns", "entropy_8"}:
        torch.testing.assert_close(found[name][:2], expected[name][:2], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)
    reached = ["score_grad_norm", "advantage_std"] + (["entropy", "max_logit"] if where == "query" else ["error_norm"])
    assert not any(found[name][2].isfinite() for name in reached)
    assert all(found[name][2].isfinite() for name in ("value_norm", "key_norm"))

    other, same = (measured(batch_slice(r, slice(0, 1))) for r in (record, clean))
    for name in NAMES:
        torch.testing.assert_close(other[name], same[name], rtol=0, atol=0, equal_nan=True, msg=name)

    sums, whole = weighed(record, set(NAMES)), weighed(clean, set(NAMES))
    here = torch.zeros(6, 130, dtype=torch.bool)
    here[5, 77] = True
    for name, values in sums.row.items():
        assert not (~values.isfinite() & whole.row[name].isfinite() & ~here).any(), name
    if where == "error":
        assert all(found[name][2].isfinite() for name in ("entropy", "max_logit", "column_gini", "sink_mass"))
    reached_rows = ["entropy", "max_weight", "max_logit"] if where == "query" else ["drift", "pcc", "ppcc", "min_c"]
    assert not any(sums.row[name][5, 77].isfinite() for name in reached_rows)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["query", "key", "value", "error"])
def test_padding_may_hold_anything(name: str) -> None:
    clean = captured(length=130, mask=(torch.arange(130) < 60)[None, None, None])
    tensor = getattr(clean, name).clone()
    tensor[:, :, 60:] = math.nan
    found, expected = measured(dataclasses.replace(clean, **{name: tensor})), measured(clean)
    for statistic in NAMES:
        undeclared = statistic in ("padding_mass", "hidden_tokens")  # of padding that nobody declared
        values = found[statistic], expected[statistic]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-9, equal_nan=undeclared, msg=statistic)


# What it costs


class Operations(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """For which a device would have to finish first."""
        asking = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")
        return sum(self.calls[f"aten::{name}"] for name in asking)


def operations(record: AttentionRecord, names: Any = "core", **options: Any) -> Operations:
    with Operations() as counted:
        measure(record, select(names), **options)
    return counted


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("options", [{}, {"rows": 64}, {"rows": 64, "exact_routing": True}], ids=str)
@pytest.mark.parametrize("lse", [True, False])
def test_a_device_is_asked_no_more_often_for_longer_sequences_or_more_heads(lse: bool, options: dict[str, Any]) -> None:
    waits = []
    for length, heads, batch in ((256, 1, 1), (768, 1, 1), (256, 6, 1), (256, 1, 6)):
        record = captured(length=length, heads=heads, batch=batch, causal=True)
        record = record if lse else dataclasses.replace(record, logsumexp=None)
        waits.append(operations(record, **options).waits)
    assert len(set(waits)) == 1, waits
    assert waits[0] <= 24  # half of them are only asked on the CPU, where an answer costs nothing


@pytest.mark.parametrize("lse", [True, False])
def test_tiles_in_which_nobody_sees_anything_are_not_computed(lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNPROBE_COMPILED", "0")  # C does without torch's products
    position = torch.arange(2048)
    distance = (position[:, None] - position).abs()
    window, documents, everything = distance < 64, position[:, None] // 512 == position // 512, distance < 2047

    def products(mask: Tensor) -> int:
        record = captured(heads=1, length=2048, mask=mask[None, None])
        record = record if lse else dataclasses.replace(record, logsumexp=None)
        return operations(record).calls["aten::bmm"]

    assert not everything.all()
    assert products(window) < 0.7 * products(everything)
    assert products(documents) < 0.4 * products(everything)


def test_skipped_tiles_change_no_number() -> None:
    position = torch.arange(1100)
    record = captured(heads=1, length=1100, mask=(position[:, None] // 512 == position // 512)[None, None])
    assert_close(measured(record), record, 5e-6)


@pytest.mark.parametrize("sharpness", [1.0, 300.0, 3e4])
def test_landmarks_round_as_the_softmax_does(sharpness: float) -> None:
    """Weights of the first key and of the row's own stay what they are, however large the scores."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, error = (torch.randn(1, 2, 256, 64, generator=generator) for _ in range(4))
    record = AttentionRecord(
        value=value, query=query * sharpness, key=key, error=error, scale=0.125, causal=True, self_attention=True
    )
    names = ("sink_mass", "self_mass", "max_weight", "entropy")
    mask = torch.ones(256, 256).tril().bool()  # takes the way of all other masks
    found, other = (measured(x, names) for x in (record, dataclasses.replace(record, causal=False, mask=mask)))
    for name in names:
        torch.testing.assert_close(found[name], other[name], rtol=1e-6, atol=1e-7, msg=name)

"""Every variant of the zoo: which calls are captured, and that they are what the model and autograd say."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense, dense_parts
from tests.capture.models import VARIANTS, Variant
from tests.capture.reference import captured, expected, names

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
EXACT = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}


def test_zoo_has_no_duplicates() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


@each_variant
def test_calls_and_names(variant: Variant) -> None:
    seen = captured(variant)
    assert names(seen) == list(variant.layers)
    kinds = variant.self_attention
    assert [call.result.self_attention for call in seen] == (
        list(kinds) if isinstance(kinds, tuple) else [kinds] * len(seen)
    )
    assert [call.result.dropout for call in seen] == [variant.dropout] * len(seen)


@each_dtype
@each_variant
def test_tensors_are_bitwise_those_of_the_model(variant: Variant, dtype: torch.dtype) -> None:
    for call, note in pairs(variant, dtype):
        record = note.record()
        if variant.name == "output in place":
            assert call.output is None  # it was changed before the error arrived: computed again, not trusted
            call = dataclasses.replace(call, output=record.output)
        for name in ("error", "output", "value", "query", "key", "logits"):
            actual, wanted = getattr(call, name), getattr(record, name)
            assert (actual is None) == (wanted is None), name
            assert wanted is None or torch.equal(actual, wanted), name
            assert wanted is None or actual.dtype == wanted.dtype, name


@each_variant
def test_statistics_are_those_of_a_record_by_hand(variant: Variant) -> None:
    for call, note in pairs(variant):
        record = dataclasses.replace(note.record(), self_attention=call.self_attention)
        if call.output is None:
            record = dataclasses.replace(record, output=None)
        if call.dropout:  # random: that it is the model's own the laws below tell
            record = dataclasses.replace(record, kept=call.kept)
        torch.testing.assert_close(dense(call), dense(record), **EXACT)
        assert torch.equal(dense_parts(call).visible, dense_parts(record).visible)


@each_variant
def test_laws_of_first_order(variant: Variant) -> None:
    for call, note in pairs(variant):
        parts = dense_parts(call)
        assert (call.kept is not None) == (call.dropout > 0)
        assert call.kept is None or not call.kept.all()
        weights = parts.alpha * parts.dropout
        torch.testing.assert_close(weights @ parts.value, parts.output, **EXACT)
        torch.testing.assert_close(parts.E, (parts.error * parts.output).sum(-1), **EXACT)
        if variant.owns_value:
            by_head = weights.mT @ parts.error
            torch.testing.assert_close(over_groups(by_head, call), note.value_gradient(), **EXACT)


def over_groups(by_head: Tensor, record: AttentionRecord) -> Tensor:
    _, _, groups, _, _ = record.shape
    return by_head.unflatten(1, (groups, -1)).sum(2)


def pairs(variant: Variant, dtype: torch.dtype = torch.float64) -> list[tuple[AttentionRecord, object]]:
    return list(zip([call.result for call in captured(variant, dtype)], expected(variant, dtype), strict=True))

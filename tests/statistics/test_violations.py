"""Attention to later tokens and to padding, and tokens that are hidden: against formulas of their own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor

from attnprobe.catalog import STATISTICS, select
from attnprobe.record import AttentionRecord
from attnprobe.statistics import violations
from attnprobe.statistics.dense import dense
from attnprobe.statistics.reduce import combine, finish, finish_error
from attnprobe.statistics.streaming import measure
from tests.reproducible import reproducible
from tests.statistics.strategies import Example, examples
from tests.statistics.test_streaming import finished, long_record, measured

NAMES = ("future_mass", "padding_mass", "hidden_tokens")
B, H, T = 3, 2, 7
TOKENS = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 1]]).bool()
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
TOLD: dict[str, Any] = {"query_tokens": TOKENS, "key_tokens": TOKENS}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(length: int = T, **changes: Any) -> AttentionRecord:
    record = AttentionRecord(
        value=normal(B, H, length, 3, seed=1),
        query=normal(B, H, length, 4, seed=2),
        key=normal(B, H, length, 4, seed=3),
        error=normal(B, H, length, 3, seed=4),
        scale=0.5,
        self_attention=True,
    )
    return dataclasses.replace(record, **changes)


def added(visible: Tensor, value: float = -torch.inf) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, value)


def by_hand(record: AttentionRecord, visible: NDArray[np.bool_], scores: NDArray[np.float64]) -> dict[str, list[float]]:
    """Pair by pair; ``visible`` and ``scores`` are ``[B, H, T, T]``, tokens are declared."""
    assert record.query_tokens is not None
    assert record.key_tokens is not None
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    batch, heads, length, _ = visible.shape
    for h in range(heads):
        future, padding, hidden = [], [], []
        for b in range(batch):
            real, keys = record.query_tokens[b].tolist(), record.key_tokens[b].tolist()
            rows = [i for i in range(length) if real[i] and visible[b, h, i].any()]
            for i in rows:
                weight = {j: math.exp(scores[b, h, i, j]) for j in range(length) if visible[b, h, i, j]}
                sink = 0.0 if record.sink is None else math.exp(float(record.sink[b, h, i]))
                total = math.fsum([*weight.values(), sink])
                padding.append(math.fsum(w for j, w in weight.items() if not keys[j]) / total)
                if len(weight) + (record.sink is not None) >= 2:
                    future.append(math.fsum(w for j, w in weight.items() if j > i) / total)
            tokens = [j for j in range(length) if keys[j]]
            hidden += [not any(visible[b, h, i, j] for i in rows if i != j) for j in tokens[:-1]]
        for name, values in zip(NAMES, (future, padding, hidden), strict=True):
            found[name].append(math.fsum(values) / len(values) if values else math.nan)
    return found


SHOWN = normal(B, H, T, T, seed=5) > -0.5
BIAS = normal(H, T, T, seed=6)
VARIANTS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "everything": ({}, torch.ones(T, T, dtype=torch.bool)),
    "causal": ({"causal": True}, CAUSAL),
    "a mask": ({"mask": SHOWN}, SHOWN),
    "added": ({"mask": added(SHOWN, -1e9)}, SHOWN),
    "causal mask, tokens visible": ({"mask": CAUSAL}, CAUSAL),
    "padding masked": ({"mask": TOKENS[:, None, None]}, TOKENS[:, None, None]),
    "causal, padding masked": ({"causal": True, "mask": TOKENS[:, None, None]}, TOKENS[:, None, None] & CAUSAL),
    "a function": ({"mask_mod": lambda b, h, q_idx, kv_idx: SHOWN[b, h, q_idx, kv_idx]}, SHOWN),
    "a sink": ({"mask": SHOWN, "sink": normal(B, H, T, seed=7)}, SHOWN),
    "dropout": ({"mask": SHOWN, "dropout": 0.3, "kept": SHOWN.roll(1, -1)}, SHOWN),
    "forward only": ({"mask": SHOWN, "error": None}, SHOWN),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("logits", [False, True])
def test_pair_by_pair(variant: str, logits: bool) -> None:
    changes, visible = VARIANTS[variant]
    visible = visible.expand(B, H, T, T)
    record = example(**TOLD, **changes)
    assert record.query is not None
    assert record.key is not None
    scores = record.scale * record.query.double() @ record.key.double().mT
    if logits:
        hidden = scores.masked_fill(~visible, -torch.inf).float()
        record = dataclasses.replace(record, logits=hidden, mask=None, mask_mod=None, query=None, key=None)
    expected = by_hand(record, visible.numpy(), scores.numpy())
    for values in (measured(record, NAMES), dense(record, NAMES)):
        for name in NAMES:
            assert values[name].tolist() == pytest.approx(expected[name], rel=1e-5, abs=1e-7, nan_ok=True), name


def test_grouped_heads_and_a_modified_score() -> None:
    record = example(value=normal(B, 1, T, 3), key=normal(B, 1, T, 4), **TOLD)
    record = dataclasses.replace(record, score_mod=lambda score, b, h, i, j: score + BIAS[h, i, j])
    assert record.query is not None
    assert record.key is not None
    scores = record.scale * record.query.double() @ record.key.double().mT + BIAS.double()
    expected = by_hand(record, np.ones((B, H, T, T), dtype=bool), scores.numpy())
    found = measured(record, NAMES)
    for name in NAMES:
        assert found[name].tolist() == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


# Exactly nothing

HIDING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal with a bias": {"causal": True, "mask": normal(1, H, 300, 300)},
    "bool": {"mask": torch.ones(300, 300).tril().bool()},
    "added": {"mask": added(torch.ones(300, 300).tril().bool(), -1e9)},
    "-100 added": {"mask": added(torch.ones(300, 300).tril().bool(), -100.0)},
    "added to a bias": {"mask": normal(300, 300) + added(torch.ones(300, 300).tril().bool())},
    "a function": {"mask_mod": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx},
    "a score": {"score_mod": lambda score, b, h, q_idx, kv_idx: torch.where(q_idx >= kv_idx, score, -torch.inf)},
}


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("scale", [0.5, 200.0])
def test_what_masks_hide_has_no_weight_at_all(hiding: str, scale: float) -> None:
    tokens = (torch.arange(300) < 300).expand(B, -1)
    found = measured(example(300, scale=scale, key_tokens=tokens, **HIDING[hiding]), NAMES)
    assert found["future_mass"].tolist() == found["padding_mass"].tolist() == found["hidden_tokens"].tolist() == [0, 0]


def test_one_pair_that_leaks_is_found() -> None:
    mask = torch.ones(B, H, 300, 300, dtype=torch.bool).tril()
    mask[1, 1, 20, 299] = True
    found = measured(example(300, mask=mask), NAMES)
    assert found["future_mass"][0] == 0
    assert 0 < found["future_mass"][1] < 1 / (B * 299)


def test_padding_that_holds_anything_and_cannot_be_read_has_no_weight() -> None:
    record = example(mask=TOKENS[:, None, None], **TOLD)
    for name in ("query", "key", "value"):
        getattr(record, name).mT[:, :, :].masked_fill_(~TOKENS[:, None, None], torch.nan)
    assert measured(record, NAMES)["padding_mass"].tolist() == [0, 0]
    assert measured(record, NAMES)["future_mass"].isfinite().all()
    visible = dataclasses.replace(example(**TOLD), mask=None)
    assert (measured(visible, NAMES)["padding_mass"] > 0.1).all()


def test_nothing_is_computed_where_nothing_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exponentials = Mock(wraps=violations.tile_log_sum_exp)
    monkeypatch.setattr(violations, "tile_log_sum_exp", exponentials)
    found = measured(example(causal=True), NAMES)
    assert found["future_mass"].tolist() == [0, 0]
    measured(example(), ("entropy",))
    measured(example(self_attention=False), NAMES)
    measured(example(mask=CAUSAL & TOKENS[:, None, None], **TOLD), NAMES)
    assert not exponentials.called
    measured(example(), NAMES)
    assert exponentials.called


# Whose tokens


def test_hidden_tokens_by_hand() -> None:
    tokens = torch.ones(1, 5, dtype=torch.bool)
    record = AttentionRecord(value=torch.ones(1, 1, 5, 1), logits=torch.zeros(1, 1, 5, 5), self_attention=True)

    def hidden(visible: Tensor, tokens: Tensor | None = tokens) -> float:
        logits = added(visible)[None, None]
        both = {each(dataclasses.replace(record, logits=logits, key_tokens=tokens)) for each in (streamed, reference)}
        assert len(both) == 1 or all(math.isnan(x) for x in both)
        return both.pop()

    def streamed(record: AttentionRecord) -> float:
        return measured(record, NAMES)["hidden_tokens"].item()

    def reference(record: AttentionRecord) -> float:
        return dense(record, NAMES)["hidden_tokens"].item()

    causal = torch.ones(5, 5).tril().bool()
    assert hidden(causal) == 0  # the last token is read by nobody else, as it must be
    assert hidden(torch.eye(5).bool()) == 1
    one_off = causal.clone()
    one_off[:, 1] = False
    one_off[1, 1] = True  # its own row does not count
    assert hidden(one_off) == 1 / 4
    shorter = torch.tensor([[True, True, True, False, False]])
    assert hidden(causal, shorter) == 0  # nor does its last real token, nor what padding reads
    assert hidden(causal & (torch.arange(5) < 1), shorter) == 1 / 2
    assert math.isnan(hidden(causal, torch.tensor([[False, False, True, False, False]])))
    assert math.isnan(hidden(causal, None))


def test_undeclared_padding_has_no_weight_to_speak_of() -> None:
    record = example(mask=TOKENS[:, None, None])
    found = measured(record, NAMES)
    assert found["padding_mass"].isnan().all()
    assert found["hidden_tokens"].isnan().all()
    assert found["future_mass"].isfinite().all()
    one_side = measured(dataclasses.replace(record, query_tokens=TOKENS), NAMES)  # the same tokens
    assert one_side["padding_mass"].tolist() == [0, 0]
    unknown = measured(dataclasses.replace(record, query_tokens=TOKENS, self_attention=None), NAMES)
    assert all(unknown[name].isnan().all() for name in NAMES)
    keys = measured(dataclasses.replace(record, mask=None, key_tokens=TOKENS, self_attention=False), NAMES)
    assert (keys["padding_mass"] > 0).all()
    assert keys["future_mass"].isnan().all()
    assert keys["hidden_tokens"].isnan().all()


def test_queries_whose_place_among_cached_keys_is_unknown() -> None:
    record = example(key=normal(B, H, 9, 4), value=normal(B, H, 9, 3), key_tokens=torch.arange(9).expand(B, 9) > 1)
    found = measured(record, NAMES)
    assert found["future_mass"].isnan().all()
    assert found["hidden_tokens"].isnan().all()
    assert (found["padding_mass"] > 0).all()


# Samples and parts


def long_example(**changes: Any) -> AttentionRecord:
    tokens = torch.arange(200) < torch.tensor([[200], [150], [90]])
    return example(200, query_tokens=tokens, key_tokens=tokens, **changes)


def test_a_sample_estimates_masses_and_says_nothing_of_hidden_tokens() -> None:
    record, masses = long_example(), NAMES[:2]
    exact = measured(record, NAMES)
    generator = torch.Generator().manual_seed(0)
    samples = [measure(record, select(NAMES), rows=64, generator=generator) for _ in range(100)]
    for name in masses:
        found = torch.stack([finish(STATISTICS[name], sample) for sample in samples])
        errors = torch.stack([finish_error(STATISTICS[name], sample) for sample in samples])  # type: ignore[misc]
        spread = found.std(0)
        assert ((found.mean(0) - exact[name]).abs() <= 3 * spread / 10 + 0.01 * exact[name]).all(), name
        assert ((errors.square().mean(0).sqrt() / spread - 1).abs() < 0.25).all(), name
    assert finish(STATISTICS["hidden_tokens"], samples[0]).isnan().all()
    whole = measure(record, select(NAMES), rows=64, exact_routing=True)
    for name in NAMES:
        torch.testing.assert_close(finish(STATISTICS[name], whole), exact[name], rtol=1e-6, atol=0)
        assert finish_error(STATISTICS[name], whole) is None


def test_a_sample_of_what_masks_hide_is_exactly_nothing() -> None:
    tokens = long_example().key_tokens
    assert tokens is not None
    sample = measure(long_example(causal=True, mask=tokens[:, None, None]), select(NAMES), rows=32)
    for name in NAMES[:2]:
        assert finish(STATISTICS[name], sample).tolist() == [0, 0]
        assert finish_error(STATISTICS[name], sample).tolist() == [0, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("exact_routing", [False, True])
def test_a_sample_takes_no_derived_padding_for_declared(exact_routing: bool) -> None:
    tokens = long_example().key_tokens
    assert tokens is not None
    record = example(200, mask=tokens[:, None, None])
    sample = finished(measure(record, select(NAMES), rows=32, exact_routing=exact_routing), NAMES)
    assert sample["padding_mass"].isnan().all()
    assert sample["hidden_tokens"].isnan().all()
    assert (sample["future_mass"] > 0).all()


def test_micro_batches_with_and_without_a_declaration() -> None:
    told, untold = example(**TOLD), example()
    both = finished(combine(measure(record, select(NAMES)) for record in (told, untold)), NAMES)
    alone = measured(told, NAMES)
    for name in NAMES[1:]:
        assert torch.equal(both[name], alone[name])


@reproducible(60)
@given(examples(torch.float32))
def test_more_than_nothing_exactly_where_a_later_key_is_seen(case: Example) -> None:
    tokens = torch.ones(case.visible.shape[0], case.visible.shape[3], dtype=torch.bool)
    record = dataclasses.replace(case.record, query_tokens=None, key_tokens=tokens)
    found, expected = measured(record, NAMES), dense(record, NAMES)
    leaks = (case.visible & torch.ones(case.visible.shape[2:], dtype=torch.bool).triu(1)).any(-1).any(-1).any(0)
    assert not found["padding_mass"].nan_to_num().any()
    assert not found["future_mass"][~leaks].nan_to_num().any()
    assert (found["future_mass"][expected["future_mass"] > 1e-30] > 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_longer_than_a_tile(causal: bool) -> None:
    tokens = (torch.arange(1100) < 700)[None]
    record = long_record(1100, 1100, 2, self_attention=True, key_tokens=tokens)
    record = dataclasses.replace(record, mask=torch.ones(1100, 1100).tril().bool() if causal else None)
    found, expected = measured(record, NAMES), dense(record, NAMES)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)

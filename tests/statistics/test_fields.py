"""Fields that few records have, in float64 against autograd, FlexAttention and records that say the same otherwise."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnprobe.assemble import Measured
from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense, dense_displacement, dense_parts
from attnprobe.statistics.displacement import displacement
from attnprobe.statistics.maps import head_map
from attnprobe.statistics.reduce import finish, finish_residual
from attnprobe.statistics.streaming import context, measure
from tests.statistics.compare import NAMES, TOLERANCE, assert_close
from tests.statistics.test_streaming import LargestTensor, measured

B, H, T, S = 2, 4, 9, 11
GRADIENT_STATISTICS = {
    "advantage_std",
    "relative_advantage_std",
    "advantage_max",
    "advantage_alignment",
    "score_grad_norm",
    "value_grad_norm",
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VISIBLE = normal(B, 1, T, S, seed=9) > -1
VISIBLE[0, 0, 3] = False
KEPT = normal(B, H, T, S, seed=8) > -0.5
SINK = normal(B, H, T, seed=7)
SLOPE, BIAS, SHOWN = torch.rand(H), normal(H, 2 * S, seed=6), normal(B, H, T, S, seed=5) > -1
LEFT, RIGHT = normal(T, 3, seed=4), normal(S, 3, seed=3)


def attention_record(groups: int = H, **changes: Any) -> AttentionRecord:
    record = AttentionRecord(
        value=normal(B, groups, S, 3, seed=10),
        query=normal(B, H, T, 5, seed=11),
        key=normal(B, groups, S, 5, seed=12),
        error=normal(B, H, T, 3, seed=13),
        scale=0.7,
        self_attention=False,
    )
    return dataclasses.replace(record, **changes)


def bare(**changes: Any) -> AttentionRecord:
    """Only the logits are known, one pair in six and one whole row are hidden."""
    logits = (2 * normal(B, H, T, S, seed=14)).masked_fill(~VISIBLE, -torch.inf)
    return attention_record(query=None, key=None, logits=logits, **changes)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def fully_known(record: AttentionRecord) -> AttentionRecord:
    """With the output that belongs to it."""
    return dataclasses.replace(record, output=dense_parts(dataclasses.replace(record, output=None)).output)


# Gradients


@pytest.mark.parametrize("kept", [None, KEPT], ids=["", "dropout"])
@pytest.mark.parametrize("sink", [None, SINK], ids=["", "sink"])
@pytest.mark.parametrize("lse_error", [None, normal(B, H, T, seed=2)], ids=["", "lse"])
def test_gradients_are_those_of_autograd(kept: Tensor | None, sink: Tensor | None, lse_error: Tensor | None) -> None:
    record = bare(kept=kept, sink=sink, lse_error=lse_error, dropout=0.3 if kept is not None else 0)
    assert record.logits is not None
    assert record.error is not None
    rows = VISIBLE.any(-1).expand(B, H, T)  # a row that sees nothing gets no gradient
    leaves = [x.clone().requires_grad_() for x in (record.logits, record.value, SINK)]
    scores, value, logits = leaves
    alone = torch.full_like(logits, -torch.inf) if sink is None else logits
    choices = torch.cat([scores, alone[..., None]], -1).where(rows[..., None], 0)
    weights = choices.softmax(-1).where(rows[..., None], 0)
    alpha = weights[..., :S]
    dropped = alpha if kept is None else alpha * kept / 0.7
    output = dropped @ value
    loss = (output * record.error).sum()
    if lse_error is not None:
        loss = loss + (choices.logsumexp(-1) * lse_error)[rows].sum()
    d_scores, d_value, d_sink = torch.autograd.grad(loss, leaves, materialize_grads=True)

    parts = dense_parts(record)
    same(parts.output, output.detach())
    same(parts.alpha, alpha.detach())
    same(parts.dS, d_scores.nan_to_num(0))
    same(parts.dV, d_value)
    same(parts.E, (record.error * output).sum(-1).detach())
    if sink is not None:
        same(parts.sink[..., 0], weights[..., S].detach())
        same(-(parts.weights * parts.advantages)[..., S], d_sink)

    gradient = torch.cat([d_scores.nan_to_num(0), d_sink[..., None]], -1).transpose(0, 1).flatten(1)
    advantage = -gradient / weights.detach().transpose(0, 1).flatten(1)
    choosing = (dense_parts(record).count >= 2).sum((0, 2))
    expected = {
        "score_grad_norm": gradient.norm(dim=1),
        "value_grad_norm": d_value.transpose(0, 1).flatten(1).norm(dim=1),
        "advantage_std": ((-gradient * advantage).nan_to_num(0).sum(1) / choosing).sqrt(),
        "advantage_max": advantage.nan_to_num(-torch.inf).amax(1),
    }
    for values in (dense(record), measured(record)):
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=1e-9, atol=1e-9)
    assert_close(measured(record), record, TOLERANCE[torch.float64])


def test_an_output_rescaled_by_its_log_sum_exp_is_attention_with_a_sink() -> None:
    logits, value = normal(B, H, T, S), normal(B, H, S, 3)
    output = (logits.softmax(-1) @ value).requires_grad_()
    lse = logits.logsumexp(-1).requires_grad_()
    rescaled = output * torch.sigmoid(lse - SINK)[..., None]
    error = normal(B, H, T, 3, seed=1)
    inner_error, lse_error = torch.autograd.grad(rescaled, [output, lse], error)
    inner = AttentionRecord(value=value, logits=logits, error=inner_error, lse_error=lse_error)
    outer = AttentionRecord(value=value, logits=logits, error=error, sink=SINK)
    same(dense_parts(outer).output, rescaled.detach())
    same(dense_parts(inner).dS, dense_parts(outer).dS)
    same(dense_parts(inner).dV, dense_parts(outer).dV)


# Dropout


def test_dropout_that_is_known_changes_gradient_statistics_only() -> None:
    record = fully_known(bare())
    before, after = dense(record), dense(dataclasses.replace(record, kept=KEPT, dropout=0.3))
    changed = {name for name in NAMES if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
    assert changed == GRADIENT_STATISTICS


def test_weights_that_all_survive_are_weights_of_larger_values() -> None:
    kept = dense(bare(kept=torch.ones_like(KEPT), dropout=0.75))
    larger = dense(bare(value=4 * bare().value))
    for name in GRADIENT_STATISTICS - {"relative_advantage_std", "value_grad_norm"}:
        same(kept[name], larger[name])
    same(kept["output_norm"], larger["output_norm"])
    same(kept["value_grad_norm"], 4 * dense(bare())["value_grad_norm"])


@pytest.mark.parametrize("dropout", [1 - 1e-3, 1.0])
def test_hardly_anything_survives(dropout: float) -> None:
    record = fully_known(bare(kept=torch.rand(B, H, T, S) >= dropout, dropout=dropout))
    assert_close(measured(record), record, TOLERANCE[torch.float64])


# A learned sink


def test_a_sink_by_hand() -> None:
    # Two keys and the sink with a third of the weight each; b = (3, 1, 0), E = 4/3, A = E - b.
    record = AttentionRecord(
        value=torch.tensor([[[[3.0], [1.0]]]]).double(),
        logits=torch.full((1, 1, 1, 2), 5.0).double(),
        error=torch.ones(1, 1, 1, 1).double(),
        sink=torch.full((1, 1, 1), 5.0).double(),
    )
    third = [-5 / 9, 1 / 9, 4 / 9]
    expected = {
        "entropy": math.log(3),
        "normalized_entropy": 1,
        "effective_keys": 3,
        "max_weight": 1 / 3,
        "concentration": 1 / 3,
        "max_logit": 5,
        "logit_spread": 0,
        "top_column_share": 1 / 2,
        "column_gini": 0,
        "output_norm": 4 / 3,
        "advantage_max": 4 / 3,
        "advantage_std": math.sqrt(3 * sum(x * x for x in third)),
        "score_grad_norm": math.sqrt(sum(x * x for x in third)),
        "value_grad_norm": math.sqrt(2) / 3,
    }
    for values in (dense(record), measured(record)):
        assert {name: values[name].item() for name in expected} == {k: pytest.approx(v) for k, v in expected.items()}
    assert dense_parts(record).usage.flatten().tolist() == pytest.approx([1, 1])


def test_a_sink_is_one_more_key_of_value_0() -> None:
    record = bare(sink=SINK, mask=VISIBLE)
    assert record.logits is not None
    logits = torch.cat([record.logits, SINK[..., None]], -1).masked_fill(~VISIBLE.any(-1)[..., None], -torch.inf)
    appended = dataclasses.replace(
        record,
        logits=logits,
        sink=None,
        mask=None,
        value=torch.cat([record.value, torch.zeros(B, H, 1, 3)], 2),
    )
    expected, actual = dense(appended), dense(record)
    of_keys = {"max_weight", "max_logit", "logit_spread", "sink_mass", "value_grad_norm", "relative_advantage_std"}
    of_columns = {"dead_column_fraction", "shared_dead_columns", "column_gini", "top_column_share"}
    for name in set(NAMES) - of_keys - of_columns - {"key_norm", "value_norm", "value_rms"}:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
    same(dense_parts(record).usage, dense_parts(appended).usage[..., :S])


def test_a_row_that_sees_the_sink_only_counts_nowhere() -> None:
    record = bare(sink=SINK)
    parts = dense_parts(record)
    assert (parts.count[0, :, 3] == 0).all()
    assert not parts.rows[0, :, 3].any()
    assert (parts.weights[0, :, 3] == 0).all()
    assert measure(record, select("core"))["masked_rows.sum"].item() == H
    assert_close(measured(record), record, TOLERANCE[torch.float64])


@pytest.mark.parametrize("level", [-torch.inf, -1e9, 300.0])
def test_sinks_that_take_nothing_or_nearly_everything(level: float) -> None:
    record = fully_known(bare(sink=torch.full((B, H, T), level, dtype=torch.float64)))
    assert_close(measured(record), record, TOLERANCE[torch.float64])


def test_displacement_counts_the_weight_that_moves_to_the_sink() -> None:
    now, before = bare(sink=SINK), bare(sink=SINK - 1)
    partial = displacement(now, before)
    for statistic, expected in zip(
        select(["attention_displacement", "value_displacement"]), dense_displacement(now, before), strict=True
    ):
        torch.testing.assert_close(finish(statistic, partial), expected, rtol=1e-9, atol=1e-9)
    one_key = AttentionRecord(value=torch.ones(1, 1, 1, 1), logits=torch.zeros(1, 1, 1, 1), sink=torch.zeros(1, 1, 1))
    away = dataclasses.replace(one_key, sink=torch.full((1, 1, 1), -torch.inf))
    assert dense_displacement(away, one_key)[0].tolist() == [0.5]


# FlexAttention's modifications


def sloped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 3 * torch.tanh(score / 3) - SLOPE[h] * (q_idx - kv_idx)


def relative(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.where(q_idx == kv_idx, -torch.inf, score + BIAS[h, q_idx - kv_idx + S])


def table(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + BIAS[h][q_idx + kv_idx]


def features(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + (LEFT[q_idx] * RIGHT[kv_idx]).sum()


def constant(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.zeros_like(score)


def shown(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return SHOWN[b, h, q_idx, kv_idx] & (q_idx >= 0)


def padded(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx.new_ones((), dtype=torch.bool) & (kv_idx < 7 + b)


def any_feature(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (LEFT[q_idx] > RIGHT[kv_idx]).any()


MODIFIED: list[dict[str, Any]] = [
    {"score_mod": sloped},
    {"score_mod": relative, "mask_mod": padded},
    {"score_mod": table},
    {"score_mod": features, "mask_mod": shown},
    {"score_mod": constant, "mask_mod": any_feature},
    {"mask_mod": any_feature},
]


@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize("modified", MODIFIED, ids=lambda modified: "-".join(f.__name__ for f in modified.values()))
def test_modified_scores_are_those_of_flex_attention(modified: dict[str, Any], groups: int) -> None:
    record = attention_record(groups, **modified)
    mask = modified.get("mask_mod")
    block_mask = None if mask is None else create_block_mask(mask, B, H, T, S, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        expected = flex_attention(
            record.query, record.key, record.value, modified.get("score_mod"), block_mask, record.scale, groups < H
        )
    same(dense_parts(record).output, expected)
    same(context(record), expected)
    assert_close(measured(record), record, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    ("function", "broadcasts"),
    [
        (sloped, True),
        (relative, True),
        (constant, True),
        (shown, True),
        (padded, True),
        (table, False),
        (features, False),
        (any_feature, False),
    ],
)
def test_only_what_is_elementwise_is_called_with_many_indices_at_once(
    function: Callable[..., Tensor], broadcasts: bool
) -> None:
    sizes = []

    def observed(*args: Tensor) -> Tensor:
        sizes.append(args[-1].shape)
        return function(*args)

    measured(attention_record(**{"mask_mod" if function in (shown, padded, any_feature) else "score_mod": observed}))
    assert ((1, 1, S) in sizes) == broadcasts


def test_everything_at_once_over_many_tiles() -> None:
    queries, keys = 300, 1100
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bias, real = random(2, queries), torch.arange(keys) < 1050
    record = AttentionRecord(
        value=random(1, 1, keys, 8),
        query=random(1, 2, queries, 8),
        key=random(1, 1, keys, 8),
        error=random(1, 2, queries, 8),
        scale=0.4,
        causal=True,
        mask=real.view(1, 1, 1, keys),
        kept=random(1, 2, queries, keys) > -1,
        dropout=0.16,
        sink=random(1, 2, queries),
        lse_error=random(1, 2, queries),
        score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx] * (kv_idx % 7),
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() % 5 < 4,
    )
    assert_close(measured(record), record, TOLERANCE[torch.float32])
    wide = dataclasses.replace(record, causal=False)
    assert_close(measured(wide), wide, TOLERANCE[torch.float32])
    with LargestTensor() as largest:
        measure(dataclasses.replace(wide, kept=None), select(NAMES))  # which is of that size itself
    assert largest.elements <= 256 * 1024


# What else knows the fields

CONSISTENT: dict[str, Callable[[], AttentionRecord]] = {
    "dropout": lambda: fully_known(bare(kept=KEPT, dropout=0.3)),
    "sink": lambda: fully_known(bare(sink=SINK + 2)),
    "score_mod": lambda: fully_known(attention_record(score_mod=sloped)),
    "mask_mod": lambda: fully_known(attention_record(mask_mod=shown)),
    "everything": lambda: fully_known(
        attention_record(2, score_mod=relative, mask_mod=shown, kept=KEPT, dropout=0.3, sink=SINK)
    ),
}
WRONG: dict[str, dict[str, Any]] = {
    "dropout": {"kept": KEPT.roll(1, -1)},
    "sink": {"sink": None},
    "score_mod": {"score_mod": features},
    "mask_mod": {"mask_mod": None},
    "everything": {"sink": SINK + 1},
}


@pytest.mark.parametrize("case", CONSISTENT)
def test_the_residual_tells_whether_the_output_is_explained(case: str) -> None:
    record = CONSISTENT[case]()
    right, shifted = record, dataclasses.replace(record, lse_error=normal(B, H, T))
    wrong = dataclasses.replace(record, **WRONG[case])
    for known in (right, shifted):
        assert (finish_residual(measure(known, select("core"))) < 1e-12).all()
    assert (finish_residual(measure(wrong, select("core"))) > 0.02).all()


def test_the_residual_is_unknown_where_dropout_is() -> None:
    partial = measure(dataclasses.replace(CONSISTENT["dropout"](), kept=None), select("core"))
    assert finish_residual(partial).isnan().all()


def test_errors_of_any_size() -> None:
    record = dataclasses.replace(CONSISTENT["everything"](), lse_error=normal(B, H, T))
    assert record.error is not None
    assert record.lse_error is not None
    names = ("score_grad_norm", "advantage_std", "advantage_max", "value_grad_norm")
    tiny = dataclasses.replace(
        record,
        **{name: getattr(record, name).float() for name in ("query", "key", "value", "output", "sink")},
        error=record.error.float() * 2.0**-90,
        lse_error=record.lse_error.float() * 2.0**-90,
    )
    actual, expected = measured(tiny, names), dense(record)
    for name in names:
        torch.testing.assert_close(actual[name] * 2.0**90, expected[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("head", [0, 3])
def test_pictures_are_of_the_head_that_was_asked_for(head: int) -> None:
    record = dataclasses.replace(CONSISTENT["everything"](), lse_error=normal(B, H, T))
    parts, picture = dense_parts(record), head_map("layer", head, record)
    visible = parts.visible[0, head]
    assert picture.compatibility is not None
    assert picture.advantage is not None
    same(picture.attention[visible], parts.alpha[0, head][visible])
    same(picture.advantage[visible], parts.advantage[0, head][visible])
    same(picture.compatibility[visible], (parts.error @ parts.value.mT)[0, head][visible])
    assert picture.attention[~visible].isnan().all()


@pytest.mark.parametrize("keys", [S, 150])
@pytest.mark.parametrize("padded", [False, True])
def test_usage_is_of_the_first_sequence_and_the_columns_of_a_pixel_together(keys: int, padded: bool) -> None:
    mask = normal(B, H, T, keys, seed=3) > -0.5
    mask[0, 2, 3] = mask[0, 2, :, 4] = False  # a row without a key, and a key without a row
    record = AttentionRecord(
        value=normal(B, H, keys, 3),
        query=normal(B, H, T, 5, seed=1),
        key=normal(B, H, keys, 5, seed=2),
        mask=mask,
        sink=SINK,
        query_tokens=torch.arange(T) < torch.tensor([[6], [T]]) if padded else None,
        self_attention=False,
    )
    parts, picture = dense_parts(record), head_map("layer", 2, record)
    rows = [row for row in range(6 if padded else T) if parts.visible[0, 2, row].any()]
    pixels = min(64, keys)
    reads, uniform = torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, dtype=torch.float64)
    for row in rows:
        for key in range(keys):
            if parts.visible[0, 2, row, key]:
                reads[key * pixels // keys] += parts.alpha[0, 2, row, key]
                uniform[key * pixels // keys] += 1 / (int(parts.visible[0, 2, row].sum()) + 1)  # the sink is one
    assert picture.usage is not None
    torch.testing.assert_close(picture.usage, reads / uniform, rtol=1e-12, atol=0, equal_nan=True)
    assert bool(picture.usage.isnan().any()) == (keys == S)


def test_notes_say_which_weights_the_statistics_are_of() -> None:
    def notes(record: AttentionRecord) -> str:
        return "\n".join(Measured.of(record, {}).notes)

    record = CONSISTENT["everything"]()
    assert "gradient statistics of the weights as dropped" in notes(record)
    assert "sink" in notes(record)
    unknown = notes(dataclasses.replace(record, kept=None, sink=None))
    assert "statistics are those of the weights before dropout" in unknown
    assert "sink" not in unknown
    assert "dropout" not in notes(dataclasses.replace(record, kept=None, dropout=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": KEPT}, "dropout must be above 0"),
        ({"kept": KEPT[:, :1], "dropout": 0.1}, r"kept has shape \[2, 1, 9, 11\] instead of \[2, 4, 9, 11\]"),
        ({"sink": SINK[0]}, r"sink has shape \[4, 9\]"),
        ({"lse_error": SINK[..., None]}, "lse_error has shape"),
        ({"logits": normal(B, H, T, S), "score_mod": sloped}, "logits have them already"),
        ({"logits": normal(B, H, T, S), "mask_mod": shown}, "logits have them already"),
    ],
)
def test_fields_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_record(**changes)

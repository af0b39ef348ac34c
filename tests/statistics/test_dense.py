"""The dense reference against autograd, numpy and answers found by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from attnprobe.catalog import STATISTICS
from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense, dense_displacement, dense_parts
from tests.reproducible import reproducible
from tests.statistics.compare import NAMES
from tests.statistics.strategies import Example, examples, records

NAN = math.nan
NEEDS_ERROR = {
    "advantage_std",
    "relative_advantage_std",
    "advantage_max",
    "advantage_alignment",
    "score_grad_norm",
    "value_grad_norm",
    "error_norm",
    "error_diversity",
    "head_importance",
}


def random_record(
    batch: int = 2, heads: int = 2, groups: int = 2, queries: int = 6, keys: int = 6, **changes: Any
) -> AttentionRecord:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    record = AttentionRecord(
        value=normal(batch, groups, keys, 3),
        query=normal(batch, heads, queries, 4),
        key=normal(batch, groups, keys, 4),
        error=normal(batch, heads, queries, 3),
        scale=0.5,
    )
    return dataclasses.replace(record, **changes)


def from_weights(weights: list[list[float]], **changes: Any) -> AttentionRecord:
    """One head whose attention is ``weights [T, S]``; a weight of 0 is a masked pair. Values are 1, 2, ... wide 1."""
    alpha = torch.tensor(weights, dtype=torch.float64)
    value = torch.arange(1.0, alpha.shape[1] + 1, dtype=torch.float64)[None, None, :, None]
    return dataclasses.replace(AttentionRecord(value=value, logits=alpha.log()[None, None]), **changes)


def value_of(name: str, record: AttentionRecord) -> float:
    """The statistic of the first head."""
    return dense(record, [name])[name][0].item()


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


# Gradients


@dataclass
class Autograd:
    """What autograd says about an explicit attention: gradients at the scores and inputs, value per query head."""

    output: Tensor
    scores: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    value_per_head: Tensor


def differentiate(record: AttentionRecord, visible: Tensor, bias: Tensor | None = None) -> Autograd:
    assert record.query is not None
    assert record.key is not None
    assert record.error is not None
    repeats = record.query.shape[1] // record.key.shape[1]
    query, key, value = (x.clone().requires_grad_() for x in (record.query, record.key, record.value))
    value_per_head = value.repeat_interleave(repeats, 1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(repeats, 1)) * record.scale
    scores = scores if bias is None else scores + bias
    alpha = torch.softmax(torch.where(visible, scores, -torch.inf), -1)
    output = torch.einsum("bhij,bhje->bhie", alpha, value_per_head)
    inputs = (scores, query, key, value, value_per_head)
    return Autograd(output.detach(), *torch.autograd.grad(output, inputs, record.error))


CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
RANDOM = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
RANDOM[..., 0] = True
BIAS = torch.linspace(-2, 2, 36, dtype=torch.float64).view(6, 6)
REAL = torch.arange(6) < torch.tensor([[4], [6]])
SIZES = {
    "plain": {},
    "causal": {"causal": True, "visible": CAUSAL},
    "bool mask": {"heads": 4, "groups": 4, "mask": RANDOM, "visible": RANDOM},
    "bias": {"mask": BIAS, "bias": BIAS},
    "bias and -inf": {"mask": BIAS.where(CAUSAL, -torch.inf), "bias": BIAS, "visible": CAUSAL},
    "grouped": {"heads": 4, "groups": 2, "causal": True, "visible": CAUSAL},
    "multi-query": {"heads": 6, "groups": 1},
    "padding": {"mask": REAL[:, None, None], "visible": REAL[:, None, None], "self_attention": True},
    "cross": {"queries": 3, "keys": 5},
    "causal cross": {"queries": 6, "keys": 4, "causal": True, "visible": CAUSAL[:, :4]},
    "one query": {"queries": 1, "keys": 6},
    "one key": {"queries": 6, "keys": 1},
    "one token": {"queries": 1, "keys": 1, "causal": True},
}


@pytest.mark.parametrize("configuration", SIZES.values(), ids=SIZES.keys())
def test_gradients_are_those_of_autograd(configuration: dict[str, Any]) -> None:
    configuration = dict(configuration)
    visible, bias = configuration.pop("visible", torch.tensor(True)), configuration.pop("bias", None)
    record = random_record(**configuration)
    parts = dense_parts(record)
    assert record.error is not None
    # A padding query gets no error in training; the statistics leave it out, autograd would not.
    record = dataclasses.replace(record, error=record.error * parts.rows[..., None])
    parts, exact = dense_parts(record), differentiate(record, visible, bias)

    def same(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    same(parts.output, exact.output)
    same(parts.dS, exact.scores)
    same(parts.dV, exact.value_per_head)
    same(record.scale * parts.dS @ parts.key, exact.query)
    batch, heads, groups, _, keys = record.shape
    grouped = (batch, groups, heads // groups, keys, -1)
    same(parts.dV.view(grouped).sum(2), exact.value)
    same((record.scale * parts.dS.mT @ parts.query).view(grouped).sum(2), exact.key)
    same((parts.error * exact.output).sum(-1), (parts.alpha * parts.b).sum(-1))
    same(parts.E, (parts.alpha * parts.b).sum(-1))
    same(parts.dS.sum(-1), torch.zeros_like(parts.E))
    assert (parts.dS[~parts.visible] == 0).all()
    assert (parts.alpha[~parts.visible] == 0).all()
    same(parts.dS, -parts.alpha * parts.advantage)

    statistics = dense(record)
    same(statistics["score_grad_norm"], exact.scores.transpose(0, 1).flatten(1).norm(dim=1))
    same(statistics["value_grad_norm"], exact.value_per_head.transpose(0, 1).flatten(1).norm(dim=1))


@reproducible(40)
@given(examples(torch.float64))
def test_parts_of_any_record(example: Example) -> None:
    parts = dense_parts(example.record)
    assert torch.equal(parts.visible, example.visible)
    total = parts.weights.sum(-1)
    torch.testing.assert_close(total, parts.visible.any(-1).double(), rtol=1e-12, atol=1e-12)
    usage = parts.usage.where(parts.seen > 0, 1)
    assert (usage >= 0).all()


@reproducible(40)
@given(records(torch.float64))
def test_values_of_any_record_have_the_shape_and_range_of_the_catalogue(record: AttentionRecord) -> None:
    values = dense(record)
    assert tuple(values) == NAMES
    for name, value in values.items():
        statistic = STATISTICS[name]
        assert value.shape == ((1,) if statistic.level == "layer" else (record.shape[1],)), name
        assert value.dtype == torch.float64
        finite = value[~value.isnan()]
        assert (finite >= statistic.low - 1e-9).all(), name
        assert (finite <= statistic.high + 1e-9).all(), name


# Attention

CAUSAL_UNIFORM = from_weights([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], self_attention=True)
QUARTERS = from_weights([[1 / 4, 3 / 4]])
ENTROPY_OF_QUARTERS = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("entropy", from_weights([[0.5, 0.5]]), math.log(2)),
        ("entropy", QUARTERS, ENTROPY_OF_QUARTERS),
        ("entropy", CAUSAL_UNIFORM, (math.log(2) + math.log(3)) / 2),
        ("entropy", from_weights([[1, 0], [1, 0]]), NAN),
        ("normalized_entropy", QUARTERS, ENTROPY_OF_QUARTERS / math.log(2)),
        ("normalized_entropy", CAUSAL_UNIFORM, 1),
        ("effective_keys", CAUSAL_UNIFORM, 2.5),
        ("max_weight", CAUSAL_UNIFORM, (1 / 2 + 1 / 3) / 2),
        ("concentration", QUARTERS, 1 / 16 + 9 / 16),
        ("concentration", CAUSAL_UNIFORM, (1 / 2 + 1 / 3) / 2),
        ("max_logit", QUARTERS, math.log(3 / 4)),
        ("max_logit", from_weights([[1, 0], [0, 0]]), 0),
        ("max_logit", from_weights([[0, 0]]), NAN),
        ("logit_spread", QUARTERS, math.log(3) / 2),
        ("logit_spread", from_weights([[1, 0]]), 0),
        ("sink_mass", CAUSAL_UNIFORM, (1 / 2 + 1 / 3) / 2),
        ("sink_mass", dataclasses.replace(CAUSAL_UNIFORM, self_attention=False), (1 + 1 / 2 + 1 / 3) / 3),
        ("sink_mass", dataclasses.replace(CAUSAL_UNIFORM, self_attention=None), NAN),
        ("sink_mass", from_weights([[0.2, 0.8], [0, 1]], self_attention=False), 0.2),
        ("self_mass", CAUSAL_UNIFORM, (1 / 2 + 1 / 3) / 2),
        ("self_mass", from_weights([[0, 0.5, 0.5], [0.2, 0.3, 0.5], [1, 0, 0]], self_attention=True), 0.15),
        ("self_mass", dataclasses.replace(CAUSAL_UNIFORM, self_attention=False), NAN),
        ("self_mass", from_weights([[0.5, 0.5]], self_attention=True), NAN),
        ("mean_distance", CAUSAL_UNIFORM, (1 / 2 + (2 + 1) / 3) / 2),
        ("mean_distance", dataclasses.replace(CAUSAL_UNIFORM, self_attention=None), NAN),
        ("entropy_8", from_weights([[1 / 8] * 8, [1 / 2] * 2 + [0] * 6]), 1),
        ("entropy_8", from_weights([[1 / 7] * 7]), NAN),
    ],
)
def test_where_a_query_looks(name: str, record: AttentionRecord, expected: float) -> None:
    assert value_of(name, record) == close(expected)


def test_sink_is_the_first_token_that_is_not_padding() -> None:
    weights = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.3, 0.7, 0], [0, 0.1, 0.5, 0.4]]
    padded = torch.tensor([[False, True, True, True]])
    record = from_weights(weights, self_attention=True, key_tokens=padded)
    assert value_of("sink_mass", record) == close((0.3 + 0.1) / 2)


def test_entropy_8_pools_all_heads_and_sequences() -> None:
    logits = torch.zeros(2, 2, 1, 9, dtype=torch.float64)
    logits[0, 0, 0, 0] = 1e3  # one-hot in one head of one sequence: 0; uniform elsewhere: 1
    logits[1, 1, 0, :2] = -torch.inf  # sees 7 keys: not counted
    record = AttentionRecord(value=torch.ones(2, 2, 9, 1), logits=logits)
    assert dense(record, ["entropy_8"])["entropy_8"].tolist() == close([2 / 3])


# Columns


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("column_gini", [[0.3, 0.1, 0.4, 0.2]], (-3 * 0.1 - 0.2 + 0.3 + 3 * 0.4) / 4),
        ("column_gini", [[0.25] * 4], 0),
        ("column_gini", [[0, 1, 0]], 0),  # one column that any row sees
        # The usage of [1, 2/3] is 1.25 and 0.5: what a column gets in relation to a fair share.
        ("column_gini", [[1, 0], [0.75, 0.25]], (1.75 / 1.5 - 0.5) / (2 * (1.75 / 1.5 + 0.5))),
        ("top_column_share", [[0.3, 0.1, 0.4, 0.2]], 0.4),
        ("top_column_share", [[1, 0], [0.75, 0.25]], 1.75 / 2),
        ("top_column_share", [[0, 0]], NAN),
        ("dead_column_fraction", [[0.004, 0.006, 0.99]] * 8, 2 / 3),  # usage .012, .018, 2.97
        ("dead_column_fraction", [[0.004, 0.007, 0.989]] * 8, 1 / 3),  # usage .021: alive
        ("dead_column_fraction", [[0.004, 0.006, 0.99]] * 7, NAN),
        ("dead_column_fraction", [[0.004, 0.006, 0.99]] * 8 + [[0, 0.5, 0.5]], 1 / 3),
        ("dead_column_fraction", [[0, 0.006, 0.994]] * 8, 1 / 2),  # nobody sees the first
    ],
)
def test_how_columns_are_read(name: str, weights: list[list[float]], expected: float) -> None:
    assert value_of(name, from_weights(weights)) == close(expected)


def two_heads(first: list[list[float]], second: list[list[float]]) -> AttentionRecord:
    logits = torch.tensor([[first, second]], dtype=torch.float64).log()
    return AttentionRecord(value=torch.ones(1, 2, logits.shape[-1], 1), logits=logits)


def test_shared_dead_columns_are_dead_in_every_head() -> None:
    first, second = [[0.98, 0.012, 0.004, 0.004]] * 8, [[0.002, 0.994, 0.002, 0.002]] * 8
    record = two_heads(first, [[0.002, 0.498, 0.002, 0.498]] * 8)
    assert dense(record)["shared_dead_columns"].tolist() == close([1 / 4])
    assert dense(two_heads(first, second))["dead_column_fraction"].tolist() == close([2 / 4, 3 / 4])
    # A column that one head may not see is not judged.
    hidden = [[0.002, 0.998, 0, 0]] * 8
    assert dense(two_heads(first, hidden))["shared_dead_columns"].tolist() == close([0])


def test_columns_are_counted_per_sequence_first() -> None:
    logits = torch.zeros(3, 1, 8, 4, dtype=torch.float64)
    logits[0, 0, :, 0] = 30.0  # three dead columns of four
    logits[1, 0, :, 2:] = -torch.inf  # two columns, none dead
    logits[2, 0, :-1] = -torch.inf  # one row only: no column is judged
    record = AttentionRecord(value=torch.ones(3, 1, 4, 1), logits=logits)
    assert value_of("dead_column_fraction", record) == close((3 / 4 + 0) / 2)
    assert value_of("top_column_share", record) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


def test_columns_that_are_padding_do_not_count() -> None:
    tokens = torch.tensor([[True, True, True, False]])
    record = from_weights([[0.3, 0.1, 0.2, 0.4]], key_tokens=tokens, self_attention=False)
    assert value_of("top_column_share", record) == close(0.3 / 0.6)
    assert value_of("column_gini", record) == close((-2 * 0.1 + 2 * 0.3) / (3 * 0.6))


# Norms and gradients


def test_norms() -> None:
    record = AttentionRecord(
        query=torch.tensor([[[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [6.0, 8.0]]]]),
        key=torch.tensor([[[[5.0, 12.0], [0.0, 1.0]]]]),
        value=torch.tensor([[[[1.0, 2.0, 2.0], [4.0, 0.0, 0.0]]]]),
        output=torch.tensor([[[[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]]]).expand(1, 2, 2, 3),
        error=torch.tensor([[[[2.0, 3.0, 6.0], [1.0, 0.0, 0.0]]]]).expand(1, 2, 2, 3),
    )
    values = dense(record)
    assert values["query_norm"].tolist() == close([3, 5])
    assert values["key_norm"].tolist() == close([7, 7])
    assert values["value_norm"].tolist() == close([3.5, 3.5])
    assert values["value_rms"].tolist() == close([math.sqrt(25 / 6)] * 2)
    assert values["output_norm"].tolist() == close([3, 3])
    assert values["error_norm"].tolist() == close([5, 5])
    assert values["head_importance"].tolist() == close([2, 2])
    without_first = dense(dataclasses.replace(record, key_tokens=torch.tensor([[False, True]])))
    assert without_first["value_norm"].tolist() == close([4, 4])
    assert without_first["value_rms"].tolist() == close([math.sqrt(16 / 3)] * 2)


def test_advantage_by_hand() -> None:
    # One query, two keys, equal weights; b = (3, 1), E = 2, A = (-1, 1), dS = (1/2, -1/2).
    record = from_weights(
        [[0.5, 0.5]],
        value=torch.tensor([[[[3.0], [1.0]]]], dtype=torch.float64),
        error=torch.ones(1, 1, 1, 1, dtype=torch.float64),
    )
    parts = dense_parts(record)
    assert parts.advantage.flatten().tolist() == close([-1, 1])
    assert parts.dS.flatten().tolist() == close([0.5, -0.5])
    expected = {
        "advantage_std": 1,
        "relative_advantage_std": 1 / math.sqrt(5),
        "advantage_max": 1,
        "score_grad_norm": math.sqrt(0.5),
        "value_grad_norm": math.sqrt(0.5),
        "head_importance": 2,
        "error_norm": 1,
        "error_diversity": NAN,
        "advantage_alignment": NAN,
    }
    assert {name: value_of(name, record) for name in NEEDS_ERROR} == {n: close(x) for n, x in expected.items()}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ([[1, 0], [5, 0]], 0),
        ([[1, 0], [0, 3]], 1),
        ([[1, 0], [-2, 0]], 2),
        ([[1, 0], [0, 0], [0, 7]], 1),
        ([[1, 0], [0, 0], [0, 0]], NAN),
        ([[1, 0], [0, 1], [1, 0]], 1 - (5 - 3) / 6),
    ],
)
def test_error_diversity(error: list[list[float]], expected: float) -> None:
    u = torch.tensor(error, dtype=torch.float64)
    record = AttentionRecord(value=torch.ones(1, 1, 2, 2), logits=torch.zeros(1, 1, len(u), 2), error=u[None, None])
    assert value_of("error_diversity", record) == close(expected)


def test_advantage_alignment_is_the_correlation_over_visible_keys() -> None:
    record = random_record(queries=7, keys=7, causal=True, mask=torch.rand(7, 7) > 0.2)
    parts = dense_parts(record)
    for head in range(2):
        correlations = []
        for item in range(2):
            for i in range(7):
                seen = parts.visible[item, head, i]
                if seen.sum() >= 3:
                    pair = (parts.alpha[item, head, i, seen].numpy(), parts.advantage[item, head, i, seen].numpy())
                    correlations.append(np.corrcoef(*pair)[0, 1])
        assert dense(record)["advantage_alignment"][head].item() == pytest.approx(np.mean(correlations), abs=1e-12)


@pytest.mark.parametrize("flat", ["query", "value", "error"])
def test_advantage_alignment_leaves_out_rows_without_spread(flat: str) -> None:
    record = random_record()
    x = getattr(record, flat)
    still = {"query": x * 1e-5, "value": 1 + x * 1e-5, "error": x * 0}[flat]
    assert value_of("advantage_alignment", record) == pytest.approx(0, abs=1)
    assert math.isnan(value_of("advantage_alignment", dataclasses.replace(record, **{flat: still})))


# Outputs of heads


def test_head_similarity_is_the_linear_cka() -> None:
    record = random_record(batch=3, heads=3, groups=3)
    output = dense_parts(record).output.numpy()
    kernels = []
    for head in range(3):
        x = output[:, head].reshape(18, 3)
        centring = np.eye(18) - 1 / 18
        kernels.append(centring @ x @ x.T @ centring)
    cka = [
        [np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)) if a is not b else -1 for b in kernels] for a in kernels
    ]
    assert dense(record)["head_similarity"].tolist() == close(np.max(cka, 1).tolist())


def test_head_similarity_sees_a_rotated_copy() -> None:
    record = random_record(heads=3, groups=3)
    output = dense_parts(record).output.clone()
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    output[:, 2] = 5 * output[:, 0] @ rotation + 1
    similarity = dense(dataclasses.replace(record, output=output))["head_similarity"]
    assert similarity[[0, 2]].tolist() == close([1, 1])
    assert similarity[1] < 1
    assert math.isnan(value_of("head_similarity", random_record(heads=1, groups=1)))


def test_output_stable_rank() -> None:
    record = random_record(batch=3)
    x = dense_parts(record).output[:, 0].reshape(18, 3).numpy()
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert value_of("output_stable_rank", record) == close(np.sum(singular**2) / singular[0] ** 2)
    line = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0, 2.0])
    flat = dataclasses.replace(record, output=line.expand(3, 2, 6, 3))
    assert dense(flat)["output_stable_rank"].tolist() == close([1, 1])


def test_output_variation() -> None:
    record = random_record(batch=3)
    x = dense_parts(record).output[:, 0].reshape(18, 3).numpy()
    assert value_of("output_variation", record) == close(np.sum((x - x.mean(0)) ** 2) / np.sum(x**2))
    centred = torch.arange(-2.5, 3)[:, None].expand(3, 2, 6, 3)
    assert dense(dataclasses.replace(record, output=centred))["output_variation"].tolist() == close([1, 1])
    alike = torch.ones(3, 2, 6, 3)
    assert dense(dataclasses.replace(record, output=alike))["output_variation"].tolist() == [0, 0]
    assert dense(dataclasses.replace(record, output=0 * alike))["output_variation"].isnan().all()


def test_outputs_are_compared_over_the_rows_that_count_in_every_head() -> None:
    mask = torch.ones(2, 2, 6, 6, dtype=torch.bool)
    mask[0, 1, 2] = False  # head 1 sees nothing in one row of the first sequence
    record = random_record(mask=mask)
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, 2] = False
    x = dense_parts(record).output[:, 0][counted].numpy()
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert value_of("output_stable_rank", record) == close(np.sum(singular**2) / singular[0] ** 2)
    nothing = dense(random_record(mask=torch.zeros(6, 6, dtype=torch.bool)))
    assert nothing["output_stable_rank"].isnan().all()
    assert nothing["output_variation"].isnan().all()
    assert nothing["head_similarity"].isnan().all()


# Which pairs, rows and keys count

VISIBLE = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [-1e9, -2e4, -100.0, -50.0, -torch.inf, "finfo.min"], ids=lambda level: str(level))
def test_additive_values_that_mask(dtype: torch.dtype, level: float | str) -> None:
    low = torch.finfo(dtype).min if level == "finfo.min" else float(level)
    mask = torch.zeros(3, 3, dtype=torch.float64).masked_fill(~VISIBLE, low).to(dtype)
    record = random_record(queries=3, keys=3)
    expected, actual = dense(dataclasses.replace(record, mask=VISIBLE)), dense(dataclasses.replace(record, mask=mask))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "levels",
    [(0, -49), (0, -40, -100), (-100, -100)],
    ids=["small", "gradual", "one level"],
)
def test_additive_values_that_are_a_bias(levels: tuple[float, ...]) -> None:
    mask = torch.tensor([*levels] * 3)[:3].expand(3, 3)
    assert dense_parts(random_record(queries=3, keys=3, mask=mask)).visible.all()


@pytest.mark.parametrize("levels", [(0, -9999, 1), (0.5, -100, -20), (3, -98, -103)])
def test_a_bias_with_a_mask_in_it(levels: tuple[float, ...]) -> None:
    """As Swin adds 0 and -100 to its position bias: nothing lies in between."""
    mask = torch.tensor(levels).expand(3, 3)
    assert torch.equal(dense_parts(random_record(queries=3, keys=3, mask=mask)).visible[0, 0], mask > -50)


def test_a_visible_pair_stays_visible_when_its_weight_underflows() -> None:
    logits = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    logits[..., 2] = -5000.0
    record = AttentionRecord(value=torch.ones(1, 1, 3, 1), logits=logits)
    assert dense_parts(record).count.item() == 3
    assert value_of("normalized_entropy", record) == close(math.log(2) / math.log(3))
    assert value_of("logit_spread", record) == close(5000 / 3)


@pytest.mark.parametrize("low", [-torch.inf, -1e4, torch.finfo(torch.float32).min / 2, torch.finfo(torch.float32).min])
def test_logits_that_mask(low: float) -> None:
    logits = torch.randn(1, 2, 3, 3).masked_fill(~VISIBLE, low)
    parts = dense_parts(AttentionRecord(value=torch.ones(1, 2, 3, 1), logits=logits))
    assert (parts.visible == VISIBLE).all()


def test_a_mask_beside_logits_is_not_added_and_scale_and_causal_are_not_used() -> None:
    logits = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    record = AttentionRecord(value=torch.ones(1, 1, 3, 1), logits=logits, scale=7.0, causal=True)
    assert torch.equal(dense_parts(record).scores, logits)
    bias = torch.full((3, 3), 0.5).masked_fill(~VISIBLE, -torch.inf)
    parts = dense_parts(dataclasses.replace(record, mask=bias))
    assert torch.equal(parts.scores, logits.masked_fill(~VISIBLE, -torch.inf))


def test_without_queries_what_needs_them_is_nan() -> None:
    record = dense(AttentionRecord(value=torch.ones(1, 2, 3, 1), logits=torch.randn(1, 2, 3, 3)))
    assert record["query_norm"].isnan().all()
    assert record["key_norm"].isnan().all()
    assert record["value_norm"].tolist() == [1, 1]


def test_grouped_heads_read_the_group_of_their_index() -> None:
    grouped = random_record(heads=6, groups=2)
    assert grouped.key is not None
    index = [0, 0, 0, 1, 1, 1]
    repeated = dataclasses.replace(grouped, key=grouped.key[:, index], value=grouped.value[:, index])
    expected, actual = dense(repeated), dense(grouped)
    for name in NAMES:
        assert torch.equal(actual[name].nan_to_num(), expected[name].nan_to_num()), name


def padded(record: AttentionRecord, left: int, right: int) -> AttentionRecord:
    """The same sequences with tokens of padding around them that nobody may read."""

    def pad(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.nn.functional.pad(x, (0, 0, left, right), value=9.0)

    real = torch.zeros(record.shape[3] + left + right, dtype=torch.bool)
    real[left : left + record.shape[3]] = True
    changes: dict[str, Any] = {name: pad(getattr(record, name)) for name in ("query", "key", "value", "error")}
    return dataclasses.replace(record, mask=real[None, None, None], **changes)


@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_counts_nowhere(left: int, right: int, causal: bool) -> None:
    record = random_record(queries=12, keys=12, causal=causal, self_attention=True)
    expected, actual = dense(record), dense(padded(record, left, right))
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def test_fully_masked_rows_count_nowhere() -> None:
    record = random_record(queries=12, keys=12)
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[5:] = False
    assert record.query is not None
    assert record.error is not None
    short = dataclasses.replace(record, query=record.query[:, :, :5], error=record.error[:, :, :5])
    expected, actual = dense(short), dense(dataclasses.replace(record, mask=mask))
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


FIRST_TWO = torch.tensor([[True, True, False]])
LAST_TWO = torch.tensor([[False, True, True]])
ALL = torch.tensor([[True, True, True]])


@pytest.mark.parametrize(
    ("changes", "rows", "keys"),
    [
        ({"self_attention": True}, FIRST_TWO, FIRST_TWO),
        ({"self_attention": None}, ALL, FIRST_TWO),
        ({"self_attention": False}, ALL, FIRST_TWO),
        ({"self_attention": True, "key_tokens": LAST_TWO}, LAST_TWO, LAST_TWO),
        ({"self_attention": True, "query_tokens": LAST_TWO}, LAST_TWO, LAST_TWO),
        ({"self_attention": True, "query_tokens": LAST_TWO, "key_tokens": ALL}, LAST_TWO, ALL),
        ({"self_attention": False, "key_tokens": LAST_TWO}, ALL, LAST_TWO),
        ({"self_attention": False, "query_tokens": LAST_TWO}, LAST_TWO, FIRST_TWO),
    ],
)
def test_which_tokens_are_padding(changes: dict[str, Any], rows: Tensor, keys: Tensor) -> None:
    # Nobody sees the last key; one of the heads does not see the second either.
    mask = FIRST_TWO[None, None].repeat(1, 2, 1, 1)
    mask[:, 1, :, 1] = False
    parts = dense_parts(random_record(batch=1, queries=3, keys=3, mask=mask, **changes))
    assert torch.equal(parts.keys, keys)
    assert torch.equal(parts.rows, rows[:, None].expand(1, 2, 3))


# The function itself


@pytest.mark.parametrize("make", [random_record, lambda: random_record(queries=3, causal=True, self_attention=False)])
def test_forward_only_leaves_what_needs_the_error_undefined(make: Callable[[], AttentionRecord]) -> None:
    record = make()
    both, forward = dense(record), dense(dataclasses.replace(record, error=None))
    assert {name for name in NAMES if forward[name].isnan().all() and not both[name].isnan().all()} == NEEDS_ERROR
    for name in set(NAMES) - NEEDS_ERROR:
        assert torch.equal(forward[name].nan_to_num(), both[name].nan_to_num()), name


def test_an_output_that_was_recorded_is_the_one_that_is_measured() -> None:
    record = random_record()
    doubled = dataclasses.replace(record, output=2 * dense_parts(record).output)
    expected, actual = dense(record), dense(doubled)
    for name in NAMES:
        factor = 2 if name in ("output_norm", "head_importance") else 1
        torch.testing.assert_close(actual[name], factor * expected[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_low_precision_inputs_are_measured_as_they_are_in_float64() -> None:
    names = ("query", "key", "value", "error")
    record = random_record()
    low = dataclasses.replace(record, **{name: getattr(record, name).bfloat16() for name in names})
    rounded = dataclasses.replace(low, **{name: getattr(low, name).double() for name in names})
    expected, actual = dense(rounded), dense(low)
    for name in NAMES:
        assert torch.equal(actual[name].nan_to_num(), expected[name].nan_to_num()), name


def test_names_choose_what_is_computed() -> None:
    record = random_record()
    assert list(dense(record, ["entropy", "error_norm"])) == ["entropy", "error_norm"]
    with pytest.raises(UnknownNameError, match="Did you mean 'entropy'"):
        dense(record, ["entropi"])
    with pytest.raises(ConfigurationError, match="dense_displacement"):
        dense(record, ["value_displacement"])


def test_displacement_by_hand() -> None:
    before = from_weights([[0.5, 0.5], [1, 0]])
    after = from_weights([[0.2, 0.8], [1, 0]], value=before.value + torch.tensor([[[[3.0], [4.0]]]]))
    attention, value = dense_displacement(after, before)
    assert attention.tolist() == close([0.3 / 2])
    assert value.tolist() == close([5 / math.sqrt(5)])
    real = torch.tensor([[True, False]])
    changes: dict[str, Any] = {"self_attention": True, "key_tokens": real}
    attention, value = dense_displacement(dataclasses.replace(after, **changes), dataclasses.replace(before, **changes))
    assert attention.tolist() == close([0.3])
    assert value.tolist() == close([3])


def test_displacement_is_per_query_head() -> None:
    record = random_record(heads=4, groups=2)
    attention, value = dense_displacement(record, record)
    assert attention.tolist() == value.tolist() == [0, 0, 0, 0]
    moved = dataclasses.replace(record, value=record.value * torch.tensor([1.0, 3.0])[:, None, None])
    assert dense_displacement(moved, record)[1].tolist() == close([0, 0, 2, 2])

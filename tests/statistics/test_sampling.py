"""Statistics estimated from a sample of the rows against the same statistics of all rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnprobe.assemble import Measured
from attnprobe.catalog import STATISTICS, select
from attnprobe.extent import Extent
from attnprobe.record import AttentionRecord
from attnprobe.statistics.reduce import Partial, combine, finish, finish_error
from attnprobe.statistics.streaming import measure
from tests.statistics.compare import NAMES
from tests.statistics.strategies import batch_slice
from tests.statistics.test_streaming import LargestTensor, finished, long_record

B, H, T = 2, 2, 300
COLUMNS = ("dead_column_fraction", "column_gini", "top_column_share", "shared_dead_columns", "hidden_tokens")
UNKNOWN = (*COLUMNS, "value_grad_norm")
MAXIMA = tuple(name for name in NAMES if STATISTICS[name].reduce == "max")
LANDMARKS = ("sink_mass", "self_mass")
ROUTING = (
    *("entropy", "normalized_entropy", "effective_keys", "max_weight", "concentration", "max_logit", "logit_spread"),
    *("mean_distance", "entropy_8", *LANDMARKS, "future_mass", "padding_mass", *COLUMNS),
)
GRADIENTS = ("advantage_std", "relative_advantage_std", "advantage_alignment", "score_grad_norm")
ESTIMATED = (*(name for name in ROUTING if name not in (*COLUMNS, *MAXIMA)), *GRADIENTS)
EXACT = tuple(name for name in NAMES if name not in (*ESTIMATED, *MAXIMA, *UNKNOWN))
#: Whose rows do not differ by orders of magnitude: for the others, 64 rows are too few for a normal distribution.
LIGHT_TAILED = (
    *("entropy", "normalized_entropy", "max_weight", "entropy_8", "mean_distance"),
    *("advantage_std", "relative_advantage_std"),
)
#: What a ratio or a root of unbiased sums may be off, relative to its value, with so few rows.
BIAS = 0.01


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


RIGHT, LEFT = torch.arange(T) < torch.tensor([[T], [200]]), torch.arange(T) >= torch.tensor([[0], [100]])
TOLD = {"query_tokens": RIGHT, "key_tokens": RIGHT}
SCATTERED = normal(B, 1, T, T, seed=6) > -1
PER_HEAD = normal(B, H, T, T, seed=7) > -1
SLOPE = torch.tensor([0.01, 0.1])
DISTANCE = (torch.arange(T)[:, None] - torch.arange(T)).abs()
KEPT = normal(B, H, T, T, seed=8) > -0.8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(keys: int = T, groups: int = H, **changes: Any) -> AttentionRecord:
    """Errors of a few rows are much larger than those of the others."""
    record = AttentionRecord(
        value=normal(B, groups, keys, 4, seed=1) + 1,
        query=2 * normal(B, H, T, 4, seed=2),
        key=normal(B, groups, keys, 4, seed=3),
        error=normal(B, H, T, 4, seed=4) * normal(B, 1, T, 1, seed=5).exp(),
        scale=0.5,
        self_attention=True,
    )
    return dataclasses.replace(record, **changes)


def scores(record: AttentionRecord) -> Tensor:
    assert record.query is not None
    assert record.key is not None
    found = record.scale * record.query @ record.key.repeat_interleave(H // record.key.shape[1], 1).mT
    return found.masked_fill(~torch.ones_like(found).tril().bool(), -torch.inf) if record.causal else found


def values(partial: Partial, names: Iterable[str] = NAMES) -> dict[str, Tensor]:
    return finished(partial, tuple(names))


def error_of(name: str, partial: Partial) -> Tensor:
    error = finish_error(STATISTICS[name], partial)
    assert error is not None, name
    return error


def assert_equal(actual: Partial, expected: Partial, names: Iterable[str], tolerance: float = 1e-6) -> None:
    for name in names:
        found, wanted = (finish(STATISTICS[name], partial) for partial in (actual, expected))
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0, equal_nan=True, msg=name)


def assert_near(sample: Partial, exact: Partial, names: Iterable[str] = ESTIMATED) -> None:
    """Within five standard errors, NaN where the exact value is."""
    for name in names:
        expected, actual, error = finish(STATISTICS[name], exact), finish(STATISTICS[name], sample), torch.zeros(())
        if not expected.isnan().all():
            error = error_of(name, sample)
        close = (actual - expected).abs() <= 5 * error + 1e-5 * expected.abs()
        assert (close | (actual.isnan() & expected.isnan())).all(), (name, actual, expected, error)


@pytest.mark.parametrize(("causal", "rows"), [(False, 64), (True, 128)])
def test_estimates_are_unbiased_and_their_intervals_cover(causal: bool, rows: int) -> None:
    record, generator = example(causal=causal), seeded(0)
    # Those that no mask or token lets be anything but 0 are not estimated here.
    names = [name for name in ESTIMATED if name not in ("padding_mass", *(["future_mass"] if causal else []))]
    record, statistics = batch_slice(record, slice(0, B if causal else 1)), select(names)
    exact = values(measure(record, statistics), names)
    samples = [measure(record, statistics, rows=rows, generator=generator) for _ in range(200)]
    covered = []
    for name in names:
        found = torch.stack([finish(STATISTICS[name], sample) for sample in samples])
        errors = torch.stack([error_of(name, sample) for sample in samples])
        spread = found.std(0)
        off = (found.mean(0) - exact[name]).abs()
        assert (off <= 3 * spread / math.sqrt(len(samples)) + BIAS * exact[name].abs()).all(), (name, off, spread)
        # Errors say how much estimates scatter: to a fifth, where the scatter itself is known to a twentieth.
        assert ((errors.square().mean(0).sqrt() / spread - 1).abs() < 0.2).all(), name
        if name in LIGHT_TAILED:
            covered.append(((found - exact[name]).abs() <= 1.96 * errors).double().mean())
            assert covered[-1] > 0.88, name
    assert 0.9 <= sum(covered) / len(covered) <= 0.99


def test_rows_with_large_errors_are_not_left_to_chance() -> None:
    """One row of 300 holds nearly all of the gradient: drawn evenly, four samples in five would miss it."""
    error = torch.full((B, H, T, 4), 1e-3)
    error[:, :, 200] = 10.0
    record, statistics = example(error=error), select(["score_grad_norm", "advantage_std"])
    exact = values(measure(record, statistics), ["score_grad_norm", "advantage_std"])
    for seed in range(10):
        sample = values(measure(record, statistics, rows=64, generator=seeded(seed)), exact)
        for name, expected in exact.items():
            torch.testing.assert_close(sample[name], expected, rtol=0.4, atol=0)


def test_what_a_sample_says_of_each_statistic() -> None:
    record = example(causal=True, **TOLD)
    sample, exact = measure(record, select(NAMES), rows=64, generator=seeded(1)), measure(record, select(NAMES))
    found, expected = values(sample), values(exact)
    assert_near(sample, exact)
    assert_equal(sample, exact, EXACT)
    for name in MAXIMA:
        assert (found[name] <= expected[name] * (1 + 1e-6)).all(), name
        assert found[name].isfinite().all(), name
        assert error_of(name, sample).isnan().all(), name
    for name in UNKNOWN:
        assert found[name].isnan().all(), name
        assert expected[name].isfinite().all(), name
    for name in (*EXACT, *UNKNOWN):
        assert finish_error(STATISTICS[name], sample) is None, name
    assert all(finish_error(statistic, exact) is None for statistic in select(NAMES))


@pytest.mark.parametrize("logsumexp", [False, True])
def test_exact_routing_estimates_nothing_but_what_holds_errors(logsumexp: bool) -> None:
    record = example(causal=True)
    if logsumexp:
        record = dataclasses.replace(record, logsumexp=scores(record).logsumexp(-1))
    exact = measure(record, select(NAMES))
    sample = measure(record, select(NAMES), rows=64, exact_routing=True, generator=seeded(1))
    assert_equal(sample, exact, (*ROUTING, *EXACT))
    assert_near(sample, exact, GRADIENTS)
    assert all(finish_error(STATISTICS[name], sample) is None for name in (*ROUTING, *EXACT))
    assert finish(STATISTICS["value_grad_norm"], sample).isnan().all()
    assert error_of("advantage_max", sample).isnan().all()


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_with_the_log_sum_exp_of_the_kernel_two_weights_of_each_row_are_exact(
    causal: bool, self_attention: bool
) -> None:
    record = example(causal=causal, self_attention=self_attention, key_tokens=torch.arange(T).expand(B, T) >= 3)
    right = scores(record).logsumexp(-1)
    exact = measure(record, select(NAMES))
    known, wrong, unknown = (
        measure(dataclasses.replace(record, logsumexp=logsumexp), select(NAMES), rows=64, generator=seeded(1))
        for logsumexp in (right, right + normal(B, H, T, seed=9), None)
    )
    assert_equal(known, exact, LANDMARKS, 1e-5)
    assert all(finish_error(STATISTICS[name], known) is None for name in LANDMARKS)
    assert_near(known, exact, [name for name in ESTIMATED if name not in LANDMARKS])
    assert_equal(wrong, unknown, ESTIMATED, 0)
    assert_near(wrong, exact)


@pytest.mark.parametrize("causal", [True, False])
def test_under_a_mask_they_are_estimated_like_the_rest(causal: bool) -> None:
    record = example(causal=causal, mask=SCATTERED)
    visible = SCATTERED.expand(B, H, T, T) & (scores(record) > -torch.inf)
    record = dataclasses.replace(record, logsumexp=scores(record).masked_fill(~visible, -torch.inf).logsumexp(-1))
    assert_near(measure(record, select(NAMES), rows=64, generator=seeded(1)), measure(record, select(NAMES)))


@pytest.mark.parametrize("rows", [T, T + 1, 10**6])
def test_as_many_rows_as_there_are_is_everything(rows: int) -> None:
    record = example()
    exact, sample = measure(record, select(NAMES)), measure(record, select(NAMES), rows=rows, exact_routing=True)
    assert exact.keys() == sample.keys()
    assert all(torch.equal(exact[key], sample[key]) for key in exact)


GARBAGE = torch.where(RIGHT[:, None, :, None], example().error, 1e6)  # type: ignore[arg-type]
LOGITS = scores(example()).masked_fill(~(SCATTERED & RIGHT[:, None, None]), -torch.inf)


def bias_of_head(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - SLOPE[h] * (q_idx - kv_idx).abs()


def window_and_padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return ((q_idx - kv_idx).abs() < 80) & RIGHT[b, kv_idx]


MASKS: dict[str, dict[str, Any]] = {
    "bool": {"mask": SCATTERED},
    "bool for all": {"mask": SCATTERED[0, 0], "causal": True},
    "fully masked rows": {"mask": SCATTERED & (torch.arange(T) % 3 > 0)[:, None]},
    "padding right": {"mask": RIGHT[:, None, None], "causal": True},
    "padding left": {"mask": LEFT[:, None, None], "causal": True},
    "padding told": {"key_tokens": RIGHT, "causal": True},
    "padding with garbage": {"mask": RIGHT[:, None, None], "error": GARBAGE},
    "added padding": {"mask": torch.zeros(B, 1, 1, T).masked_fill(~RIGHT[:, None, None], -1e9)},
    "bias": {"mask": -0.02 * DISTANCE.float().masked_fill(DISTANCE > 150, torch.inf)},
    "per head": {"mask": PER_HEAD},
    "per head, added": {"mask": (-SLOPE[:, None, None] * DISTANCE)[None]},
    "per head, padding told": {"mask": PER_HEAD & RIGHT[:, None, None], **TOLD},
    "score_mod": {"score_mod": bias_of_head, "causal": True},
    "mask_mod": {"mask_mod": window_and_padding, **TOLD},
    "both": {"score_mod": bias_of_head, "mask_mod": window_and_padding, **TOLD},
    "logits": {"query": None, "key": None, "logits": LOGITS, **TOLD},
    "sink": {"sink": normal(B, H, T, seed=9) + 2, "causal": True},
    "dropout": {"kept": KEPT, "dropout": 0.2},
    "log-sum-exp used": {"lse_error": normal(B, H, T, seed=10)},
    "GQA": {"groups": 1, "causal": True},
    "cross": {"keys": 200, "self_attention": False},
    "keys from a cache": {"keys": 400},
    "unknown": {"self_attention": None},
    "forward only": {"error": None},
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_call_can_be_sampled(kind: str) -> None:
    record = example(**MASKS[kind])
    exact = measure(record, select(NAMES))
    sample = measure(record, select(NAMES), rows=64, generator=seeded(2))
    assert_near(sample, exact)
    assert_equal(sample, exact, EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_dtype_can_be_sampled(dtype: torch.dtype) -> None:
    record = example(causal=True, mask=RIGHT[:, None, None])
    tensors = {name: getattr(record, name).to(dtype) for name in ("query", "key", "value", "error")}
    record = dataclasses.replace(record, **tensors)
    exact, sample = (measure(record, select(NAMES), rows=rows, generator=seeded(2)) for rows in (None, 64))
    assert_near(sample, exact)
    assert_equal(sample, exact, EXACT)


def test_padding_of_a_mask_for_each_head_is_found_or_told() -> None:
    record = example(mask=PER_HEAD & RIGHT[:, None, None])
    exact = measure(record, select(NAMES))
    sample = measure(record, select(NAMES), rows=64, generator=seeded(2))
    found, expected = (finish(STATISTICS["error_norm"], partial) for partial in (sample, exact))
    notes = Measured.of(record, sample, Extent(rows=64)).notes
    assert torch.allclose(found, expected) or any("padding is not looked for" in note for note in notes)


def test_micro_batches_combine() -> None:
    record, generator = example(causal=True), seeded(3)
    exact = measure(record, select(NAMES))
    halves = [batch_slice(record, slice(i, i + 1)) for i in range(B)]
    both = combine(measure(half, select(NAMES), rows=64, generator=generator) for half in halves)
    assert_equal(both, exact, EXACT)
    assert_near(both, exact)
    statistics = select(LIGHT_TAILED)
    combined = [combine(measure(half, statistics, rows=64, generator=generator) for half in halves) for _ in range(60)]
    for name in LIGHT_TAILED:
        found = torch.stack([finish(STATISTICS[name], sample) for sample in combined])
        errors = torch.stack([error_of(name, sample) for sample in combined])
        assert ((found.mean(0) - finish(STATISTICS[name], exact)).abs() < 3 * found.std(0) / math.sqrt(60)).all(), name
        assert ((errors.square().mean(0).sqrt() / found.std(0) - 1).abs() < 0.35).all(), name


def test_a_short_micro_batch_beside_a_long_one() -> None:
    """Of the short one all rows are measured, which is not the whole of the step."""
    short = example(causal=True)
    cut = {name: getattr(short, name)[:, :, :40] for name in ("query", "key", "value", "error")}
    records = [dataclasses.replace(short, **cut), short]
    exact = combine(measure(record, select(NAMES)) for record in records)
    sample = combine(measure(record, select(NAMES), rows=64, generator=seeded(4)) for record in records)
    assert_near(sample, exact)
    assert_equal(sample, exact, EXACT)
    assert all(finish(STATISTICS[name], sample).isnan().all() for name in UNKNOWN)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_errors_of_which_a_sample_can_make_nothing(bad: float) -> None:
    error = normal(B, H, T, 4, seed=4)
    error[0, 0] = bad
    if bad == 0:
        error[:] = 0
    sample = measure(example(error=error), select(NAMES), rows=64, generator=seeded(5))
    clean = measure(example(error=normal(B, H, T, 4, seed=4)), select(NAMES))
    assert_near(sample, clean, [name for name in ESTIMATED if name not in GRADIENTS])
    found = values(sample)
    if bad == 0:
        assert found["score_grad_norm"].tolist() == found["advantage_std"].tolist() == [0, 0]
    else:
        assert found["advantage_std"].isfinite().tolist() == [False, True]
        assert float(sample["nonfinite.error"][0]) == T * 4


def test_the_same_seed_gives_the_same_numbers_and_torch_s_own_state_is_left_alone() -> None:
    record, state = example(), torch.get_rng_state()
    one, same, other = (measure(record, select(NAMES), rows=64, generator=seeded(s)) for s in (1, 1, 2))
    default = [measure(record, select(NAMES), rows=64) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key].nan_to_num(), same[key].nan_to_num()) for key in one)
    assert not torch.equal(one["entropy.sum"], other["entropy.sum"])
    assert torch.equal(default[0]["entropy.sum"], default[1]["entropy.sum"])


@pytest.mark.parametrize("exact_routing", [False, True])
def test_no_tensor_of_queries_times_keys_is_ever_held(exact_routing: bool) -> None:
    length = 2048
    record = long_record(length, length, 2, causal=True, self_attention=True)
    record = dataclasses.replace(record, output=record.value)
    with LargestTensor() as largest:
        measure(record, select("core"), rows=64, exact_routing=exact_routing)
    assert 0 < largest.elements <= length * length / 16


def test_the_cost_of_a_sample_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with queries or errors: 64 of them with each key instead of all."""
    monkeypatch.setenv("ATTNPROBE_COMPILED", "0")  # C does without torch's products

    class Multiplications(LargestTensor):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
                self.elements += result.numel()
            return result

    def products(length: int, rows: int | None) -> int:
        record = long_record(length, length, 1, self_attention=True)
        with Multiplications() as counted:
            measure(dataclasses.replace(record, output=record.value), select("core"), rows=rows)
        return counted.elements

    assert products(2048, 64) < 2.1 * products(1024, 64)
    assert products(2048, 64) < products(2048, None) / 20

"""A quick part of the matrix, and that its cells would not hold if something were wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprobe import AttentionProbe, AttentionRecord
from attnprobe.collect import Collector
from attnprobe.errors import AttnProbeWarning
from tests.matrix import identities, impossible
from tests.matrix.cells import QUICK, QUICK_FLEX, all_variants, chosen, quick_cells
from tests.matrix.check import Outcome, check, unlike
from tests.matrix.condition import Condition
from tests.matrix.conditions import CONDITIONS
from tests.matrix.coverage import CANNOT, FAILS, HOLDS, markdown
from tests.matrix.torch_models import VARIANTS
from tests.matrix.variant import Variant
from tests.matrix.work import outcome_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that build or copy a model

SDPA = next(variant for variant in VARIANTS if variant.name == "sdpa")
PLAIN = CONDITIONS[0]


@pytest.mark.parametrize(
    ("variant", "condition"), quick_cells(), ids=lambda part: part.name if isinstance(part, Variant | Condition) else ""
)
def test_cell(variant: Variant, condition: Condition) -> None:
    names = variant.name, condition.name
    assert impossible.mistakes(*names, outcome_of(names)) == []


def test_names_are_unique() -> None:
    for names in ([v.name for v in all_variants()], [c.name for c in CONDITIONS]):
        assert len({*names}) == len(names)


def test_samples_hold_one_of_each_kind() -> None:
    variants = all_variants()
    kinds = {(variant.library, variant.kind) for variant in variants}
    names = chosen(variants, replace(PLAIN, tried_on=len(kinds)))
    assert {(v.library, v.kind) for v in variants if v.name in names} == kinds
    names = {*QUICK, QUICK_FLEX}
    assert {variant.kind for variant in VARIANTS if variant.name in names} == {v.kind for v in VARIANTS}


# What the checker notices


def test_records_of_a_compiled_step_are_compared_with_those_of_the_eager_step() -> None:
    query, key, value, error = (torch.randn(2, 3, 5, 4) for _ in range(4))
    eager = [AttentionRecord(value, query, key, error=error), AttentionRecord(key, value, query, error=value)]
    assert unlike([replace(eager[1], scale=1.00001), eager[0]], eager) == []
    assert len(unlike([replace(eager[0], error=1.1 * error), eager[1]], eager)) == 1
    assert len(unlike([replace(eager[0], causal=True), eager[1]], eager)) == 1
    assert unlike(eager[:1], eager) == ["1 records instead of 2"]


class DrawsRandomNumbers(AttentionProbe):
    def step(self, loss: Any = None) -> Any:
        torch.rand(())
        return super().step(loss)


class TouchesAParameter(AttentionProbe):
    def begin(self, step: int | None = None) -> None:
        super().begin(step)
        parameter = next(self.model.parameters())
        if self._count == 1:
            with torch.no_grad():
                parameter.mul_(1 + 1e-6)


class LeavesAHook(AttentionProbe):
    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        model.register_forward_hook(lambda module, inputs, output: None)


class LeavesAnAttribute(AttentionProbe):
    def close(self) -> None:
        super().close()
        self.model.probed = True


class Warns(AttentionProbe):
    def step(self, loss: Any = None) -> Any:
        warnings.warn("attnprobe: something", AttnProbeWarning, stacklevel=2)
        return super().step(loss)


class Raises(AttentionProbe):
    def step(self, loss: Any = None) -> Any:
        raise ValueError("broken")


def always_on(model: nn.Module, **options: Any) -> AttentionProbe:
    return AttentionProbe(model, **{**options, "every_n_steps": 1})


@pytest.mark.parametrize(
    ("make_probe", "problem"),
    [
        (DrawsRandomNumbers, "torch's random state differs"),
        (TouchesAParameter, "in step 1 differs"),
        (LeavesAHook, "not as before the probe"),
        (LeavesAnAttribute, "not as before the probe"),
        (Warns, "warning: attnprobe: something"),
        (Raises, "with the probe: ValueError: broken"),
        (always_on, "active in a forward pass that is not probed"),
    ],
)
def test_probe_that_harms(make_probe: Callable[..., AttentionProbe], problem: str) -> None:
    outcome = check(SDPA, PLAIN, make_probe)
    assert any(problem in text for text in outcome.problems), outcome.problems
    assert not outcome.passed


@pytest.mark.parametrize(
    "rows", [{**SDPA.layers, "body.blocks.2.attn": 2}, {"body.blocks.0.attn": 2}, dict.fromkeys(SDPA.layers, 3)]
)
def test_other_rows_than_expected(rows: dict[str, int]) -> None:
    outcome = check(replace(SDPA, layers=rows), PLAIN)
    assert not outcome.passed
    assert not outcome.harm
    assert outcome.expected == len(rows)


def test_error_that_is_not_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = Collector._receive

    def rounded(self: Collector, module: str, record: AttentionRecord) -> Any:
        assert record.error is not None
        return receive(self, module, replace(record, error=record.error.nextafter(torch.ones(()))))

    monkeypatch.setattr(Collector, "_receive", rounded)
    outcome = check(SDPA, PLAIN)
    assert 0 < outcome.difference < 1e-6
    assert [text for text in outcome.problems if "differs from autograd's" in text]


@pytest.mark.parametrize("part", ["value", "key", "query", "output"])
def test_record_that_breaks_an_identity(part: str) -> None:
    def changed(cell: Any, history: Any, records: list[AttentionRecord], spy: Any) -> list[str]:
        records = [replace(record, **{part: getattr(record, part) * (1 + 1e-9)}) for record in records]
        return identities.first_order(cell, history, records, spy)

    condition = next(condition for condition in CONDITIONS if condition.name == "float64")
    assert check(SDPA, condition).passed
    assert not check(SDPA, replace(condition, verify=changed)).passed


def test_model_that_fails_by_itself() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("no such thing")

    outcome = check(replace(SDPA, loss=loss), PLAIN)
    assert outcome.fails == "ValueError: no such thing"
    assert impossible.mistakes("sdpa", "plain", outcome)


def test_list_of_the_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impossible, "IMPOSSIBLE", {("sd*", "plain"): "we do not like it"})
    assert "take it off" in impossible.mistakes("sdpa", "plain", Outcome())[0]
    assert impossible.mistakes("sdpa", "plain", Outcome(missed=["a row"])) == []
    assert impossible.mistakes("sdpa", "plain", Outcome(harm=["a gradient"])) == ["a gradient"]
    assert impossible.mistakes("sdpa", "autocast", Outcome(missed=["a row"])) == ["a row"]


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impossible, "IMPOSSIBLE", {("sdpa", "autocast"): "we do not like it"})
    results = {
        ("sdpa", "plain"): Outcome(2, 2, calls=2),
        ("sdpa", "autocast"): Outcome(0, 2, fails="ValueError: a | b"),
        ("sdpa", "bf16"): Outcome(1, 2, missed=["a row"]),
    }
    page = markdown([SDPA], CONDITIONS, results)
    assert f"| sdpa | sdpa | 2/2 {HOLDS} | 0/2 {CANNOT} |" in page
    assert f"| sdpa | 1/2 {FAILS} |" in page
    assert "2 calls, difference 0" in page
    assert "| `sdpa` | `autocast` | 1 | we do not like it | `ValueError: a / b` |" in page

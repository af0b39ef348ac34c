"""The scalars for displays without a tab for heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sample_reports import alarm, every_kind, full_report

from attnprobe.catalog import STATISTICS, select
from attnprobe.report import StepReport
from attnprobe.writers.aggregates import aggregates


def test_about_fifty_scalars_of_the_core_set() -> None:
    core = {entry.name for entry in select("core")}
    everything = full_report(0)
    report = full_report(0, statistics={name: values for name, values in everything.statistics.items() if name in core})
    assert 45 <= len(aggregates(report)) <= 55
    assert {tag.split("/")[1] for tag in aggregates(report)} <= core | {"alarms"}


def test_values_are_those_of_the_finite_heads() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -math.inf]], dtype=torch.float64)
    report = StepReport(
        0, ("a", "b"), (3, 3), {"entropy": values, "max_logit": values * math.nan}, {"entropy_8": values[:, 0]}
    )
    assert aggregates(report) == {
        "attention/entropy/min": 1,
        "attention/entropy/mean": 3,
        "attention/entropy/max": 6,
        "attention/entropy_8/min": 1,
        "attention/alarms": 0,
    }


def test_the_worse_end_of_a_layer_statistic() -> None:
    values = torch.tensor([0.1, math.nan, 0.7], dtype=torch.float64)
    found = aggregates(StepReport(0, layer={"shared_dead_columns": values, "entropy_8": values}))
    assert found == {
        "attention/shared_dead_columns/max": 0.7,
        "attention/entropy_8/min": 0.1,
        "attention/alarms": 0,
    }


@pytest.mark.parametrize("name", ["my_statistic", "head_similarity", "mean_distance"])
def test_what_was_asked_for_by_name_is_there(name: str) -> None:
    found = aggregates(StepReport(0, ("a",), (1,), {name: torch.ones(1, 1)}))
    assert set(found) == {f"attention/{name}/{kind}" for kind in ("min", "mean", "max")} | {"attention/alarms"}


def test_alarms_that_stand_are_counted() -> None:
    assert aggregates(full_report(3, alarms=(alarm(3), alarm(3, new=False))))["attention/alarms"] == 2


def test_an_invalid_report_has_none_and_all_are_finite_floats() -> None:
    for report in every_kind():
        found = aggregates(report)
        assert bool(found) == report.valid
        assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_against_numpy() -> None:
    report = full_report(5)
    found = aggregates(report)
    for name in ("entropy", "score_grad_norm", "head_importance"):
        assert STATISTICS[name].core
        values = report[name].numpy()
        assert found[f"attention/{name}/mean"] == pytest.approx(np.nanmean(values))
        assert found[f"attention/{name}/max"] == np.nanmax(values)

"""Answers about runs against the reports that were written, number by number."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attnprobe.catalog import STATISTICS
from attnprobe.errors import UnknownNameError
from attnprobe.logs.logged import LoggedRun
from attnprobe.report import StepReport
from attnprobe.view import answers
from attnprobe.view.limits import Limits
from attnprobe.writers.strict_json import dumps
from tests.tab.runs import HOSTILE, alarm, eventful, head_map, kept, logged, report, table

NAMES = ["entropy", "max_logit", "shared_dead_columns", "my/own", "own layer", "residual", "nonfinite/error"]
LAYERS = ["h.0", "h.1", "h.2", HOSTILE]


@pytest.fixture(params=["reports", "events"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> LoggedRun:
    return kept(eventful()) if request.param == "reports" else logged(tmp_path, *eventful())


def close(found: object, expected: object) -> None:
    np.testing.assert_allclose(np.array(found, np.float64), expected, rtol=1e-7)


def test_the_statistics_stand_in_the_order_of_the_catalogue_and_own_ones_behind(run: LoggedRun) -> None:
    order = [name for name in STATISTICS if name in NAMES]
    names = answers.names_of(run)
    assert list(names[:3]) == order
    assert set(names[3:5]) == {"my/own", "own layer"}
    assert set(names[5:]) == {"residual", "nonfinite/error"}


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_what_was_reported(name: str, run: LoggedRun) -> None:
    expected = table(eventful(), name)
    for start, stop in [(0, 8), (2, 5), (7, 99), (-5, 10**30), (10**30, 10**31), (5, 2), (-9, -3)]:
        found = answers.frames(run, name, start, stop)
        close(found, expected[max(0, start) : max(0, stop)])
        assert found.shape[1:] == (4, 1 if name in ("shared_dead_columns", "own layer") else 5)


def test_an_unknown_statistic_is_named(run: LoggedRun) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown statistic 'entropi'\. Did you mean 'entropy'"):
        answers.frames(run, "entropi", 0, 1)
    with pytest.raises(UnknownNameError, match="Known: "):
        Limits("map/h.0/head1").of(run)


def ends(values: np.ndarray) -> dict[str, float]:
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    return {
        "low": values.min() if values.size else math.nan,
        "high": values.max() if values.size else math.nan,
        "positive": positive.min() if positive.size else math.nan,
    }


@pytest.mark.parametrize("name", NAMES)
def test_limits_are_those_of_the_finite_numbers(name: str, run: LoggedRun) -> None:
    expected = ends(table(eventful(), name))
    assert Limits(name).of(run) == pytest.approx(expected, rel=1e-7, nan_ok=True)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(math.nan, (math.nan,) * 3), (math.inf, (math.nan,) * 3), (-2.0, (-2.0, -2.0, math.nan)), (0.0, (0, 0, math.nan))],
)
def test_limits_where_there_are_few_numbers(number: float, expected: tuple[float, ...]) -> None:
    values = torch.full((1, 2), number, dtype=torch.float64)
    found = Limits("entropy").of(kept([report(0, heads=(2,), statistics={"entropy": values})]))
    assert [*found.values()] == pytest.approx([*expected], nan_ok=True)


def test_limits_of_a_long_run_that_grows() -> None:
    reports = [report(step) for step in range(2 * answers.BLOCK + 3)]
    run = kept(reports)
    probes = run.source.probes
    limits = Limits("max_logit")
    for number in (1, 5, answers.BLOCK, answers.BLOCK + 1, len(reports)):
        whole = kept(reports[:number]).source
        probes[:] = whole.probes
        run.source = whole
        whole.probes = probes  # the same list, as an append leaves it
        assert limits.of(run) == pytest.approx(ends(table(reports[:number], "max_logit")))
    # Another list: the probes before may be others as well.
    assert limits.of(kept(reports[3:9])) == pytest.approx(ends(table(reports[3:9], "max_logit")))


@pytest.mark.parametrize("layer", [*LAYERS, "no such layer"])
def test_curves_are_what_was_reported(layer: str, run: LoggedRun) -> None:
    for head in (0, 1, 4, 5, -1, 10**30):
        found = answers.curves(run, layer, head, 100)
        for name in ("entropy", "max_logit", "my/own", "residual", "nonfinite/error"):
            there = layer in LAYERS and 0 <= head < 5
            expected = table(eventful(), name)[:, LAYERS.index(layer), head] if there else np.array([math.nan])
            if np.isnan(expected).all():
                assert name not in found
            else:
                assert found[name]["steps"].tolist() == [each.step for each in eventful()]
                close(found[name]["values"], expected)
        assert not {"shared_dead_columns", "own layer"} & set(found)


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    reports = [report(step, heads=(1,)) for step in range(900)]
    reports[333].statistics["entropy"][0, 0] = 1e6
    found = answers.curves(kept(reports), "h.0", 0, 40)["entropy"]
    assert len(found["steps"]) <= 40
    assert found["values"][found["steps"].tolist().index(333)] == 1e6
    values = table(reports, "entropy")[:, 0, 0]
    np.testing.assert_array_equal(found["values"], values[found["steps"]])


def panels(seed: int, **options: object) -> np.ndarray:
    picture = head_map(seed, **options)
    return np.stack([picture.attention, picture.compatibility, picture.advantage])


@pytest.mark.parametrize(
    ("step", "chosen", "seed", "columns"),
    [(-math.inf, 0, 0, 4), (0, 0, 0, 4), (7.9, 0, 0, 4), (8, 8, 2, 6), (12, 12, 3, 4), (math.inf, 12, 3, 4)],
)
def test_pictures_are_the_last_up_to_a_step(step: float, chosen: int, seed: int, columns: int, run: LoggedRun) -> None:
    found, values = answers.pictures(run, "h.0", 1, step)
    assert found == chosen
    close(values, panels(seed, columns=columns))


def test_pictures_of_a_layer_with_an_odd_name(run: LoggedRun) -> None:
    assert run.maps == (("h.0", 0), ("h.0", 1), (HOSTILE, 0))
    found, values = answers.pictures(run, HOSTILE, 0, 99)
    assert found == 15
    close(values, panels(4))


def test_heads_without_pictures(run: LoggedRun) -> None:
    for layer, head in [("h.1", 0), ("h.0", 2), ("nowhere", 0), ("h.0", -1)]:
        assert answers.pictures(run, layer, head, 5) is None
        assert answers.usage(run, layer, head) is None
    assert answers.pictures(run, "h.0", 0, 5) is not None
    assert answers.usage(run, "h.0", 0) is None, "none was recorded"


def test_usage_over_steps_is_stretched_to_the_widest(run: LoggedRun) -> None:
    steps, values = answers.usage(run, "h.0", 1)
    assert steps == [0, 8, 12]
    narrow, wide, last = (head_map(seed, columns=columns).usage for seed, columns in ((0, 4), (2, 6), (3, 4)))
    close(values, np.stack([narrow[[0, 0, 1, 2, 2, 3]], wide, last[[0, 0, 1, 2, 2, 3]]]))


def test_usage_has_no_more_rows_than_a_screen() -> None:
    reports = [report(step, heads=(2,), maps=(head_map(step),)) for step in range(answers.ROWS + 50)]
    steps, values = answers.usage(kept(reports), "h.0", 1)
    assert len(steps) == answers.ROWS
    assert (steps[0], steps[-1]) == (0, answers.ROWS + 49)
    close(values, np.stack([head_map(step).usage for step in steps]))


def test_overview(run: LoggedRun) -> None:
    found = json.loads(dumps(answers.overview([run])))
    assert found["schema"] == answers.SCHEMA
    assert list(found["statistics"]) == list(answers.names_of(run))
    entropy = found["statistics"]["entropy"]
    assert (entropy["level"], entropy["meaning"]) == ("head", STATISTICS["entropy"].meaning)
    assert found["statistics"]["shared_dead_columns"]["level"] == "layer"
    own = found["statistics"]["own layer"]
    assert (own["level"], own["meaning"], own["better"]) == ("layer", "A statistic of your own.", "")
    assert found["statistics"]["nonfinite/error"]["meaning"].startswith("How many elements of the error")
    assert found["statistics"]["residual"]["better"] == "low"
    (about,) = found["runs"]
    assert about["steps"] == [each.step for each in eventful()]
    assert about["layers"] == LAYERS
    assert about["heads"] == [2, 3, 5, 1]
    assert about["loss"][:3] == pytest.approx([each.loss for each in eventful()[:3]], rel=1e-6)
    assert about["loss"][3] is None
    assert about["loss"][7] == "inf"
    assert about["invalid"] == [[6, "no backward ran"]]
    assert (about["warnings"], about["notes"]) == (["careful"], ["so it is"])
    assert about["maps"] == [["h.0", 0], ["h.0", 1], [HOSTILE, 0]]
    first, second = about["alarms"]
    assert (first["name"], first["raised"], first["last"], first["standing"]) == ("logit_explosion", 2, 2, False)
    assert (second["name"], second["layer"], second["heads"], second["value"]) == ("other", "h.0", [0], 9.5)
    assert (second["reads"], second["advice"], second["evidence"]) == (["max_logit"], "Lower it.", [[12, 9.5]])
    assert second["turns"][0] == [second["raised"], [0]]


def test_of_many_alarms_those_that_stood_last_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST", 3)
    standing = alarm(0, "old")
    reports = [
        report(step, alarms=(dataclasses.replace(standing, step=step), alarm(step, f"brief {step}")))
        for step in range(9)
    ]
    (about,) = answers.overview([kept(reports)])["runs"]
    assert [each["name"] for each in about["alarms"]] == ["old", "brief 7", "brief 8"]


def test_a_statistic_that_is_another_thing_in_another_run_is_left_out_there() -> None:
    ours, others = report(0, statistics={"x": torch.ones(2, 3)}), report(0, statistics={}, layer={"x": torch.ones(2)})
    found = answers.overview([kept([ours]), kept([others])])
    assert found["statistics"]["x"]["level"] == "head"
    assert ["x" in about["names"] for about in found["runs"]] == [True, False]


def test_a_run_without_a_number() -> None:
    for reports in ([StepReport(1, invalid="why")], [StepReport(0)], []):
        run = kept(reports)
        (about,) = json.loads(dumps(answers.overview([run])))["runs"]
        assert about["steps"] == [each.step for each in reports]
        assert (about["layers"], about["names"], about["maps"]) == ([], [], [])
        assert answers.curves(run, "h.0", 0, 10) == {}

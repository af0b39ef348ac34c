"""A logged run as arrays: the same from every format, and the same as its reports."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import attnprobe as ap
from attnprobe.alarms import DEFAULT_ALARMS, LogitExplosion
from attnprobe.errors import AttnProbeWarning, LogError, UnknownNameError
from attnprobe.logs import LoggedRun, load, read_logs
from attnprobe.logs.episodes import Episode
from attnprobe.logs.reports import ReportSource
from attnprobe.logs.source import picture_name
from attnprobe.report import StepReport
from attnprobe.writers import JSONLWriter, TensorBoardWriter, Writer
from attnprobe.writers.strict_json import dumps
from tests.logs.records import NAME, array, began, event, probe, write
from tests.probe.models import batches, loss_of, net

#: Relative: float32.
EVENTS = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One training in all three forms: layers that differ in their heads, alarms, pictures, and a NaN at the end."""
    directory = tmp_path_factory.mktemp("runs")
    explosion = LogitExplosion(threshold=0.0, patience=1)
    alarms = [explosion, *(rule for rule in DEFAULT_ALARMS if rule.name != explosion.name)]
    model, memory = net(heads=(2, 4)), ap.MemoryWriter()
    writers: list[Writer] = [memory, JSONLWriter(directory / "lines"), TensorBoardWriter(directory / "events")]
    with ap.AttentionProbe(
        model, every_n_steps=1, alarms=alarms, action="record", writers=writers, statistics="all", maps="layers.1:2"
    ) as attention:
        for step, x in enumerate(batches(4)):
            if step == 3:
                x[0, 0, 0] = math.nan
            loss = loss_of(model, x)
            loss.backward()
            attention.step(loss)
    return {
        "reports": memory.reports,
        "memory": LoggedRun("", ReportSource(memory.reports)),
        "lines": load(directory / "lines"),
        "events": load(directory / "events"),
    }


FORMATS = pytest.mark.parametrize("kind", ["memory", "lines", "events"])


def padded(reports: list[StepReport], name: str) -> np.ndarray[Any, Any]:
    each = [{**report.statistics, **report.layer, "residual": report.residual}[name] for report in reports]
    return torch.stack(each).double().numpy()


@FORMATS
def test_numbers_are_those_of_the_reports(runs: dict[str, Any], kind: str) -> None:
    run, reports = runs[kind], runs["reports"]
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert run.valid.all()
    assert (run.layers, run.heads) == (reports[0].layers, (2, 4))
    np.testing.assert_allclose(run.loss, [report.loss for report in reports], rtol=EVENTS)
    assert set(run.statistics) == set(reports[0].statistics)
    assert set(run.layer_statistics) == set(reports[0].layer)
    assert len(run.layer_statistics) > 1
    for name in (*run.statistics, *run.layer_statistics, "residual"):
        assert run[name].dtype == np.float64
        np.testing.assert_allclose(run[name], padded(reports, name), rtol=EVENTS, err_msg=name)
    counts = reports[3].nonfinite["query"].numpy()
    np.testing.assert_array_equal(run["nonfinite/query"][3], counts)
    assert repr(run).endswith("4 probes, 2 layers, 6 heads)")


@FORMATS
def test_curves_and_parts_are_cut_out_of_the_whole(runs: dict[str, Any], kind: str) -> None:
    run = runs[kind]
    for name in run.statistics:
        whole = run[name]
        np.testing.assert_array_equal(run.values(name, range(1, 4, 2)), whole[1:4:2])
        for row, layer in enumerate(run.layers):
            for head in range(run.heads[row]):
                np.testing.assert_array_equal(run.curve(name, layer, head), whole[:, row, head])
    for layer, head in (("layers.0", 2), ("layers.0", 99), ("layers.0", -1), ("nowhere", 0)):
        assert np.isnan(run.curve("entropy", layer, head)).all()


@FORMATS
def test_unknown_names_are_named(runs: dict[str, Any], kind: str) -> None:
    run = runs[kind]
    assert "entropy" in run
    for name in ("entropi", picture_name("usage", "layers.1", 2), picture_name("map", "layers.1", 2)):
        assert name not in run
        with pytest.raises(UnknownNameError, match=f"unknown statistic '{name}'"):
            run[name]
    for name in ("entropi", run.layer_statistics[0]):
        with pytest.raises(UnknownNameError, match="unknown statistic"):
            run.curve(name, "layers.0", 0)


def plain(episode: Episode) -> Any:
    alarms = (episode.first, episode.last, episode.peak)
    return json.loads(
        dumps([[each.to_dict() for each in alarms], sorted(episode.heads), [*episode.turns], episode.standing])
    )


def test_alarms_are_the_same_episodes_from_every_format(runs: dict[str, Any]) -> None:
    memory, lines, events = ([plain(each) for each in runs[kind].alarms] for kind in ("memory", "lines", "events"))
    assert memory == lines == events
    assert {each.first.name for each in runs["events"].alarms} >= {"logit_explosion", "nonfinite"}


@pytest.mark.parametrize("kind", ["memory", "events"])
def test_pictures_come_back_exactly(runs: dict[str, Any], kind: str) -> None:
    run, reports = runs[kind], runs["reports"]
    assert run.maps == (("layers.1", 2),)
    panels, usage = (picture_name(each, "layers.1", 2) for each in ("map", "usage"))
    assert run.source.holds(panels) == [index for index, report in enumerate(reports) if report.maps]
    for index in run.source.holds(panels):
        (picture,) = reports[index].maps
        (found,), (columns,) = (run.source.arrays(name, [index]) for name in (panels, usage))
        np.testing.assert_array_equal(found, torch.stack(picture.panels()).float())
        np.testing.assert_array_equal(columns, picture.usage.float())
    assert runs["lines"].maps == ()


@FORMATS
def test_a_table_is_the_reports_tables_behind_each_other(
    runs: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reports = runs[kind], runs["reports"]
    expected = pandas.concat([report.to_frame() for report in reports], ignore_index=True)
    found = run.to_frame()
    assert set(found.columns) - set(expected.columns) == set(run.layer_statistics)
    pandas.testing.assert_frame_equal(found[expected.columns], expected, rtol=EVENTS, atol=0)
    for name in run.layer_statistics:
        whole = padded(reports, name)
        rows = [whole[step, run.layers.index(layer)] for step, layer in zip(found.step, found.layer, strict=True)]
        np.testing.assert_allclose(found[name], rows, rtol=EVENTS)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        rows = run.to_frame()
    assert [list(row) for row in rows] == [list(found.columns)] * len(found)
    pandas.testing.assert_frame_equal(pandas.DataFrame(rows), found)
    assert type(rows[0]["step"]) is int


def test_layers_that_come_later_and_probes_that_measured_nothing(tmp_path: Path) -> None:
    two, three = (torch.tensor([[1.0, math.nan], [2, 3]]), torch.tensor([[4.0, math.nan], [5, math.nan], [6, 7]]))
    reports = [
        StepReport(0, ("a", "b"), (1, 2), {"entropy": two}, {"rank": two[:, 0]}),
        StepReport(1, invalid="no backward"),
        StepReport(2, ("c", "a", "b"), (1, 1, 2), {"entropy": three}, {"rank": three[:, 0]}),
    ]
    for writer in (JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events")):
        for report in reports:
            writer.write(report)
        writer.close()
    nothing = math.nan
    for run in read_logs(tmp_path).values():
        assert (run.layers, run.heads) == (("a", "b", "c"), (1, 2, 1))
        assert (run.valid.tolist(), run.invalid) == ([True, False, True], {1: "no backward"})
        np.testing.assert_array_equal(
            run["entropy"],
            [[[1, nothing], [2, 3], [nothing] * 2], [[nothing] * 2] * 3, [[5, nothing], [6, 7], [4, nothing]]],
        )
        np.testing.assert_array_equal(run["rank"], [[1, 2, nothing], [nothing] * 3, [5, 6, 4]])
        np.testing.assert_array_equal(run.curve("entropy", "b", 1), [3, nothing, 7])
        table = run.to_frame()
        assert list(zip(table.step, table.layer, table["head"], table.entropy, strict=True)) == [
            *((0, "a", 0, 1), (0, "b", 0, 2), (0, "b", 1, 3)),
            *((2, "a", 0, 5), (2, "b", 0, 6), (2, "b", 1, 7), (2, "c", 0, 4)),
        ]


def test_a_run_without_a_probe(tmp_path: Path) -> None:
    JSONLWriter(tmp_path)
    run = load(tmp_path)
    assert (len(run), run.layers, run.statistics, run.alarms, run.maps) == (0, (), (), (), ())
    assert run.steps.shape == run.loss.shape == (0,)
    assert list(run.rows()) == []
    assert len(run.to_frame()) == 0
    with pytest.raises(UnknownNameError, match="unknown statistic 'entropy'"):
        run["entropy"]


def test_one_run_is_loaded_and_of_several_each_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        JSONLWriter(tmp_path / name).write(StepReport(1))
        assert load(tmp_path / name).name == "attention.jsonl"
    assert load(tmp_path / "a" / "attention.jsonl").steps.tolist() == [1]
    with pytest.raises(LogError, match=r"2 runs are in .*: a/attention\.jsonl, b/attention\.jsonl; pass"):
        load(tmp_path)
    with pytest.raises(LogError, match="does not exist"):
        load(tmp_path / "nowhere")
    assert set(read_logs(tmp_path)) == {"a/attention.jsonl", "b/attention.jsonl"}


def test_event_files_are_read_for_pictures_only_where_lines_hold_the_run(tmp_path: Path) -> None:
    for writer in (JSONLWriter(tmp_path), TensorBoardWriter(tmp_path)):
        writer.write(StepReport(1))
        writer.close()
    assert set(read_logs(tmp_path)) == {"attention.jsonl"}
    assert set(read_logs(tmp_path, pictures=True)) == {"."}
    JSONLWriter(tmp_path).write(StepReport(2))
    assert set(read_logs(tmp_path, pictures=True)) == {".", "attention.jsonl"}


def test_damage_is_warned_of_and_a_wrong_probe_is_refused(tmp_path: Path) -> None:
    good = [began(), probe(1, layout=True)]
    path = write(tmp_path, *good, probe(2)[:-1] + b"\xff", probe(3))
    with pytest.warns(AttnProbeWarning, match=f"{NAME} is damaged from byte {sum(map(len, good))} on"):
        assert load(tmp_path).steps.tolist() == [1]
    write(tmp_path, *good, event(2, array("x", [1.0])), probe(2)[:20])
    assert load(tmp_path).steps.tolist() == [1]
    path.unlink()
    write(tmp_path, began(), probe(1))  # arrays, and no layout
    with pytest.raises(LogError, match=r"step 1: ValueError: entropy has shape \[1, 2\], with \[\] heads"):
        load(tmp_path)


def test_a_run_that_is_gone_since_it_was_loaded_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, began(), probe(1, layout=True))
    run = load(tmp_path)
    write(tmp_path, began(9.0), probe(7, layout=True), probe(8))
    with pytest.raises(OSError, match="is not the file that it was"):
        run["entropy"]
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        run.curve("entropy", "a", 0)

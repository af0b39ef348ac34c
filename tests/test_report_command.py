"""``attnprobe report`` with all its options, and the comparison of two runs behind it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import attnprobe as ap
from attnprobe.alarms import LogitExplosion, SinkFormation
from attnprobe.cli import main
from attnprobe.logs import LoggedRun
from attnprobe.report import StepReport
from attnprobe.run_summary import compare, comparison_document, comparison_text, report_document
from attnprobe.run_summary.comparison import Place, differences
from attnprobe.run_summary.spread import spread
from attnprobe.writers import JSONLWriter, TensorBoardWriter, Writer
from attnprobe.writers.strict_json import dumps
from tests.probe.models import net, run
from tests.reproducible import reproducible
from tests.test_run_summary import INF, NAN, SMALL, alarm, log, measured, probe, table

Capture = pytest.CaptureFixture[str]


def strict(text: str) -> Any:
    """What a JSON document holds; bare NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def train(
    *writers: Writer, seed: int = 0, threshold: float = 0.0, steps: int = 4, heads: tuple[int, ...] = (2, 4)
) -> None:
    model = net(seed=seed, heads=heads)
    rules = (LogitExplosion(threshold=threshold, patience=2), SinkFormation(threshold=0.0, patience=1))
    with ap.AttentionProbe(model, every_n_steps=1, alarms=rules, action="record", writers=writers) as watched:
        run(watched, model, steps)


def said(capsys: Capture, *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["report", *map(str, arguments)]) == 0
    out, error = capsys.readouterr()
    assert not error
    return out.removesuffix("\n")


def test_a_training_through_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    train(JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events"))
    lines, events = (said(capsys, tmp_path / name) for name in ("lines", "events"))
    assert lines.split("\n")[1:] == events.split("\n")[1:]
    assert "4 probes, step 0 to 3; loss" in lines
    assert len(table(lines, "layer +head +alarms")) == 6
    assert table(lines, "layer +head +alarms")[0][2].startswith("logit_explosion")
    assert said(capsys, "--heads", "2", tmp_path / "lines").count("and 4 more; --heads 0 shows all") == 1
    assert said(capsys, tmp_path).count("6 heads, worst first") == 2

    (from_lines,) = strict(said(capsys, "--json", tmp_path / "lines"))["logs"].values()
    (from_events,) = strict(said(capsys, tmp_path / "events", "--json"))["logs"].values()
    assert_close(from_lines, from_events)
    assert from_lines["heads"] == [2, 4]
    assert [alarm["standing"] for alarm in from_lines["alarms"]][:2] == [True, True]
    recorded = [json.loads(line) for line in (tmp_path / "lines" / "attention.jsonl").read_text().split("\n")[:-1]]
    for head in from_lines["per_head"]:
        row = from_lines["layers"].index(head["layer"])
        for name, numbers in head["statistics"].items():
            curve = [each["statistics"][name][row][head["head"]] for each in recorded]
            known = [value for value in curve if value is not None] or [None]
            assert numbers == dict(
                zip(("first", "last", "min", "max"), (known[0], known[-1], min(known), max(known)), strict=True)
            )


def assert_close(a: Any, b: Any) -> None:
    """The same but for the last digits of float32."""
    if isinstance(a, Mapping):
        assert list(a) == list(b)
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_close(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4, abs=2e-3 if abs(a) > 1e-2 else 1e-9)
    else:
        assert a == b


def test_two_trainings_compared_through_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train(JSONLWriter(a))
    train(TensorBoardWriter(b), seed=1, threshold=1e9, steps=6, heads=(2, 4, 2))
    text = said(capsys, "--compare", a, b)
    assert text.startswith(f"A: {a} (attention.jsonl)\nB: {b} (.)\n")
    assert "1 layer only in B: layers.2" in text
    assert re.search(r"\n  last step +3 +5\n", text)
    assert re.search(r"\n    logit_explosion +layers\.0 +only A +heads 0-1, stands +-\n", text)
    assert "at step 3, the last that both probed" in text
    assert len(table(text, "layer +head +statistic")) == len(table(text, "layer +head +normalized_entropy")) == 6
    document = strict(said(capsys, "--compare", a, b, "--json", "--heads", "1"))
    assert document["compared_at"] == {"a": 3, "b": 3, "same_step": True}
    assert document["a"]["directory"] == str(a)
    assert len(document["differences"]) == 6
    shown = re.search(r"\n  median sink_mass +(\S+) +(\S+)\n", text).groups()
    assert shown == tuple(f"{document['medians']['sink_mass'][side]:.4g}" for side in "ab")
    same = said(capsys, "--compare", a, a)
    assert "no head that both have differs (at step 3, the last that both probed)" in same


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "one of the arguments RUN_DIR --compare is required"),
        (["runs", "--compare", "a", "b"], "not allowed with argument"),
        (["--compare", "a", "b", "runs"], "not allowed with argument"),
        (["--compare", "a"], "expected 2 arguments"),
        (["runs", "--heads", "-1"], "must be at least 0"),
        (["runs", "--heads", "few"], "a whole number is needed"),
        (["runs", "--json", "--html", "page.html"], "not allowed with argument"),
    ],
)
def test_options_that_cannot_work_together(arguments: list[str], error: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    assert stop.value.code == 2
    assert error in capsys.readouterr().err


def test_a_directory_of_several_runs_cannot_be_compared(tmp_path: Path, capsys: Capture) -> None:
    for name in ("a/1", "a/2", "b"):
        JSONLWriter(tmp_path / name).write(probe(0))
    assert main(["report", "--compare", str(tmp_path / "b"), str(tmp_path / "a")]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert "2 runs are in" in error
    assert main(["report", "--compare", str(tmp_path / "b"), str(tmp_path / "c")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, LoggedRun], Path]]:
    """What is given to ``write_page``."""
    written: list[tuple[dict[str, LoggedRun], Path]] = []
    module: Any = ModuleType("attnprobe.view.html")
    module.write_page = lambda runs, path: written.append((dict(runs), path))
    monkeypatch.setitem(sys.modules, "attnprobe.view.html", module)
    return written


def test_a_page_is_written_of_all_logs_or_of_both_runs(tmp_path: Path, pages: list[Any], capsys: Capture) -> None:
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "page.html"
    train(JSONLWriter(a), TensorBoardWriter(a))
    train(JSONLWriter(b), seed=1)
    assert said(capsys, tmp_path, "--html", out) == f"wrote {out}"
    assert said(capsys, "--html", out, "--compare", a, b) == f"wrote {out}"
    (of_all, path), (of_both, _) = pages
    assert path == out
    assert list(of_all) == ["a", "b/attention.jsonl"]
    assert list(of_both) == [str(a), str(b)]
    assert type(of_both[str(a)].source).__name__ == "EventSource"  # which may hold pictures
    assert main(["report", "--html", str(out), "--compare", str(tmp_path), str(b)]) == 2


def test_the_document_of_a_log() -> None:
    raised = [
        alarm(step, value, evidence=((step, value),), severity="information") for step, value in ((0, 5.0), (7, INF))
    ]
    reports = [
        dataclasses.replace(measured(0, raised[0], own=[[1.0, 2.0, 4.0], [8.0]]), loss=2.0, warnings=("w\x1b",)),
        StepReport(3, invalid="why", notes=("n",)),
        dataclasses.replace(measured(7, raised[1], own=[[3.0, NAN, 4.0], [-INF]]), loss=0.5),
    ]
    document = strict(dumps(report_document({"<b>\n": log(*reports), "empty": log()})))
    assert document.keys() == {"schema", "kind", "logs"}
    assert (document["schema"], document["kind"]) == (1, "report")
    found = document["logs"]["<b>\n"]
    heads = found.pop("per_head")
    assert found == {
        "probes": 3,
        "steps": {"first": 0, "last": 7},
        "loss": {"first": 2, "last": 0.5, "min": 0.5, "max": 2},
        "invalid": [{"step": 3, "reason": "why"}],
        "warnings": ["w\x1b"],
        "notes": ["n"],
        "problems": [],
        "layers": ["a", "b"],
        "heads": [3, 1],
        "alarms": [
            {"name": "rule", "severity": "information", "layer": "a", "heads": [0], "since": 0, "raised": 0, "last": 0,
             "standing": False, "peak": 5, "threshold": 1, "advice": "Mend rule.", "evidence": [[0, 5]],
             "snoozed": False},
            {"name": "rule", "severity": "information", "layer": "a", "heads": [0], "since": 0, "raised": 7, "last": 7,
             "standing": True, "peak": "inf", "threshold": 1, "advice": "Mend rule.", "evidence": [[7, "inf"]],
             "snoozed": False},
        ],
    }  # fmt: skip
    assert [(head["layer"], head["head"]) for head in heads] == [("a", 0), ("b", 0), ("a", 2), ("a", 1)]
    assert heads[0] == {
        "layer": "a",
        "head": 0,
        "alarms": [{"name": "rule", "severity": "information", "standing": True}],
        "stands_out": {"statistic": "own", "value": 3, "median": 3.5, "distance": 0.674},
        "measured": True,
        "statistics": {"own": {"first": 1, "last": 3, "min": 1, "max": 3}},
    }
    assert heads[1]["stands_out"] == {"statistic": "own", "value": "-inf", "median": 3.5, "distance": "inf"}
    assert heads[3]["stands_out"] is None
    empty = document["logs"]["empty"]
    assert empty["steps"] == {"first": None, "last": None}
    assert empty["loss"] == {"first": None, "last": None, "min": None, "max": None}
    assert (empty["probes"], empty["per_head"]) == (0, [])


def test_alarms_of_one_run_of_the_other_and_of_both() -> None:
    a = log(
        probe(0, alarm(0, name="both"), alarm(0, name="of a", heads=(1, 3))),
        probe(1, alarm(1, name="both", heads=(2,))),
        probe(2, alarm(2, name="of a", heads=(2,))),
    )
    b = log(probe(0, alarm(0, name="of b", layer="", heads=())), probe(1, alarm(1, name="both")), probe(2))
    found = compare(a, b)
    assert table(comparison_text(found, ("x", "y")), "alarm") == [
        ["of a", "a", "only A", "heads 1-3, stands", "-"],
        ["of b", "run", "only B", "-", "cleared"],
        ["both", "a", "both", "heads 0,2, cleared", "heads 0, cleared"],
    ]
    document = strict(dumps(comparison_document(found, ("x", "y"))))
    assert document["alarms"][:2] == [
        {"name": "of a", "layer": "a", "in": "a", "a": {"heads": [1, 2, 3], "standing": True}, "b": None},
        {"name": "of b", "layer": "", "in": "b", "a": None, "b": {"heads": [], "standing": False}},
    ]
    assert "no alarms in either" in comparison_text(compare(log(probe(0)), log()), ("x", "y"))


def test_heads_are_matched_by_name_and_number() -> None:
    a = measured(4, sink_mass=[[0.1, 0.2, 0.3], [0.4]], mine=[[1.0, 1.0, 1.0], [1.0]])
    b = dataclasses.replace(
        measured(4, sink_mass=[[0.4, 0.9], [0.1, 0.25]], max_logit=[[1.0, 1.0], [1.0, 1.0]]), layers=("c", "a")
    )
    found = compare(log(a), log(b))
    assert (found.only_a, found.only_b, found.resized, found.alone) == (
        ("b",),
        ("c",),
        {"a": (3, 2)},
        ("mine", "max_logit"),
    )
    assert found.medians == {"sink_mass": (0.25, pytest.approx(0.325))}
    width = spread(np.array([0.1, 0.2, 0.3, 0.4, 0.4, 0.9, 0.1, 0.25])).width
    ((place, *numbers),) = found.differences
    assert place == Place("a", 1, 0, 1)
    assert numbers == ["sink_mass", 0.2, 0.25, pytest.approx(0.05 / width, abs=0.0006)]
    text = comparison_text(found, ("x", "y"))
    for line in (
        "1 layer only in A: b",
        "1 layer only in B: c",
        "a: 3 heads in A and 2 in B",
        "has it: mine, max_logit",
    ):
        assert line in text
    assert table(text, "layer +head +sink_mass") == [["a", "1", "0.2 | 0.25"]]


@pytest.mark.parametrize(
    ("of_a", "of_b", "compared", "text"),
    [
        ([0, 10, 20], [5, 10, 15], (10, 10), "at step 10, the last that both probed"),
        ([0, 20], [5, 15], (20, 15), "at the last step of each, 20 and 15: they probed no step in common"),
    ],
)
def test_the_last_common_step_is_compared(
    of_a: list[int], of_b: list[int], compared: tuple[int, int], text: str
) -> None:
    runs = [
        log(*(measured(step, entropy=[[1.0 + step * sign, 2.0]]) for step in steps))
        for sign, steps in ((1, of_a), (-1, of_b))
    ]
    found = compare(*runs)
    assert text in comparison_text(found, ("x", "y"))
    (only,) = found.differences
    assert (only.a, only.b) == (1 + compared[0], 1 - compared[1])
    document = comparison_document(found, ("x", "y"))
    assert document["compared_at"] == {"a": compared[0], "b": compared[1], "same_step": compared[0] == compared[1]}
    assert ("loss at step" in comparison_text(found, ("x", "y"))) == found.same_step


def test_an_invalid_probe_is_no_common_step() -> None:
    good, later = measured(3, entropy=[[1.0, 2.0]]), measured(9, entropy=[[5.0, 2.0]])
    found = compare(log(good, later), log(good, dataclasses.replace(later, invalid="broken")))
    assert (found.probes, found.differences) == ((0, 0), ())
    nothing = compare(log(good), log(probe(0), dataclasses.replace(good, invalid="broken")))
    assert "no heads to compare: nothing was measured in B" in comparison_text(nothing, ("x", "y"))
    empty = comparison_text(compare(log(), log()), ("x", "y"))
    assert "no heads to compare: nothing was measured in A and B" in empty
    assert comparison_document(nothing, ("x", "y"))["compared_at"] is None


def test_how_many_differences_are_shown() -> None:
    a, b = (log(measured(0, sink_mass=[[float(factor * head) for head in range(13)]])) for factor in (1, 2))
    found = compare(a, b)
    for limit, shown, more in ((10, 10, "and 2 more; --heads 0 shows all"), (0, 12, ""), (12, 12, "")):
        text = comparison_text(found, ("x", "y"), limit)
        rows = table(text, "layer +head +statistic")
        assert [int(row[1]) for row in rows] == list(range(12, 12 - shown, -1))
        assert more in text
        assert (" more;" in text) == bool(more)
    assert len(comparison_document(found, ("x", "y"))["differences"]) == 12


@reproducible(200)
@given(st.data())
def test_differences_are_the_largest_of_each_head(data: st.DataObject) -> None:
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, max_side=3))
    a, b = ({name: data.draw(arrays(np.float64, shape, elements=SMALL)) for name in "xy"} for _ in "ab")
    found = differences(a, b, [Place("l", head, row, row) for row, head in np.ndindex(*shape)])
    assert [one.distance for one in found] == sorted((one.distance for one in found), reverse=True)
    by_place = {(one.place.row_a, one.place.head): one for one in found}
    assert len(by_place) == len(found)
    for where in np.ndindex(*shape):
        distances = {}
        for name in "xy":
            both = np.concatenate([a[name], b[name]])
            one, other = a[name][where], b[name][where]
            if not math.isnan(one) and not math.isnan(other) and one != other:
                width = spread(both).width
                distances[name] = abs(one - other) / (width if width > 0 else 1)
        largest = max(distances.values(), default=0.0)
        if largest < 0.0004:
            assert where not in by_place
        elif largest > 0.0006:
            for expected in (largest, distances[by_place[where].statistic]):
                assert by_place[where].distance == pytest.approx(expected, rel=1e-9, abs=0.0006)


def test_hostile_names_cannot_move_the_cursor() -> None:
    hostile = "h\n\x1b[31m\u202e<b>"
    values = {name: torch.tensor([[1.0, 2.0]], dtype=torch.float64) for name in (hostile, "sink_mass")}
    raised = alarm(0, name=hostile, layer=hostile)
    report = StepReport(0, (hostile,), (2,), values, alarms=(raised,))
    other = dataclasses.replace(report, statistics={hostile: values[hostile] * 2}, alarms=())
    alone = dataclasses.replace(report, layers=("x" + hostile,))
    for found in (compare(log(report, name=hostile), log(other)), compare(log(report), log(alone))):
        text = comparison_text(found, (hostile, hostile))
        assert all(line.isprintable() for line in text.split("\n"))
        assert strict(dumps(comparison_document(found, (hostile, hostile))))["a"]["directory"] == hostile


@pytest.mark.parametrize(
    "document", [lambda run: report_document({"": run}), lambda run: comparison_document(compare(run, run), ("", ""))]
)
def test_documents_hold_no_arrays(document: Callable[[LoggedRun], dict[str, Any]]) -> None:
    text = dumps(document(log(measured(0, alarm(0), entropy=[[1.0, NAN]]))))
    assert text.isascii()
    assert strict(text)["schema"] == 1

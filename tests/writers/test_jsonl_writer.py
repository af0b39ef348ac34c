"""The JSONL file: strict, complete line by line, readable after a crash."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from sample_reports import alarm, every_kind, full_report

from attnprobe.errors import WriterError
from attnprobe.report import Alarm
from attnprobe.writers import JSONLWriter, read_jsonl


def strict(line: str) -> Any:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_line_is_strict_json_with_the_same_keys(tmp_path: Path) -> None:
    writer = JSONLWriter(tmp_path / "a.jsonl")
    for report in every_kind():
        writer.write(report)
    lines = (tmp_path / "a.jsonl").read_text("ascii").splitlines()
    records = [strict(line) for line in lines]
    assert len(records) == len(every_kind())
    assert len({tuple(record) for record in records}) == 1
    assert {(record["schema"], record["kind"]) for record in records} == {(1, "probe")}
    assert records == read_jsonl(tmp_path / "a.jsonl")


def test_values_return_to_nine_digits(tmp_path: Path) -> None:
    report = full_report(7, alarms=(alarm(7),), warnings=("w",))
    JSONLWriter(tmp_path).write(report)
    (record,) = read_jsonl(tmp_path)
    assert record["step"] == 7
    assert record["layers"] == list(report.layers)
    assert record["heads"] == list(report.heads)
    for name, values in report.statistics.items():
        for row, heads, expected in zip(record["statistics"][name], report.heads, values.tolist(), strict=True):
            assert row == pytest.approx(expected[:heads], rel=1e-8)
    assert record["layer_statistics"]["entropy_8"] == pytest.approx(report.layer["entropy_8"].tolist(), rel=1e-8)
    assert [len(row) for row in record["residual"]] == list(report.heads)
    assert record["loss"] == 2.5
    assert record["valid"]
    assert record["warnings"] == ["w"]
    assert record["notes"] == ["padding unknown"]
    assert Alarm.from_dict(record["alarms"][0]) == report.alarms[0]
    assert abs(record["time"] - time.time()) < 60


def test_numbers_that_json_cannot_say(tmp_path: Path) -> None:
    for report in every_kind()[3:6]:
        JSONLWriter(tmp_path).write(report)
    odd, ragged, invalid = read_jsonl(tmp_path)
    assert odd["statistics"] == {
        "entropy": [[None] * 4, [None] * 2, [None] * 3],
        "max_logit": [["inf"] * 4, ["inf"] * 2, ["inf"] * 3],
        "advantage_max": [["-inf"] * 4, ["-inf"] * 2, ["-inf"] * 3],
    }
    assert ragged["loss"] is None
    assert ragged["residual"] is None
    assert [len(row) for row in ragged["statistics"]["entropy"]] == [1, 12, 3, 5]
    assert (invalid["valid"], invalid["invalid"], invalid["statistics"]) == (False, "no backward ran", {})


def test_only_what_is_not_finite_is_listed(tmp_path: Path) -> None:
    writer = JSONLWriter(tmp_path)
    writer.write(every_kind()[0])
    writer.write(every_kind()[8])
    finite, broken = read_jsonl(tmp_path)
    assert finite["nonfinite"] == {}
    assert broken["nonfinite"] == {"error": [[0, 7, 0, 0], [0, 0], [0, 0, 0]]}


def test_a_run_that_was_killed_while_writing_can_be_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "killed.jsonl"
    writer = JSONLWriter(path)
    for step in range(3):
        writer.write(full_report(step))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in {1, 2, (len(whole) - last) // 2, len(whole) - last - 1}:
        path.write_bytes(whole[:-cut])
        # A line that lacks nothing but its end is complete.
        kept = [0, 1, 2] if cut == 1 else [0, 1]
        assert [record["step"] for record in read_jsonl(path)] == kept
        before = path.read_bytes()
        JSONLWriter(path).write(full_report(9))
        assert path.read_bytes().startswith(before)
        assert [record["step"] for record in read_jsonl(path)] == [*kept, 9]


def test_names_of_the_file(tmp_path: Path) -> None:
    assert JSONLWriter(tmp_path / "runs" / "v1.0").path == tmp_path / "runs" / "v1.0" / "attention.jsonl"
    assert JSONLWriter(str(tmp_path / "b.jsonl")).path == tmp_path / "b.jsonl"
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(WriterError, match=r"folder\.jsonl: it is a directory"):
        JSONLWriter(tmp_path / "folder.jsonl")


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        JSONLWriter(tmp_path / "full.jsonl").write(full_report())


def test_another_file_is_not_taken_for_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("step,loss\n1,2\n")
    with pytest.raises(WriterError, match="no JSON record in its 2 lines"):
        read_jsonl(tmp_path / "other.txt")
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == []
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "missing.jsonl")


def test_small_numbers_survive(tmp_path: Path) -> None:
    JSONLWriter(tmp_path).write(full_report(loss=1.23456789012e-300))
    assert math.isclose(read_jsonl(tmp_path)[0]["loss"], 1.23456789e-300, rel_tol=1e-12)

"""Logged runs come back as the reports that were written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnprobe as ap
from attnprobe.alarms import DEFAULT_ALARMS, LogitExplosion
from attnprobe.errors import AttnProbeWarning, LogError
from attnprobe.logs import read_run, report_of
from attnprobe.report import Alarm, StepReport
from attnprobe.writers import JSONLWriter, TensorBoardWriter, Writer
from attnprobe.writers.jsonl import to_dict
from attnprobe.writers.strict_json import dumps
from tests.probe.models import batch, batches, loss_of, net, run

#: Relative: nine digits, and float32.
JSONL, EVENTS = 1e-8, 1e-6


def train(*writers: Writer, steps: int = 4) -> list[StepReport]:
    """A model whose layers differ in their heads, with an alarm in each; the last batch holds a NaN."""
    alarms = [LogitExplosion(threshold=0.0, patience=1), *(r for r in DEFAULT_ALARMS if r.name != "logit_explosion")]
    model, memory = net(heads=(2, 4)), ap.MemoryWriter()
    probe = ap.AttentionProbe(
        model, every_n_steps=1, alarms=alarms, action="record", writers=[memory, *writers], statistics="all"
    )
    with probe:
        for step, x in enumerate(batches(steps)):
            if step == steps - 1:
                x[0, 0, 0] = math.nan
            loss = loss_of(model, x)
            loss.backward()
            probe.step(loss)
    return memory.reports


def assert_same(found: StepReport, written: StepReport, rel: float) -> None:
    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b.double(), rtol=rel, atol=0, equal_nan=True)

    assert (found.step, found.layers, found.heads) == (written.step, written.layers, written.heads)
    assert found.loss == pytest.approx(written.loss, rel=rel, nan_ok=True)
    assert set(found.statistics) == set(written.statistics)
    for name, values in written.statistics.items():
        close(found[name], values)
    assert set(found.layer) == set(written.layer)
    for name, values in written.layer.items():
        close(found.layer[name], values)
    assert (found.residual is None) == (written.residual is None)
    if written.residual is not None:
        close(found.residual, written.residual)
    counted = {kind: counts for kind, counts in written.nonfinite.items() if (counts > 0).any()}
    assert set(found.nonfinite) == set(counted)
    for kind, counts in counted.items():
        close(found.nonfinite[kind], counts)
    assert_same_alarms(found, written)


def assert_same_alarms(found: StepReport, written: StepReport) -> None:
    def plain(report: StepReport) -> list[dict[str, object]]:
        return json.loads(dumps([alarm.to_dict() for alarm in report.alarms]))

    assert plain(found) == plain(written)
    assert all(isinstance(alarm, Alarm) and isinstance(alarm.heads, tuple) for alarm in found.alarms)


def assert_all_same(found: Sequence[StepReport], written: Sequence[StepReport], rel: float) -> None:
    for one, other in zip(found, written, strict=True):
        assert_same(one, other, rel)


def events_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*tfevents*"))


def test_both_formats_give_a_training_back(tmp_path: Path) -> None:
    written = train(JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events"))
    assert {alarm.name for alarm in written[0].alarms} == {"logit_explosion"}
    assert "nonfinite" in {alarm.name for alarm in written[-1].alarms}
    assert written[-1].nonfinite
    assert len(written[0].statistics) > 20
    logs = read_run(tmp_path)
    assert list(logs) == ["events", "lines/attention.jsonl"]
    assert_all_same(logs["lines/attention.jsonl"], written, JSONL)
    assert_all_same(logs["events"], written, EVENTS)
    for found, report in zip(logs["lines/attention.jsonl"], written, strict=True):
        assert (found.warnings, found.notes, found.invalid) == (report.warnings, report.notes, report.invalid)


def test_estimates_keep_their_standard_errors_in_jsonl(tmp_path: Path) -> None:
    model, memory = net(heads=(2, 4)), ap.MemoryWriter()
    with ap.AttentionProbe(
        model, every_n_steps=1, rows=16, alarms=(), writers=[memory, JSONLWriter(tmp_path)]
    ) as probe:
        run(probe, model, x=batch(length=40))
    ((found,),) = read_run(tmp_path).values()
    (written,) = memory.reports
    assert_same(found, written, JSONL)
    assert set(found.standard_errors) == set(written.standard_errors) > {"entropy", "entropy_8"}
    for name, values in written.standard_errors.items():
        torch.testing.assert_close(found.standard_errors[name], values, rtol=JSONL, atol=0, equal_nan=True)


def sample(step: int = 0, **changes: object) -> StepReport:
    values = torch.tensor([[1.5, math.nan], [math.inf, -math.inf]], dtype=torch.float64)
    standing = Alarm(
        "rule", "a", (0,), step, 0, math.inf, math.nan, "Advice.", True, "information", ((step, math.nan),)
    )
    options = {"layers": ("a", "b"), "heads": (1, 2), "statistics": {"entropy": values}, "alarms": (standing,)}
    return StepReport(step, **(options | changes))  # type: ignore[arg-type]


def test_numbers_that_json_cannot_say(tmp_path: Path) -> None:
    written = sample(7, loss=math.inf)
    JSONLWriter(tmp_path / "a.jsonl").write(written)
    writer = TensorBoardWriter(tmp_path / "events")
    writer.write(written)
    writer.close()
    logs = read_run(tmp_path)
    for found, rel in ((logs["a.jsonl"][0], JSONL), (logs["events"][0], EVENTS)):
        assert_same(found, written, rel)
        (alarm,) = found.alarms
        assert (alarm.value, alarm.severity, alarm.snoozed) == (math.inf, "information", False)
        assert math.isnan(alarm.threshold)
        assert math.isnan(alarm.evidence[0][1])


def test_an_invalid_probe_keeps_its_reason_and_its_alarms(tmp_path: Path) -> None:
    odd = "no *backward* ran & <nothing> was_measured_"
    reports = [sample(0), StepReport(1, invalid=odd, alarms=sample(1).alarms, warnings=("a [b]",)), StepReport(2)]
    writers = [JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events")]
    for writer in writers:
        for report in reports:
            writer.write(report)
        writer.close()
    for found in read_run(tmp_path).values():
        assert [report.invalid for report in found] == ["", odd, ""]
        assert [len(report.alarms) for report in found] == [1, 1, 0]
        assert found[1].warnings == ("a [b]",)


def test_layers_that_come_later(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    three = {"entropy": torch.tensor([[1.0, math.nan, math.nan], [2, 3, math.nan], [4, 5, 6]])}
    written = [sample(0), sample(1), sample(2, layers=("a", "b", "c"), heads=(1, 2, 3), statistics=three), sample(3)]
    for report in written:
        writer.write(report)
    writer.close()
    assert_all_same(read_run(tmp_path)["."], written, EVENTS)


def test_lines_of_older_versions_lack_keys() -> None:
    assert report_of({"step": 3}).step == 3
    assert math.isnan(report_of({"step": 3}).loss)
    record = json.loads(dumps(to_dict(sample(4))))
    for key in ("evidence", "severity", "snoozed", "new"):
        del record["alarms"][0][key]
    (alarm,) = report_of(record).alarms
    assert (alarm.evidence, alarm.severity, alarm.snoozed, alarm.new) == ((), "alarm", False, True)


def test_a_torn_end_is_left_out(tmp_path: Path) -> None:
    lines, events = tmp_path / "lines", tmp_path / "events"
    for writer in (JSONLWriter(lines), TensorBoardWriter(events)):
        for step in range(3):
            writer.write(sample(step))
        writer.close()
    for path in (lines / "attention.jsonl", *events_of(events)):
        os.truncate(path, path.stat().st_size - 50)
    assert {name: [r.step for r in log] for name, log in read_run(tmp_path).items()} == {
        "events": [0, 1],
        "lines/attention.jsonl": [0, 1],
    }
    JSONLWriter(lines).write(sample(2))
    assert [report.step for report in read_run(lines)["attention.jsonl"]] == [0, 1, 2]


def test_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    for steps, loss in (((0, 10, 20, 30), 1.0), ((10, 20), 2.0)):
        for writer in (JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events")):
            for step in steps:
                writer.write(sample(step, loss=loss))
            writer.close()
    assert len(events_of(tmp_path / "events")) == 2
    for log in read_run(tmp_path).values():
        assert [(report.step, report.loss) for report in log] == [(0, 1.0), (10, 2.0), (20, 2.0)]


def test_event_files_of_one_second_are_read_in_the_order_of_their_making(tmp_path: Path) -> None:
    for step in range(3):
        writer = TensorBoardWriter(tmp_path)
        writer.write(sample(step))
        writer.close()
    made = sorted(events_of(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    for path, name in zip(made, ("9", "10", "11"), strict=True):
        path.rename(tmp_path / f"events.out.tfevents.1700000000.host.1.{name}")
    assert [report.step for report in read_run(tmp_path)["."]] == [0, 1, 2]


def test_every_log_beneath_is_found_and_jsonl_is_preferred(tmp_path: Path) -> None:
    version = tmp_path / "lightning_logs" / "version_0"
    for writer in (TensorBoardWriter(version), JSONLWriter(version), JSONLWriter(tmp_path / "other.jsonl")):
        writer.write(sample(1))
        writer.close()
    half = tmp_path / "lightning_logs" / "version_1"
    JSONLWriter(half)  # leaves an empty file
    writer = TensorBoardWriter(half)
    writer.write(sample(2))
    writer.close()
    (tmp_path / "data.jsonl").write_text('{"text":"not a probe"}\n{"kind":"other"}\n{"x":{"kind":"probe"}}\n[1]\n')
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    found = {name: [report.step for report in log] for name, log in read_run(tmp_path).items()}
    assert found == {
        "lightning_logs/version_0/attention.jsonl": [1],
        "lightning_logs/version_1": [2],
        "lightning_logs/version_1/attention.jsonl": [],
        "other.jsonl": [1],
    }
    assert list(read_run(str(tmp_path / "other.jsonl"))) == ["other.jsonl"]


def test_a_shared_event_file(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shared = SummaryWriter(str(tmp_path))
    writer = TensorBoardWriter(shared)
    for step in range(2):
        shared.add_scalar("attention/mine", 1.0, step)
        shared.add_text("attnprobe_too", "text", step)
        writer.write(sample(step))
    shared.close()
    assert_all_same(read_run(tmp_path)["."], [sample(0), sample(1)], EVENTS)


def test_a_place_without_a_log_is_named(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with pytest.raises(LogError, match="missing does not exist"):
        read_run(tmp_path / "missing")
    shared = SummaryWriter(str(tmp_path))
    shared.add_scalar("loss", 1.0, 0)
    shared.close()
    (tmp_path / "data.jsonl").write_text("{}\n")
    for place in (tmp_path, tmp_path / "data.jsonl"):
        with pytest.raises(LogError, match=r"no log found in .*JSONLWriter \(\*\.jsonl\) and of TensorBoardWriter"):
            read_run(place)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": None}, "TypeError"),
        ({"heads": [1]}, "ValueError"),
        ({"statistics": {"entropy": [[1, 2, 3], [1, 2]]}}, "ValueError"),
        ({"loss": "much"}, "ValueError: could not convert"),
        ({"alarms": [{"name": "x"}]}, "KeyError"),
        ({"step": math.inf}, "OverflowError|ValueError"),
        ({"layers": ["a"]}, r"ValueError: 1 layers, and \[1, 2\] as their numbers of heads"),
        ({"heads": [2, -1]}, "ValueError: 2 layers, and"),
        ({"statistics": {"entropy": [[1, 2]]}}, r"ValueError: a statistic of \[2\] values for \[1, 2\] heads"),
        ({"statistics": {"entropy": [[1, 2, 3]]}}, "ValueError: a statistic of"),
        ({"statistics": {"entropy": [[1], [1]]}}, "ValueError: a statistic of"),
        ({"nonfinite": {"query": [[1, 2]] * 3}}, "ValueError: a statistic of"),
        ({"layer_statistics": {"x": [1]}}, "ValueError: a statistic with 1 values for 2 layers"),
        ({"layer_statistics": []}, "AttributeError"),
    ],
)
def test_a_line_that_is_no_probe_is_named(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    JSONLWriter(tmp_path).write(sample(0))
    with (tmp_path / "attention.jsonl").open("a") as file:
        file.write(dumps(to_dict(sample(1)) | changes) + "\n")
    with pytest.raises(LogError, match=rf"attention\.jsonl, line 2: not the record of a probe: {said}"):
        read_run(tmp_path)


def test_names_in_an_alarm_are_text(tmp_path: Path) -> None:
    record = json.loads(dumps(to_dict(sample(4))))
    record["alarms"][0]["name"] = 3
    assert report_of(record).alarms[0].name == "3"


@pytest.mark.parametrize("where", ["length", "data"])
def test_what_follows_damage_is_not_read_and_that_is_said(where: str, tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step in range(5):
        writer.write(sample(step))
    writer.close()
    (path,) = events_of(tmp_path)
    content, starts = bytearray(path.read_bytes()), [0]
    while starts[-1] < len(content):
        (length,) = struct.unpack_from("<Q", content, starts[-1])
        starts.append(starts[-1] + 16 + length)
    fourth = starts[-3]  # of five probes
    content[fourth + {"length": 1, "data": 40}[where]] ^= 1
    path.write_bytes(content)
    with pytest.warns(AttnProbeWarning, match=f"damaged from byte {fourth} on; what follows is not read"):
        found = read_run(tmp_path)
    assert [report.step for report in found["."]] == [0, 1, 2]


def test_events_that_are_no_probe_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnprobe.writers import summaries

    broken = dataclasses.replace(summaries.alarms(sample()), payload=summaries.string("[1"))
    monkeypatch.setattr(summaries, "alarms", lambda report: broken)
    writer = TensorBoardWriter(tmp_path)
    writer.write(sample(5))
    writer.close()
    with pytest.raises(LogError, match="step 5: "):
        read_run(tmp_path)

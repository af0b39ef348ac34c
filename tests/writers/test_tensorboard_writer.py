"""TensorBoard files, read back with TensorBoard's own readers and compared with what was put in."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sample_reports import HOSTILE, alarm, every_kind, full_report, head_map
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader, RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, DATA_CLASS_TENSOR
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from attnprobe.catalog import STATISTICS, select
from attnprobe.report import StepReport
from attnprobe.writers import TensorBoardWriter
from attnprobe.writers.aggregates import aggregates
from attnprobe.writers.text import printable

Read = Callable[[Path], Any]


def write(directory: Path, *reports: StepReport, **options: Any) -> None:
    writer = TensorBoardWriter(directory, **options)
    for report in reports:
        writer.write(report)
    writer.close()


def raw_events(directory: Path) -> list[bytes]:
    return [raw for path in sorted(directory.glob("events.*")) for raw in RawEventFileLoader(str(path)).Load()]


def text(events: Any, tag: str, index: int = -1) -> str:
    return str(make_ndarray(events.Tensors(tag)[index].tensor_proto).item().decode())


def test_statistics_come_back(tmp_path: Path, read_events: Read) -> None:
    reports = [full_report(step) for step in (0, 50, 100)]
    write(tmp_path, *reports)
    events = read_events(tmp_path)
    for name, entry in STATISTICS.items():
        found = events.Tensors(f"attnprobe/{name}")
        assert [event.step for event in found] == [0, 50, 100]
        for event, report in zip(found, reports, strict=True):
            expected = (report.statistics if entry.level == "head" else report.layer)[name]
            array = torch.from_numpy(make_ndarray(event.tensor_proto).copy())
            torch.testing.assert_close(array, expected.float(), rtol=0, atol=0, equal_nan=True)
    residual = torch.from_numpy(make_ndarray(events.Tensors("attnprobe/residual")[1].tensor_proto).copy())
    torch.testing.assert_close(residual, reports[1].residual.float(), equal_nan=True)
    assert make_ndarray(events.Tensors("attnprobe/loss")[0].tensor_proto) == 2.5


def test_scalars_come_back_described(tmp_path: Path, read_events: Read) -> None:
    report = full_report(7, alarms=(alarm(7),))
    write(tmp_path, report, full_report(8))
    events = read_events(tmp_path)
    assert set(events.Tags()["scalars"]) == set(aggregates(report))
    for tag, value in aggregates(report).items():
        first, second = events.Scalars(tag)
        assert first.step == 7
        assert first.value == pytest.approx(value, rel=1e-6)
        assert second.step == 8
        metadata = events.SummaryMetadata(tag)
        assert metadata.plugin_data.plugin_name == "scalars"
        assert metadata.data_class == DATA_CLASS_SCALAR
        assert metadata.display_name == tag
        assert len(metadata.summary_description) > 20
    assert "Formula: `mean over R of H_i" in events.SummaryMetadata("attention/entropy/min").summary_description


def test_metadata_says_what_a_tensor_is(tmp_path: Path, read_events: Read) -> None:
    report = full_report(0)
    write(tmp_path, report, full_report(1))
    events = read_events(tmp_path)
    content = events.PluginTagToContent("attnprobe")
    assert len(content) == len(STATISTICS) + 4  # residual, loss, layout, alarms
    for name, entry in STATISTICS.items():
        assert json.loads(content[f"attnprobe/{name}"]) == {
            "schema": 1,
            "kind": "statistic",
            "level": entry.level,
            "layers": list(report.layers),
            "heads": list(report.heads),
        }
        metadata = events.SummaryMetadata(f"attnprobe/{name}")
        assert metadata.data_class == DATA_CLASS_TENSOR
        assert metadata.display_name == name
        for part in (entry.meaning, entry.formula, entry.unit):
            assert part in metadata.summary_description


def test_tensorboards_own_migration_keeps_titles_and_values(tmp_path: Path) -> None:
    """The reader of the web page turns old fields into new ones: descriptions must survive that."""
    write(tmp_path, full_report(0, maps=(head_map(),)), full_report(1, maps=(head_map(),)))
    (path,) = tmp_path.glob("events.*")
    values = [list(event.summary.value) for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]
    assert len(values) == 2
    first = {value.tag: value for value in values[0]}
    assert all(value.HasField("tensor") for value in first.values())
    scalar = first["attention/entropy/mean"]
    assert scalar.metadata.plugin_data.plugin_name == "scalars"
    assert "How widely" in scalar.metadata.summary_description
    picture = first["attention_maps/transformer.h.0.attn/head1"]
    assert picture.metadata.plugin_data.plugin_name == "images"
    assert "queries down" in picture.metadata.summary_description


def test_one_event_per_probe_and_described_once(tmp_path: Path) -> None:
    reports = every_kind()
    write(tmp_path, *reports)
    events = [Event.FromString(raw) for raw in raw_events(tmp_path)]
    assert events[0].file_version
    assert [event.step for event in events[1:]] == [report.step for report in reports]
    described = [
        value.tag
        for event in events
        for value in event.summary.value
        if value.HasField("metadata") and value.metadata.summary_description
    ]
    assert len(described) == len(set(described))
    assert set(described) == {value.tag for event in events for value in event.summary.value}
    for event in events:
        tags = [value.tag for value in event.summary.value]
        assert len(tags) == len(set(tags))


def test_size_and_time_of_a_probe(tmp_path: Path) -> None:
    names = [entry.name for entry in select("all") if entry.level == "head"]
    reports = []
    for step in range(40):
        report = full_report(step, heads=(12,) * 12)
        reports.append(full_report(step, (12,) * 12, statistics={name: report[name] for name in names}))
    writer = TensorBoardWriter(tmp_path)
    times = []
    for report in reports:
        time.sleep(0.02)  # a training step: TensorBoard's thread takes 5 ms for a checksum in pure Python
        start = time.perf_counter()
        writer.write(report)
        times.append(time.perf_counter() - start)
    writer.close()
    sizes = [len(raw) for raw in raw_events(tmp_path)][1:]
    later, milliseconds = sorted(sizes[1:]), sorted(1000 * seconds for seconds in times)
    print(
        f"\n12 x 12 heads, {len(names)} statistics: first probe {sizes[0] / 1000:.1f} kB, then median "
        f"{later[len(later) // 2] / 1000:.1f} kB and {milliseconds[len(times) // 2]:.2f} ms, mean "
        f"{sum(sizes) / len(sizes) / 1000:.1f} kB and {sum(times) / len(times) * 1000:.2f} ms, at most "
        f"{later[-1] / 1000:.1f} kB and {milliseconds[-1]:.1f} ms"
    )
    assert later[-1] < 24_000
    assert sizes[0] < 100_000


def test_a_killed_process_leaves_every_earlier_probe(tmp_path: Path, read_events: Read) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from sample_reports import full_report;"
        "from attnprobe.writers import TensorBoardWriter; writer = TensorBoardWriter(sys.argv[2]);"
        "[writer.write(full_report(step)) for step in range(4)]; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    steps = [event.step for event in read_events(tmp_path).Scalars("attention/entropy/mean")]
    assert steps in ([0, 1, 2], [0, 1, 2, 3])


def test_the_directory_holds_no_event_file_before_the_first_report(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "rank1")
    writer.close()
    assert list((tmp_path / "rank1").iterdir()) == []
    assert writer.log_dir == str(tmp_path / "rank1")


def test_a_new_file_describes_its_tags_again(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step in (0, 1):
        writer.write(full_report(step))
        writer.close()
    assert len(list(tmp_path.glob("events.*"))) == 2
    summaries = [event.summary for raw in raw_events(tmp_path) if (event := Event.FromString(raw)).summary.value]
    assert len(summaries) == 2
    assert all(value.metadata.summary_description for summary in summaries for value in summary.value)


def test_a_shared_summary_writer_stays_open(tmp_path: Path, read_events: Read) -> None:
    shared = SummaryWriter(str(tmp_path))
    shared.add_scalar("loss", 1.0, 0)
    writer = TensorBoardWriter(shared)
    writer.write(full_report(0))
    writer.close()
    shared.add_scalar("loss", 0.5, 1)
    shared.close()
    assert len(list(tmp_path.glob("events.*"))) == 1
    events = read_events(tmp_path)
    assert [event.value for event in events.Scalars("loss")] == [1.0, 0.5]
    assert len(events.Tensors("attnprobe/entropy")) == 1
    writer.write(full_report(2))  # a SummaryWriter opens a new file after its close
    shared.close()
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_layers_that_come_later_are_in_the_layout(tmp_path: Path, read_events: Read) -> None:
    write(tmp_path, full_report(0), full_report(1), full_report(2, heads=(4, 2, 3, 1)))
    layouts = read_events(tmp_path).Tensors("attnprobe/layout")
    found = {event.step: json.loads(make_ndarray(event.tensor_proto).item()) for event in layouts}
    assert set(found) == {0, 2}
    assert found[0]["heads"] == [4, 2, 3]
    assert found[2] == {"schema": 1, "layers": [f"transformer.h.{i}.attn" for i in range(4)], "heads": [4, 2, 3, 1]}


def test_alarms(tmp_path: Path, read_events: Read) -> None:
    standing = alarm(6, new=False, name="dead_head")
    write(tmp_path, full_report(0), full_report(6, alarms=(alarm(6), standing)), full_report(7, alarms=(standing,)))
    events = read_events(tmp_path)
    lists = [json.loads(make_ndarray(event.tensor_proto).item()) for event in events.Tensors("attnprobe/alarms")]
    assert lists == [[], [alarm(6).to_dict(), standing.to_dict()], [standing.to_dict()]]
    assert [event.value for event in events.Scalars("attention/alarms")] == [0, 2, 1]
    messages = events.Tensors("attention/alarm_messages")
    assert [event.step for event in messages] == [6]
    assert text(events, "attention/alarm_messages") == (
        "- **logit_explosion**: transformer.h.0.attn heads 0, 2, step 6 (since 0): "
        "123.5 against a threshold of 50. Lower the learning rate."
    )
    assert events.SummaryMetadata("attention/alarm_messages").plugin_data.plugin_name == "text"


def test_warnings_and_notes_are_written_when_they_change(tmp_path: Path, read_events: Read) -> None:
    write(
        tmp_path,
        full_report(0),
        full_report(1, warnings=("h.3: no gradient",)),
        full_report(2, warnings=("h.3: no gradient",)),
        full_report(3, warnings=("h.3: no gradient", "h.4: nested tensor")),
    )
    events = read_events(tmp_path)
    assert [event.step for event in events.Tensors("attention/warnings")] == [1, 3]
    assert text(events, "attention/warnings") == "- warning: h.3: no gradient\n- warning: h.4: nested tensor"
    assert [event.step for event in events.Tensors("attention/notes")] == [0]


def test_an_invalid_report_is_only_its_reason(tmp_path: Path, read_events: Read) -> None:
    write(tmp_path, full_report(3, invalid="two backwards", notes=(), maps=(head_map(),)))
    events = read_events(tmp_path)
    tags = {kind: tags for kind, tags in events.Tags().items() if tags}
    assert tags == {"tensors": ["attention/not_measured"]}
    assert text(events, "attention/not_measured") == "- step 3: two backwards"
    assert not (tmp_path / "projector_config.pbtxt").exists()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_hostile_names_are_shown_as_text(tmp_path: Path, read_events: Read) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    write(tmp_path / "run", every_kind()[9])
    events = read_events(tmp_path / "run")
    for tag in ("attention/alarm_messages", "attention/warnings"):
        page = markdown_to_safe_html(text(events, tag))
        assert {"ul", "li", "strong"} >= set(re.findall(r"<(\w+)", page))
        assert page.count("<li>") == 1
        assert printable(HOSTILE) in html.unescape(page)
    assert json.loads(text(events, "attnprobe/layout"))["layers"][0] == HOSTILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing is written outside"


def test_pictures(tmp_path: Path, read_events: Read) -> None:
    maps = (head_map(), head_map(head=2, rows=5, columns=40), head_map(layer="enc.attn#1", forward_only=True))
    write(tmp_path, *(full_report(step, maps=maps) for step in range(5)), maps_every=2, overview_every=3)
    events = read_events(tmp_path)
    sizes = {
        "attention_maps/transformer.h.0.attn/head1": (816, 310),
        "attention_maps/transformer.h.0.attn/head2": (816, 84),
        "attention_maps/enc.attn#1/head1": (280, 310),
        "attention_maps/overview/normalized_entropy": (280, 246),
    }
    assert set(events.Tags()["images"]) == set(sizes)
    for tag, size in sizes.items():
        images = events.Images(tag)
        assert [image.step for image in images] == ([0, 3] if "overview" in tag else [0, 2, 4])
        for image in images:
            assert (image.width, image.height) == size
            assert Image.open(io.BytesIO(image.encoded_image_string)).size[0] == size[0]


@pytest.mark.parametrize("forward_only", [False, True])
def test_pictures_are_written_as_numbers_too(forward_only: bool, tmp_path: Path, read_events: Read) -> None:
    usage = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    picture = dataclasses.replace(head_map(rows=5, columns=40, forward_only=forward_only), usage=usage)
    write(tmp_path, *(full_report(step, maps=(picture, head_map(head=2))) for step in range(3)), maps_every=2)
    events = read_events(tmp_path)
    where = "transformer.h.0.attn/head1"
    panels = (picture.attention, *(() if forward_only else (picture.compatibility, picture.advantage)))
    for tag, expected in ((f"attnprobe/map/{where}", torch.stack(panels)), (f"attnprobe/usage/{where}", usage)):
        found = events.Tensors(tag)
        assert [each.step for each in found] == [0, 2]
        for each in found:
            array = torch.from_numpy(make_ndarray(each.tensor_proto).copy())
            torch.testing.assert_close(array, expected.float(), rtol=0, atol=0, equal_nan=True)
        metadata = events.SummaryMetadata(tag)
        assert metadata.data_class == DATA_CLASS_TENSOR
        assert len(metadata.summary_description) > 20
        assert json.loads(metadata.plugin_data.content) == {
            "schema": 1,
            "kind": "map",
            "level": "head",
            "layer": "transformer.h.0.attn",
            "head": 1,
        }
    tags = {tag for tag in events.Tags()["tensors"] if tag.startswith(("attnprobe/map/", "attnprobe/usage/"))}
    other = "attnprobe/map/transformer.h.0.attn/head2"
    assert tags == {f"attnprobe/map/{where}", f"attnprobe/usage/{where}", other}, "usage only where it is known"


def projected(directory: Path) -> dict[str, tuple[list[list[float]], list[str]]]:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = text_format.Parse((directory / "projector_config.pbtxt").read_text(), ProjectorConfig())
    return {
        entry.tensor_name: (
            [[float(x) for x in row.split("\t")] for row in (directory / entry.tensor_path).read_text().splitlines()],
            (directory / entry.metadata_path).read_text().splitlines(),
        )
        for entry in config.embeddings
    }


def test_projector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = head_map()
    picture.values[2] = math.nan
    write(tmp_path, *(full_report(step, maps=(picture,) * (step != 1)) for step in range(5)), projector_every=3)
    found = projected(tmp_path)
    assert list(found) == ["transformer.h.0.attn.head1:00000", "transformer.h.0.attn.head1:00004"]
    keep = [index for index in range(64) if index != 2]
    for values, labels in found.values():
        torch.testing.assert_close(torch.tensor(values), picture.values[keep], rtol=1e-4, atol=1e-4)
        assert labels == [str(picture.positions[index]) for index in keep]
    assert capsys.readouterr().out == ""


def test_a_resumed_run_keeps_the_projector_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = (head_map(), head_map(head=2))
    for _ in range(3):
        write(tmp_path, full_report(10, maps=maps))
    assert sorted(projected(tmp_path)) == sorted(
        f"transformer.h.0.attn.head{head}{again}:00010" for head in (1, 2) for again in ("", "-2", "-3")
    )
    assert capsys.readouterr().out == "", "add_embedding complains on standard output about a directory used twice"


def test_the_users_own_embeddings_stay(tmp_path: Path) -> None:
    shared = SummaryWriter(str(tmp_path))
    shared.add_embedding(torch.randn(3, 2), metadata=["x", "y", "z"], tag="mine", global_step=0)
    TensorBoardWriter(shared).write(full_report(0, maps=(head_map(),)))
    shared.add_embedding(torch.randn(3, 2), metadata=["x", "y", "z"], tag="mine", global_step=1)
    shared.close()
    assert set(projected(tmp_path)) == {"mine:00000", "transformer.h.0.attn.head1:00000", "mine:00001"}


def test_values_that_are_not_numbers_are_not_projected(tmp_path: Path) -> None:
    picture = head_map()
    picture.values[:] = math.inf
    write(tmp_path, full_report(0, maps=(picture,)))
    assert not (tmp_path / "projector_config.pbtxt").exists()

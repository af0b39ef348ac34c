"""The index over an event file against TensorBoard's own readers, and on files that grow, change and break."""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, TaggedRunMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.util.tensor_util import make_ndarray

import attnprobe as ap
from attnprobe.logs import event_file
from attnprobe.logs.event_file import EventFile, numbers
from attnprobe.logs.probe_event import alarms_of
from attnprobe.report import StepReport
from attnprobe.writers import TensorBoardWriter, summaries
from attnprobe.writers.entry import Entry, string
from tests.logs.records import array, began, event, frame, probe, write
from tests.probe.models import batches, loss_of, net
from tests.reproducible import reproducible


def steps(file: EventFile) -> list[int]:
    return [each.step for each in file.events]


def test_all_that_a_training_wrote_is_found_where_tensorboard_finds_it(tmp_path: Path) -> None:
    model = net(heads=(2, 4))
    writers = [TensorBoardWriter(tmp_path)]
    with ap.AttentionProbe(model, every_n_steps=1, writers=writers, statistics="all", maps="*") as attention:
        for x in batches(3):
            loss = loss_of(model, x)
            loss.backward()
            attention.step(loss)
    (path,) = tmp_path.glob("*tfevents*")
    file = EventFile(path, verify=True)
    assert file.scan()
    assert not file.damage + file.refusal
    theirs = EventAccumulator(str(path), size_guidance={"tensors": 0, "scalars": 0, "images": 1})
    theirs.Reload()
    tags = [tag for tag in theirs.Tags()["tensors"] if tag.startswith("attnprobe/")]
    small = {f"attnprobe/{name}" for name in ("alarms", "layout", "loss")}
    assert {f"attnprobe/{name}" for each in file.events for name in each.arrays} == {*tags} - small
    assert len(tags) > 40
    for tag in {*tags} - small:
        expected = {each.step: make_ndarray(each.tensor_proto) for each in theirs.Tensors(tag)}
        for each in file.events:
            place = each.arrays[tag.removeprefix("attnprobe/")]
            (data,) = file.read([place])
            np.testing.assert_array_equal(numbers(data, place), expected.pop(each.step))
        assert not expected
    assert [each.loss for each in file.events] == [
        pytest.approx(make_ndarray(each.tensor_proto).item()) for each in theirs.Tensors("attnprobe/loss")
    ]
    texts = [make_ndarray(each.tensor_proto).item() for each in theirs.Tensors("attnprobe/alarms")]
    assert [*file.read(each.alarms for each in file.events if each.alarms)] == texts
    assert [len(alarms_of(text)) for text in texts] == [int(each.value) for each in theirs.Scalars("attention/alarms")]


RECORDS = [began(3.0), probe(-2, layout=True), event(0, array("mine", [1.0])), probe(1), probe(2**40)]


@given(st.lists(st.integers(0, sum(map(len, RECORDS)))), st.booleans())
@reproducible(60)
def test_a_file_that_grows_is_read_as_if_it_were_read_at_once(tmp_path: Path, cuts: list[int], hurry: bool) -> None:
    content = b"".join(RECORDS)
    path = write(tmp_path)
    file = EventFile(path, verify=True)
    for cut in (*sorted(cuts), len(content)):
        path.write_bytes(content[:cut])
        while not file.scan(-math.inf if hurry else math.inf):
            pass
        assert not file.damage + file.refusal
    assert steps(file) == [-2, 1, 2**40]
    assert file.began == 3.0


def test_one_record_is_read_however_late_it_is(tmp_path: Path) -> None:
    file = EventFile(write(tmp_path, *RECORDS))
    calls = next(calls for calls in range(1, 99) if file.scan(-math.inf))
    assert calls == len(RECORDS) + 1


def test_another_file_of_the_same_name_is_read_from_its_beginning(tmp_path: Path) -> None:
    file = EventFile(write(tmp_path, began(1.0), probe(1, layout=True), probe(2)))
    file.scan()
    places = [each.arrays["entropy"] for each in file.events]
    for other in ((began(2.0), probe(3, layout=True)), (began(2.5), *(probe(step, layout=True) for step in (4, 5, 6)))):
        write(tmp_path, *other)
        with pytest.raises(OSError, match="is not the file that it was"):
            list(file.read(places))
        file.scan()
        places = [each.arrays["entropy"] for each in file.events]
    assert steps(file) == [4, 5, 6]
    assert file.began == 2.5
    write(tmp_path)
    file.scan()
    assert (steps(file), file.began) == ([], math.inf)


def test_damage_is_tried_again(tmp_path: Path) -> None:
    """A file on a network may be longer for a moment than what is in it; the rest is zeros."""
    good = [began(), probe(1, layout=True)]
    zeros = bytes(len(probe(2)))
    path = write(tmp_path, *good, zeros)
    file = EventFile(path)
    for _ in range(2):
        assert file.scan()
        assert file.damage == f"{path} is damaged from byte {sum(map(len, good))} on; what follows is not read"
    write(tmp_path, *good, probe(2), probe(3))
    file.scan()
    assert (steps(file), file.damage) == ([1, 2, 3], "")


def test_a_damaged_array_is_seen_by_who_asks_for_checksums(tmp_path: Path) -> None:
    record = bytearray(event(1, *summaries.heads(big())))
    record[len(record) // 2] ^= 1
    assert len(record) > 4096
    for verify in (False, True):
        file = EventFile(write(tmp_path, began(), bytes(record)), verify=verify)
        file.scan()
        assert bool(file.damage) == verify


def big() -> StepReport:
    return StepReport(1, ("a",), (2000,), {"entropy": torch.rand(1, 2000)})


def test_other_programs_records_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = [
        Event(step=1, summary=Summary(value=[Summary.Value(tag="x", image=Summary.Image(encoded_image_string=b"1"))])),
        Event(step=1, summary=Summary(value=[Summary.Value(tag="attnprobe/alarms", simple_value=1)])),
        Event(step=1, graph_def=b"\xff" * 100),
        Event(step=1, tagged_run_metadata=TaggedRunMetadata(tag="attnprobe/alarms", run_metadata=b"\xff")),
    ]
    records = [frame(each.SerializeToString()) for each in foreign]
    records += [event(1, array("alarms", [1.0])), event(1, array("own", [[1.0]])), frame(bytes([27, 28]))]
    huge = frame(bytes([10, *[255] * 4000]))  # no message, and longer than what is read
    monkeypatch.setattr(event_file, "LONGEST", 4000)
    file = EventFile(write(tmp_path, began(), probe(0, layout=True), *records, huge, probe(1)), verify=True)
    assert file.scan()
    assert (steps(file), file.damage, file.refusal) == ([0, 1], "", "")


def test_a_record_of_four_exabytes_is_waited_for(tmp_path: Path) -> None:
    length = struct.pack("<Q", 2**62)
    file = EventFile(write(tmp_path, began(), length + frame(length)[-4:], bytes(100)))
    assert file.scan()
    assert not file.damage


def json_of(name: str, text: str) -> Entry:
    return Entry(f"attnprobe/{name}", "attnprobe", string(text), lambda: "Text.")


LAYOUT, NO_ALARMS = json_of("layout", '{"layers":["a"],"heads":[2]}'), json_of("alarms", "[]")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([json_of("alarms", "[1")], "JSONDecodeError"),
        ([json_of("alarms", "[" * 100_000)], "RecursionError"),
        ([json_of("alarms", "[1]")], "TypeError"),
        ([json_of("alarms", "3")], "TypeError"),
        ([NO_ALARMS, json_of("layout", "{}")], "KeyError: 'layers'"),
        ([NO_ALARMS, json_of("layout", '{"layers":["a"],"heads":[1e999]}')], "OverflowError"),
        ([NO_ALARMS, json_of("layout", '{"layers":["a"],"heads":[99999999999]}')], "1 layers, and"),
        ([NO_ALARMS, json_of("layout", '{"layers":["a"],"heads":[-1]}')], "1 layers, and"),
        ([NO_ALARMS, json_of("layout", '{"layers":["a"],"heads":[1,1]}')], "1 layers, and"),
        ([NO_ALARMS, array("entropy", [[[1.0]]])], r"entropy has shape \[1, 1, 1\]"),
        ([LAYOUT, NO_ALARMS, array("entropy", [[1.0]])], r"entropy has shape \[1, 1\], with \[2\] heads"),
        ([LAYOUT, NO_ALARMS, array("map/a/head0", [[1.0]])], "map/a/head0 has shape"),
        ([LAYOUT, NO_ALARMS, array("usage/a/head0", [[1.0]])], "usage/a/head0 has shape"),
    ],
)
def test_a_probe_that_holds_what_it_should_not_is_named(entries: list[Entry], said: str, tmp_path: Path) -> None:
    path = write(tmp_path, began(), probe(1, layout=True), event(7, *entries), probe(8))
    file = EventFile(path)
    for _ in range(2):
        assert file.scan()
        assert re.search(said, file.refusal)
        assert file.refusal.startswith(f"{path}, step 7: ")
    assert steps(file) == [1]


@given(st.data())
@reproducible(200)
def test_any_bytes_may_stand_in_a_file(tmp_path: Path, data: st.DataObject) -> None:
    """With sound frames, so that what is inside is looked at."""
    record = bytearray(probe(5, layout=True, alarms=("x",))[12:-4])
    for _ in range(data.draw(st.integers(1, 8))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    inside = data.draw(st.sampled_from([bytes(record), data.draw(st.binary())]))
    file = EventFile(write(tmp_path, frame(inside), inside))
    assert file.scan()
    for each in file.events:
        for place in each.arrays.values():
            (found,) = file.read([place])
            assert numbers(found, place).shape == place.shape


def test_a_file_that_is_gone_or_may_not_be_read_is_an_os_error(tmp_path: Path) -> None:
    file = EventFile(write(tmp_path, *RECORDS))
    file.scan()
    os.remove(file.path)
    with pytest.raises(OSError, match="No such file"):
        file.scan()
    with pytest.raises(OSError, match="No such file"):
        list(file.read([]))

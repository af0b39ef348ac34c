"""Event files of one directory as one run: however they come, the same as read at once and as a plain reference."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe.errors import LogError
from attnprobe.logs import read_run
from attnprobe.logs.episodes import Episodes
from attnprobe.logs.event_file import EventFile
from attnprobe.logs.events import EventSource
from attnprobe.report import Alarm, StepReport
from attnprobe.writers import summaries
from tests.logs.records import array, began, event, probe, write
from tests.reproducible import reproducible

#: step, value, names of the alarms.
Written = tuple[int, float, tuple[str, ...]]
PROBES = st.tuples(st.integers(0, 6), st.integers(0, 99).map(float), st.sampled_from([(), ("x",), ("x", "y")]))


def superseded(files: Sequence[Sequence[Written]]) -> list[Written]:
    """What stands: a probe after which no other of its step or of an earlier one was written."""
    everything = [each for file in files for each in file]
    return [
        each for index, each in enumerate(everything) if all(later[0] > each[0] for later in everything[index + 1 :])
    ]


def content(number: int, file: Sequence[Written]) -> list[bytes]:
    """The layout only in the first record, as the writer has it."""
    records = [probe(step, value, layout=not at, alarms=alarms) for at, (step, value, alarms) in enumerate(file)]
    return [began(float(number)), *records]


def episodes(found: EventSource | Episodes) -> list[tuple[object, ...]]:
    each = found.found if isinstance(found, Episodes) else found.episodes
    return [(e.first.name, e.first.step, e.last.step, e.peak.value, e.standing) for e in each]


def assert_is(source: EventSource, expected: Sequence[Written]) -> None:
    assert [each.step for each in source.probes] == [step for step, _, _ in expected]
    assert source.curve("entropy", "a", 0).tolist() == [value for _, value, _ in expected]
    alarms = [[Alarm(name, "a", (0,), step, step, value, 1.0, "") for name in names] for step, value, names in expected]
    assert episodes(source) == episodes(Episodes(alarms))


@given(st.lists(st.lists(PROBES, max_size=5), min_size=1, max_size=3), st.data())
@reproducible(60)
def test_steps_that_come_again_in_every_order_and_at_every_moment(
    tmp_path: Path, files: list[list[Written]], data: st.DataObject
) -> None:
    """Names are in another order than the files' beginnings."""
    for path in tmp_path.glob("*"):
        path.unlink()
    records = [content(number, file) for number, file in enumerate(files)]
    whole = [b"".join(each) for each in records]
    sizes = [0] * len(files)
    growing = EventSource(tmp_path, verify=True)
    while sizes != [len(each) for each in whole]:
        at = data.draw(st.sampled_from([i for i, each in enumerate(whole) if sizes[i] < len(each)]))
        sizes[at] = data.draw(st.integers(sizes[at] + 1, len(whole[at])))
        write(tmp_path, whole[at][: sizes[at]], name=f"tfevents.{9 - at}")
        if data.draw(st.booleans()):
            growing.refresh(data.draw(st.sampled_from([-math.inf, math.inf])))
    while not growing.refresh(-math.inf):
        pass
    at_once = EventSource(tmp_path)
    assert at_once.refresh()
    for source in (growing, at_once):
        assert_is(source, superseded(files))
    revision = growing.revision
    assert growing.refresh()
    assert growing.revision == revision
    assert revision != at_once.revision or not growing.probes


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_files_that_appear_late_vanish_and_are_exchanged(order: tuple[int, ...], tmp_path: Path) -> None:
    files = [[(step, float(step + number), ()) for step in range(number, 4)] for number in range(3)]
    source = EventSource(tmp_path)
    for count, number in enumerate(order, 1):
        write(tmp_path, *content(number, files[number]), name=f"tfevents.{number}")
        source.refresh()
        assert_is(source, superseded([files[each] for each in sorted(order[:count])]))
    write(tmp_path, *content(0, [(0, 50.0, ())]), name=f"tfevents.{order[0]}")
    (tmp_path / f"tfevents.{order[1]}").unlink()
    source.refresh()
    # Where both began at once the order is that of their names.
    left = [[(0, 50.0, ())], files[order[2]]]
    assert_is(source, superseded(left if order[2] else left[::-1]))


def test_a_layout_and_a_warning_of_a_superseded_step_hold_on(tmp_path: Path) -> None:
    """They are written where they change, and a step that is taken again in the same process changes nothing."""
    text = summaries.text("warnings", ["warning: look out"], "Warnings.")
    first = event(0, summaries.layout(StepReport(0, ("a",), (2,))), summaries.alarms(StepReport(0)), text)
    write(tmp_path, began(), first, probe(1, 5.0), probe(0, 6.0), probe(1, 7.0))
    source = EventSource(tmp_path)
    source.refresh()
    assert_is(source, [(0, 6.0, ()), (1, 7.0, ())])
    assert list(source.warnings) == ["look out"]


def test_a_probe_that_is_refused_costs_only_what_follows_in_its_file(tmp_path: Path) -> None:
    good = [began(1.0), probe(1, 1.0, layout=True), probe(2, 2.0)]
    wrong = event(3, summaries.alarms(StepReport(3)), array("entropy", [[1.0]]))
    path = write(tmp_path, *good, wrong, probe(4), name="tfevents.1")
    write(tmp_path, began(2.0), probe(3, 3.0, layout=True), name="tfevents.2")
    source = EventSource(tmp_path)
    for _ in range(3):
        assert source.refresh()
        assert_is(source, [(1, 1.0, ()), (2, 2.0, ()), (3, 3.0, ())])
        (problem,) = source.problems
        assert problem.startswith(f"{path}, step 3: ValueError: entropy has shape [1, 1]")
    with pytest.raises(LogError, match="step 3: ValueError: entropy"):
        read_run(tmp_path)
    write(tmp_path, *good, probe(5, 5.0), name="tfevents.1")
    write(tmp_path, began(2.0), probe(6, 6.0, layout=True), name="tfevents.2")
    source.refresh()
    assert source.problems == []
    assert_is(source, [(1, 1.0, ()), (2, 2.0, ()), (5, 5.0, ()), (6, 6.0, ())])


def test_a_file_exchanged_between_two_looks_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *content(0, [(1, 1.0, ("x",))]))
    source = EventSource(tmp_path)
    source.refresh()
    scan = EventFile.scan

    def exchanged(self: EventFile, deadline: float) -> bool:
        complete = scan(self, deadline)
        write(tmp_path, *content(1, [(7, 7.0, ("x",)), (8, 8.0, ("x", "y"))]))
        return complete

    write(tmp_path, *content(0, [(1, 1.0, ("x",)), (2, 2.0, ())]))
    with monkeypatch.context() as patch:
        patch.setattr(EventFile, "scan", exchanged)
        with pytest.raises(OSError, match="were changed while they were read"):
            source.refresh()
    assert_is(source, [])
    source.refresh()
    assert_is(source, [(7, 7.0, ("x",)), (8, 8.0, ("x", "y"))])


def test_what_is_no_event_file_is_named_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *content(0, [(1, 1.0, ())]))
    (tmp_path / "tfevents.directory").mkdir()
    os.mkfifo(tmp_path / "tfevents.pipe")
    (tmp_path / "tfevents.nowhere").symlink_to(tmp_path / "nothing")
    (tmp_path / "tfevents.empty").touch()
    odd = os.fsdecode(b"tfevents.\xff\n<b>")
    write(tmp_path, b"these are notes about our tfevents, in words", name=odd)
    source = EventSource(tmp_path)
    assert source.refresh()
    assert_is(source, [(1, 1.0, ())])
    assert source.problems == [f"{tmp_path / odd} is damaged from byte 0 on; what follows is not read"]

    def denied(self: EventFile, deadline: float) -> bool:
        raise PermissionError("denied")

    monkeypatch.setattr(EventFile, "scan", denied)
    (tmp_path / odd).unlink()
    (tmp_path / "tfevents.empty").unlink()
    assert source.refresh()
    assert_is(source, [(1, 1.0, ())])
    assert [problem.rpartition(": ")[2] for problem in source.problems] == ["denied"]


def test_an_array_that_changes_its_dimensions_is_left_out(tmp_path: Path) -> None:
    records = [event(2, summaries.alarms(StepReport(2)), array("entropy", [3.0])), probe(3, 3.0)]
    write(tmp_path, began(), probe(1, 1.0, layout=True), *records)
    source = EventSource(tmp_path)
    source.refresh()
    assert source.holds("entropy") == [0, 2]
    np.testing.assert_array_equal(source.curve("entropy", "a", 0), [1.0, math.nan, 3.0])
    assert [values is None for values in source.arrays("entropy", range(3))] == [False, True, False]


def test_reading_event_files_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path, *content(0, [(1, 1.0, ("x",))]))
    code = (
        "import sys; from pathlib import Path; from attnprobe.logs.events import EventSource\n"
        "from attnprobe.logs.logged import LoggedRun\n"
        "source = EventSource(Path(sys.argv[1])); source.refresh(); run = LoggedRun('', source)\n"
        "print(run['entropy'].tolist(), len(run.alarms), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[[1.0, 1.0]]] 1 False"


def test_a_large_file_is_indexed_in_little_memory_and_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, heads, probes = 12, 64, 30
    names = [f"statistic_{index}" for index in range(40)]
    values = torch.rand(layers, heads)
    path = tmp_path / "tfevents.1"
    with path.open("wb") as file:
        file.write(began())
        for step in range(probes):
            report = StepReport(
                step, tuple(map(str, range(layers))), (heads,) * layers, dict.fromkeys(names, values + step)
            )
            layout = [] if step else [summaries.layout(report)]
            file.write(event(step, *layout, summaries.alarms(report), *summaries.heads(report)))
    tracemalloc.start()
    source = EventSource(tmp_path)
    source.refresh()
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = path.stat().st_size
    assert size > 3_500_000
    assert kept < 0.15 * size
    assert most < kept + 4 * size / probes  # a record at a time
    read, pread = [], os.pread

    def counted(file: int, count: int, at: int) -> bytes:
        read.append(count)
        return pread(file, count, at)

    monkeypatch.setattr(os, "pread", counted)
    found = np.stack([each for each in source.arrays("statistic_7", range(probes)) if each is not None])
    np.testing.assert_array_equal(found, np.stack([(values + step).numpy() for step in range(probes)]))
    assert sum(read) <= 4 * layers * heads * probes + 100
    read.clear()
    np.testing.assert_array_equal(source.curve("statistic_7", "3", 5), found[:, 3, 5])
    assert sum(read) <= 4 * probes + 100

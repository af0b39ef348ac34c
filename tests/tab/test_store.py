"""The runs beneath a directory, as they appear, grow, are resumed, break and vanish."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.data_ingester import _parse_event_files_spec
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from attnprobe.logs.events import EventSource
from attnprobe.tensorboard_plugin import store as module
from attnprobe.tensorboard_plugin.places import places
from attnprobe.tensorboard_plugin.store import Store
from attnprobe.view.limits import Limits
from attnprobe.writers import TensorBoardWriter
from tests.tab.runs import alarm, report, table, write

NAME = "events.out.tfevents.1700000000.host.1.0"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is put off."""
    for name in ("REST", "PAUSE", "TIMES"):
        monkeypatch.setattr(module, name, 0.0)


def looked(*roots: Path, prefix: str = "") -> Store:
    store = Store(dict.fromkeys(roots, prefix))
    store.refresh()
    return store


def steps(store: Store) -> dict[str, list[int]]:
    return {name: run.steps.tolist() for name, run in store.runs.items()}


def runs_of_tensorboard(root: Path, name: str | None = None) -> set[str]:
    return set(EventMultiplexer().AddRunsFromDirectory(str(root), name).Runs())


def test_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    store = looked(tmp_path / "later")
    assert (store.runs, store.complete, store.problems) == ({}, True, [])
    before = store.revision
    store.refresh()
    assert store.revision == before
    write(tmp_path / "later" / "a", report(0))
    store.refresh()
    assert steps(store) == {"a": [0]}
    assert store.revision != before


def test_a_run_grows(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    store = Store({tmp_path: ""})
    revisions = set()
    for step in range(3):
        writer.write(report(step))
        writer._writer.flush()
        store.refresh()
        assert steps(store) == {".": list(range(step + 1))}
        revisions.add(store.revision)
        store.refresh()
        assert store.revision in revisions, "nothing has changed"
    assert len(revisions) == 3
    run = store.runs["."]
    writer.close()
    store.refresh()
    assert store.runs["."] is run, "what is kept for a run stays"


def test_a_resumed_run_has_no_step_twice_and_its_numbers_are_the_new_ones(tmp_path: Path) -> None:
    write(tmp_path, *(report(step, alarms=(alarm(step),) * (step == 4)) for step in range(6)))
    store = looked(tmp_path)
    run, limits = store.runs["."], Limits("entropy")
    limits.of(run)
    again = [report(step, heads=(4, 3)) for step in (3, 4, 5)]
    write(tmp_path, *again)
    store.refresh()
    assert steps(store) == {".": [0, 1, 2, 3, 4, 5]}
    assert store.runs["."] is run
    assert not run.alarms, "the one at step 4 was taken back"
    values = table([*map(report, range(3)), *again], "entropy")
    found = limits.of(run)
    assert [found["low"], found["high"]] == pytest.approx([values[values > 0].min(), values[values > 0].max()])


def test_a_half_written_event_is_read_when_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path, report(0), report(1))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 500, 30, 10, 0):
        path.write_bytes(whole[:size])
        store = looked(tmp_path)
        assert not store.problems
        assert not (run := store.runs.get(".")) or not run.source.problems
        path.write_bytes(whole)
        store.refresh()
        assert steps(store) == {".": [0, 1]}


def test_runs_that_are_removed_are_forgotten(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, report(0))
    store = looked(tmp_path)
    assert set(store.runs) == {"a", "b"}
    (tmp_path / "a").rename(tmp_path / "c")
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    store.refresh()
    assert (set(store.runs), store.problems) == ({"c"}, [])
    write(tmp_path / "b", report(7))
    store.refresh()
    assert steps(store) == {"c": [0], "b": [7]}
    (tmp_path / "b").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "b").write_text("a file now")
    store.refresh()
    assert steps(store) == {"c": [0]}
    assert set(store._sources) == {"c"}


def test_a_file_that_was_exchanged_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path / "run", *map(report, range(3)))
    write(tmp_path / "other", report(9))
    store = looked(tmp_path / "run")
    (path,), (other,) = (tmp_path / "run").iterdir(), (tmp_path / "other").iterdir()
    other.replace(path)
    store.refresh()
    store.refresh()
    assert steps(store) == {".": [9]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "logs"
    for name in (".", "a", "a/version_0", "b/deep/er", "sp ace/<b>&ü", "b.tfevents.dir"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / NAME).touch()
    (root / "empty").mkdir()
    (root / "text").mkdir()
    (root / "text" / "notes.txt").touch()
    outside = tmp_path / "outside" / "runs" / "x"
    outside.mkdir(parents=True)
    (outside / NAME).touch()
    (outside / "more").symlink_to(tmp_path / "outside" / "far")
    (tmp_path / "outside" / "far").mkdir()
    (tmp_path / "outside" / "far" / NAME).touch()
    (root / "linked").symlink_to(outside.parent)
    (root / "latest").symlink_to(root / "a")
    (root / "broken").symlink_to(root / "nowhere")
    return root


@pytest.mark.parametrize("prefix", [None, "group"])
def test_runs_are_named_as_tensorboard_names_them(tree: Path, prefix: str | None) -> None:
    store = looked(tree, prefix=prefix or "")
    assert set(store._sources) == runs_of_tensorboard(tree, prefix)
    assert {"latest/version_0", "linked/x/more"} <= {name.removeprefix("group/") for name in store._sources}


def test_links_in_circles_are_left(tree: Path, tmp_path: Path) -> None:
    before = set(looked(tree)._sources)
    (tree / "a" / "up").symlink_to(tree)
    (tree / "a" / "self").symlink_to(tree / "a")
    (tree / "b" / "self").symlink_to(tree / "b" / "self")
    (tree / "out").symlink_to(tmp_path)
    assert set(looked(tree)._sources) == before
    # Two that lead to each other: each is followed once.
    (tree / "b" / "to_a").symlink_to(tree / "a")
    (tree / "a" / "to_b").symlink_to(tree / "b")
    store = looked(tree)
    assert before < set(store._sources)
    assert len(store._sources) < 3 * len(before)
    assert store.complete


def test_a_directory_that_may_not_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    store = looked(tree)
    assert store.problems == [f"cannot read {tree / 'b' / 'deep'}: Permission denied"]
    assert "a" in store._sources
    revision = store.revision
    monkeypatch.undo()
    store._walk_again = 0
    store.refresh()
    assert not store.problems
    assert store.revision != revision


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("text")
    store = looked(tmp_path / "log")
    assert store.problems == [f"cannot read {tmp_path / 'log'}: Not a directory"]


def test_one_run_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refresh = EventSource.refresh

    def fail(source: EventSource, *rest: float) -> bool:
        if source.directory.name == "bad":
            raise RuntimeError("nobody thought of this")
        return refresh(source, *rest)

    monkeypatch.setattr(EventSource, "refresh", fail)
    for name in ("bad", "good"):
        write(tmp_path / name, report(0))
    store = looked(tmp_path)
    assert steps(store) == {"good": [0]}
    assert store.problems == ["bad: nobody thought of this"]
    monkeypatch.undo()
    store.refresh()
    assert (set(store.runs), store.problems) == ({"good", "bad"}, [])


def test_what_is_no_event_file_does_not_matter(tmp_path: Path) -> None:
    for name, content in (("text", b"no event file\n" * 9), ("zeros", bytes(999)), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / NAME).write_bytes(content)
    (tmp_path / "directory" / NAME).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / NAME)
    write(tmp_path / "good", report(0))
    store = looked(tmp_path)
    assert steps(store) == {"good": [0]}
    assert store.complete


def test_reading_takes_turns_and_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write(tmp_path / name, *map(report, range(4)))
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "TURN", 0.0)
    store = Store({tmp_path: ""})
    seen = []
    while not store.complete:
        assert len(seen) < 60
        revision = store.revision
        store.refresh()
        seen.append(steps(store))
        assert store.complete or seen[-1] == (seen[-2] if len(seen) > 1 else {}) or store.revision != revision
    assert seen[0] == {}
    ahead = max(len(each.get("a", ())) - len(each.get("c", ())) for each in seen)
    assert ahead == 1, "no run waits for another's end"
    assert steps(store) == {name: [0, 1, 2, 3] for name in "abc"}
    monkeypatch.undo()
    store.refresh()
    assert store.complete


def test_a_look_is_not_repeated_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST", 60.0)
    store = looked(tmp_path)
    write(tmp_path, report(0))
    store.refresh()
    assert not store.runs


def test_a_restarted_server_has_other_revisions(tmp_path: Path) -> None:
    write(tmp_path, report(0))
    assert looked(tmp_path).revision != looked(tmp_path).revision


def test_a_name_that_is_no_text_can_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a", report(0))
    try:
        os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff\xfe")
    except OSError:
        pytest.skip("this file system knows only text")
    assert steps(looked(tmp_path)) == {"\ufffd\ufffd": [0]}


class Flags:
    def __init__(self, spec: str) -> None:
        self.logdir_spec = spec


@pytest.mark.parametrize(
    "spec",
    [
        "/x/a", "a:/x/a", "one:/x/a,two:/x/b", "/x/a,/x/b,c:/x/c", "/x:y/a", "one:/x:y/a", "one:relative/a",
        "relative/b", "~/x", "one:~/x", "one:/x/a,two:/x/a", "a:b:/c",
    ],
)  # fmt: skip
def test_the_specification_of_many_directories_is_understood_as_tensorboard_does(spec: str) -> None:
    found, problems = places("", Flags(spec))
    expected = _parse_event_files_spec(spec)
    assert {str(path): name for path, name in found.items()} == {path: name or "" for path, name in expected.items()}
    assert not problems


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(path: Path) -> tuple[dict[Path, str], Iterable[str]]:
        return {path: ""}, []

    monkeypatch.chdir(tmp_path)
    assert places("runs/a", None) == one(tmp_path / "runs" / "a")
    assert places("~/runs", Flags("x:/y")) == one(Path.home() / "runs")
    assert places("~nobody-of-this-name/x", None) == one(tmp_path / "~nobody-of-this-name" / "x")
    assert places("", None) == places("", Flags("")) == places("", object()) == ({}, [])
    assert places("", Flags("a:/x,")) == ({Path("/x"): "a"}, []), "not where TensorBoard was started"
    found, (problem,) = places("", Flags("a:/x,b:gs://bucket/x,s3://bucket/y"))
    assert found == {Path("/x"): "a"}
    assert problem.startswith("the Attention tab reads local directories only, not gs://bucket/x, s3://bucket/y")

"""The Attention tab's server, asked as a browser asks through TensorBoard's own application."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
import threading
import tracemalloc
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
import torch
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client, TestResponse

from attnprobe.report import StepReport
from attnprobe.tensorboard_plugin import plugin as module
from attnprobe.tensorboard_plugin import store
from attnprobe.tensorboard_plugin.plugin import STATIC, AttentionPlugin
from tests.tab.runs import HOSTILE, eventful, head_map, report, table, write

ROOT = "/data/plugin/attnprobe"
#: What a browser makes of half a surrogate pair.
LONE, SENT = "h\ud800", "h\ufffd"
ODD_RUN = "a b/<script>&\"'#?=+%2F/ü\U0001f600\n"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REST", "PAUSE", "TIMES"):
        monkeypatch.setattr(store, name, 0.0)


class Tab:
    """A client of TensorBoard with nothing but this plugin."""

    def __init__(self, logdir: Path | str, prefix: str = "", **flags: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard brings along
            from tensorboard.backend.application import TensorBoardWSGI
        context = TBContext(logdir=str(logdir), flags=type("Flags", (), flags)())
        self.plugin = AttentionPlugin(context)
        self.prefix = prefix
        self.client = Client(TensorBoardWSGI([self.plugin], prefix))

    def get(self, route: str, **query: Any) -> TestResponse:
        return self.client.get(f"{self.prefix}{ROOT}/{route}?{urlencode(query)}")

    def json(self, route: str, **query: Any) -> Any:
        response = self.get(route, **query)
        assert response.status_code == 200, response.text
        assert response.mimetype == "application/json"
        return json.loads(response.data, parse_constant=pytest.fail)

    def array(self, route: str, **query: Any) -> tuple[dict[str, Any], np.ndarray]:
        response = self.get(route, **query)
        assert response.status_code == 200, response.text
        line, _, data = response.data.partition(b"\n")
        header = json.loads(line)
        return header, np.frombuffer(data, "<f4").reshape(header["shape"])

    def refused(self, route: str, **query: Any) -> tuple[int, str]:
        response = self.get(route, **query)
        assert 400 <= response.status_code < 500, response.text
        assert response.mimetype == "text/plain"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "\n" not in response.text
        return response.status_code, response.text


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    write(tmp_path / "a", *eventful())
    return tmp_path


def test_every_route_answers_what_was_logged(logdir: Path) -> None:
    tab = Tab(logdir)
    overview = tab.json("runs", known="")
    assert (overview["complete"], overview["problems"], overview["places"]) == (True, [], [str(logdir)])
    (about,) = overview["runs"]
    assert (about["name"], about["steps"]) == ("a", [each.step for each in eventful()])
    for name in about["names"]:
        expected = table(eventful(), name)
        header, values = tab.array("frames", run="a", name=name, start=1, stop=7)
        np.testing.assert_allclose(values, expected[1:7].astype(np.float32))
        assert header == {"shape": list(values.shape)}
        finite = expected[np.isfinite(expected)]
        found = tab.json("range", run="a", name=name)
        assert [found["low"], found["high"]] == pytest.approx([finite.min(), finite.max()])
    curves = tab.json("head", run="a", layer="h.0", head=1, points=50)
    expected = [None if math.isnan(value) else value for value in table(eventful(), "entropy")[:, 0, 1]]
    assert curves["entropy"]["values"] == pytest.approx(expected)
    assert curves["max_logit"]["steps"] == about["steps"]
    header, values = tab.array("map", run="a", layer="h.0", head=1, step=9)
    assert header == {"step": 8, "shape": [3, 3, 6]}
    np.testing.assert_array_equal(values[0], head_map(2, columns=6).attention)
    header, values = tab.array("usage", run="a", layer="h.0", head=1)
    assert header == {"steps": [0, 8, 12], "shape": [3, 6]}
    np.testing.assert_array_equal(values[1], head_map(2, columns=6).usage)


def test_nothing_is_told_twice(logdir: Path) -> None:
    tab = Tab(logdir)
    known = tab.json("runs")["revision"]
    assert tab.json("runs", known=known) == {"revision": known, "complete": True, "runs": None}
    write(logdir / "b", report(0))
    assert [run["name"] for run in tab.json("runs", known=known)["runs"]] == ["a", "b"]
    assert [run["name"] for run in Tab(logdir).json("runs", known=known)["runs"]] == ["a", "b"], "a restarted server"


def test_a_run_says_when_its_numbers_may_be_others(logdir: Path) -> None:
    def revisions(tab: Tab) -> dict[str, str]:
        return {run["name"]: run["revision"] for run in tab.json("runs")["runs"]}

    write(logdir / "b", report(0), report(1))
    tab = Tab(logdir)
    before = revisions(tab)
    write(logdir / "b", report(1))  # resumed: as many probes as before
    after = revisions(tab)
    assert before["a"] == after["a"]
    assert before["b"] != after["b"]
    assert not set(after.values()) & set(revisions(Tab(logdir)).values()), "a restarted server"


def test_a_thousand_runs_have_a_short_revision(tmp_path: Path) -> None:
    """It is sent back in the address, which may not be longer than 64 kB."""
    write(tmp_path / "one", report(0))
    for number in range(1000):
        shutil.copytree(tmp_path / "one", tmp_path / f"a quite descriptive name of a run, the {number}th")
    tab = Tab(tmp_path)
    while not (found := tab.json("runs"))["complete"]:
        pass
    assert len(found["runs"]) == 1001
    assert len(found["revision"]) < 100


@pytest.mark.parametrize("layers", [(HOSTILE, "", "x" * 400), (LONE, "<script>", "../../etc/passwd")])
def test_odd_names_come_back_as_they_were(layers: tuple[str, ...], tmp_path: Path) -> None:
    maps = tuple(head_map(seed, layer, 0) for seed, layer in enumerate(layers))
    reports = [report(step, heads=(1, 2, 1), layers=layers, maps=maps) for step in range(2)]
    write(tmp_path / ODD_RUN, *reports)
    tab = Tab(tmp_path)
    (about,) = tab.json("runs")["runs"]
    assert about["name"] == ODD_RUN
    assert about["layers"] == list(layers)
    assert sorted(about["maps"]) == sorted([layer, 0] for layer in layers)
    for row, layer in enumerate(layers):
        sent = layer.replace(LONE, SENT)
        found = tab.json("head", run=ODD_RUN, layer=sent, head=0, points=9)
        assert found["entropy"]["values"] == pytest.approx(table(reports, "entropy")[:, row, 0].tolist())
        _, values = tab.array("map", run=ODD_RUN, layer=sent, head=0, step=0)
        np.testing.assert_array_equal(values[0], head_map(row).attention)
        assert tab.get("usage", run=ODD_RUN, layer=sent, head=0).status_code == 200


GOOD: Mapping[str, dict[str, Any]] = {
    "frames": {"run": "a", "name": "entropy", "start": 0, "stop": 2},
    "range": {"run": "a", "name": "entropy"},
    "head": {"run": "a", "layer": "h.0", "head": 1, "points": 9},
    "map": {"run": "a", "layer": "h.0", "head": 1, "step": 0},
    "usage": {"run": "a", "layer": "h.0", "head": 1},
}


@pytest.mark.parametrize("route", GOOD)
def test_a_missing_argument_is_named(route: str, logdir: Path) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    assert tab.get(route, **GOOD[route]).status_code == 200
    for name in {*GOOD[route]} - {"points"}:
        rest = {key: value for key, value in GOOD[route].items() if key != name}
        assert tab.refused(route, **rest) == (400, f"the argument '{name}' is missing")


@pytest.mark.parametrize(
    ("route", "changes", "code", "said"),
    [
        ("frames", {"run": "b"}, 404, "there is no run 'b'"),
        ("frames", {"run": "<img src=x>"}, 404, "there is no run '<img src=x>'"),
        ("frames", {"run": "../a"}, 404, "there is no run '../a'"),
        ("frames", {"name": "entropi"}, 404, "Did you mean 'entropy'?"),
        ("frames", {"name": "map/h.0/head1"}, 404, "unknown statistic"),
        ("frames", {"start": "x"}, 400, "start must be a whole number"),
        ("frames", {"stop": "nan"}, 400, "stop must be a whole number"),
        ("frames", {"stop": "1.5"}, 400, "stop must be a whole number"),
        ("frames", {"stop": "9" * 5000}, 400, "stop must be a whole number"),
        ("range", {"name": ""}, 404, "unknown statistic ''"),
        ("head", {"head": "inf"}, 400, "head must be a whole number"),
        ("head", {"points": "many"}, 400, "points must be a whole number"),
        ("map", {"step": "nan"}, 400, "step must be a number, not NaN"),
        ("map", {"step": "soon"}, 400, "step must be a number"),
        ("map", {"head": "2"}, 404, "no pictures of this head were recorded"),
        ("map", {"head": "9" * 30}, 404, "no pictures of this head were recorded"),
        ("map", {"layer": "../.."}, 404, "no pictures of this head were recorded"),
        ("usage", {"head": "0"}, 404, "no usage of this head was recorded"),
    ],
)
def test_what_cannot_be_answered_is_said(
    route: str, changes: dict[str, str], code: int, said: str, logdir: Path
) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    found, text = tab.refused(route, **(GOOD[route] | changes))
    assert found == code
    assert said in text


@pytest.mark.parametrize("bytes_", [b"%ff%fe", b"%00", b"%ed%a0%80", b"a&a", b"&&=%", b"x" * 9000])
def test_any_bytes_may_be_asked(bytes_: bytes, logdir: Path) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    for route in GOOD:
        rest = "&".join(f"{key}={quote(str(value))}" for key, value in GOOD[route].items() if key != "run")
        response = tab.client.get(f"{ROOT}/{route}?{rest}&run={bytes_.decode()}")
        assert response.status_code in (200, 404)


@pytest.mark.parametrize("number", [10**30, -(10**30), 2**63, -1])
def test_numbers_beyond_the_run_are_no_error(number: int, logdir: Path) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    _, values = tab.array("frames", run="a", name="entropy", start=number, stop=number + 5)
    assert len(values) in (0, 4)
    assert tab.json("head", run="a", layer="h.0", head=number, points=number) == {}
    header, _ = tab.array("map", run="a", layer="h.0", head=1, step=number)
    assert header["step"] == (12 if number > 0 else 0)


def test_an_answer_has_a_largest_size(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    frame = 4 * 4 * 5
    monkeypatch.setattr(module, "MOST", 3 * frame)
    assert tab.get("frames", run="a", name="entropy", start=2, stop=5).status_code == 200
    code, text = tab.refused("frames", run="a", name="entropy", start=2, stop=6)
    assert code == 400
    assert "ask for" in text


@pytest.mark.parametrize("what", ["removed", "emptied", "replaced"])
def test_files_that_change_under_a_request(what: str, logdir: Path) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    for path in (logdir / "a").glob("*tfevents*"):
        if what == "removed":
            path.unlink()
        else:
            path.write_bytes(b"" if what == "emptied" else bytes(path.stat().st_size))
    for route, query in GOOD.items():
        tab.refused(route, **query)
    found = tab.json("runs")
    assert [run["steps"] for run in found["runs"]] == []


def test_the_range_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    def entropy(step: int, value: float) -> StepReport:
        values = table([report(step)], "entropy")[0, :, :1] * 0 + value
        return report(step, heads=(1, 1), statistics={"entropy": torch.tensor(values)})

    tab = Tab(tmp_path)
    write(tmp_path / "a", entropy(0, 1.0), entropy(1, 100.0), entropy(2, 2.0))
    tab.json("runs")
    assert tab.json("range", run="a", name="entropy") == {"low": 1, "high": 100, "positive": 1}
    write(tmp_path / "a", entropy(1, 0.5), entropy(2, 3.0))
    tab.json("runs")
    assert tab.json("range", run="a", name="entropy") == {"low": 0.5, "high": 3, "positive": 0.5}
    assert [*tab.array("frames", run="a", name="entropy", start=0, stop=9)[1][:, 0, 0]] == [1, 0.5, 3]


def test_ranges_of_runs_that_are_gone_are_not_kept(logdir: Path) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    tab.json("range", run="a", name="entropy")
    for name in ("x", "y"):
        tab.refused("range", run="a", name=name)
    assert [[*known] for known in tab.plugin._limits.values()] == [["entropy"]]
    shutil.rmtree(logdir / "a")
    tab.json("runs")
    gc.collect()
    assert len(tab.plugin._limits) == 0


def test_a_fault_of_ours_is_one_line_and_stands_in_the_log(
    logdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tab = Tab(logdir)
    monkeypatch.setattr(store.Store, "refresh", lambda self: {}["fault"])
    response = tab.get("runs")
    assert response.status_code == 404, "a lookup"
    monkeypatch.setattr(store.Store, "refresh", lambda self: 1 // 0)
    with caplog.at_level(logging.ERROR, "tensorboard"):
        response = tab.get("runs")
    assert (response.status_code, response.mimetype) == (500, "text/plain")
    assert response.text == "ZeroDivisionError: integer division or modulo by zero; see TensorBoard's log"
    assert "cannot be answered" in caplog.text
    with tab.plugin.store.lock:
        pass  # it was given back


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy", "/static"])
def test_the_pages_own_files(prefix: str, tmp_path: Path) -> None:
    tab = Tab(tmp_path, prefix)
    kinds = {".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
    for path in STATIC.rglob("*"):
        if path.is_file():
            response = tab.get(f"static/{path.relative_to(STATIC).as_posix()}")
            assert (response.status_code, response.mimetype) == (200, kinds[path.suffix])
            assert response.data == path.read_bytes()
    listing = json.loads(tab.client.get(f"{prefix}/data/plugins_listing").data)["attnprobe"]
    assert listing["loading_mechanism"] == {"type": "IFRAME", "module_path": f"{prefix}{ROOT}/static/index.js"}
    assert (listing["tab_name"], listing["enabled"]) == ("Attention", False)
    assert "./static/index.js" in tab.client.get(f"{prefix}/data/plugin_entry.html?name=attnprobe").text


@pytest.mark.parametrize(
    "path",
    [
        "", "nothing.js", "../plugin.py", "../../plugin.py", "..%2fplugin.py", "%2e%2e/plugin.py", "/etc/passwd",
        "//etc/passwd", "vendor", "vendor/", "vendor/../../plugin.py", "..\\plugin.py", "index.js%00", "index.js/x",
        "%ff", "static/../../plugin.py", "C:/windows",
    ],
)  # fmt: skip
def test_no_other_file_is_served(path: str, tmp_path: Path) -> None:
    tab = Tab(tmp_path)
    response = tab.client.get(f"{ROOT}/static/{path}")
    assert response.status_code == 404
    assert "import" not in response.text


def test_the_tab_is_active_once_there_is_a_probe(tmp_path: Path) -> None:
    tab = Tab(tmp_path / "later")
    assert not tab.plugin.is_active()
    write(tmp_path / "later" / "run", report(0))
    assert tab.plugin.is_active()


def test_the_list_of_tabs_does_not_wait_for_a_long_request(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.01)
    tab = Tab(logdir)
    tab.json("runs")
    with held(tab.plugin.store.lock):
        assert tab.plugin.is_active()


class held:
    """A lock in another thread."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.taken, self.done = lock, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)

    def hold(self) -> None:
        with self.lock:
            self.taken.set()
            self.done.wait(10)

    def __enter__(self) -> None:
        self.thread.start()
        self.taken.wait(10)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def test_many_browsers_at_once_while_a_run_grows(logdir: Path) -> None:
    tab = Tab(logdir)
    tab.json("runs")
    found: list[tuple[str, int]] = []

    def browse() -> None:
        for _ in range(12):
            for route, query in GOOD.items():
                found.append((route, tab.get(route, **query).status_code))
            found.append(("runs", tab.get("runs").status_code))
            tab.plugin.is_active()

    threads = [threading.Thread(target=browse) for _ in range(6)]
    for thread in threads:
        thread.start()
    for step in range(20, 30):
        write(logdir / "a", report(step))
    for thread in threads:
        thread.join()
    assert {code for _, code in found} == {200}
    assert len(found) == 6 * 12 * 6
    assert tab.json("runs")["runs"][0]["steps"][-10:] == list(range(20, 30))


def test_days_of_polling_need_no_more_memory(logdir: Path) -> None:
    tab = Tab(logdir)

    def poll(times: int) -> int:
        for number in range(times):
            known = tab.json("runs")["revision"]
            tab.json("runs", known=known)
            tab.plugin.is_active()
            for route, query in GOOD.items():
                tab.get(route, **query)
            tab.refused("range", run="a", name=f"unknown {number}")
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = poll(200)  # fills what Python and the test's own client keep
        assert poll(100) - before < 30_000
    finally:
        tracemalloc.stop()


def test_directories_by_name(tmp_path: Path) -> None:
    for name in "xyz":
        write(tmp_path / name / "run", report(0))
    spec = f"a:{tmp_path}/x,{tmp_path}/y,b:{tmp_path}/z/run"
    tab = Tab("", logdir_spec=spec)
    assert [run["name"] for run in tab.json("runs")["runs"]] == ["a/run", "b/.", "run"]
    assert tab.get("range", run="b/.", name="entropy").status_code == 200


def test_directories_elsewhere_are_a_problem_that_is_told() -> None:
    found = Tab("gs://bucket/runs").json("runs")
    assert (found["runs"], found["places"]) == ([], [])
    assert "gs://bucket/runs" in found["problems"][0]

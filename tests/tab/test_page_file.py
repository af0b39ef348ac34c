"""The report in one file: what is inside, read back without a browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import __version__
from attnprobe.errors import WriterError
from attnprobe.logs.logged import LoggedRun
from attnprobe.report import StepReport
from attnprobe.view import html
from attnprobe.view.bundle import STATIC, bundle
from attnprobe.view.html import page, write_page
from attnprobe.view.packing import BYTES, packed
from attnprobe.view.selection import PROBES
from tests.reproducible import reproducible
from tests.tab.runs import HOSTILE, alarm, eventful, head_map, kept, logged, report, table

#: Relative, of a number with sixteen bits behind its exponent.
ROUNDING = 2**-16
NAMES = ["entropy", "max_logit", "shared_dead_columns", "my/own", "own layer", "residual", "nonfinite/error"]


class Parts(HTMLParser):
    """Texts of a page by the element that they stand in, and the attributes of every element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside][-1] += data


def data_of(text: str) -> dict[str, Any]:
    return json.loads(Parts(text).texts["script"][0], parse_constant=pytest.fail)


def unpacked(packed: Mapping[str, Any]) -> np.ndarray:
    """As ``embedded.js`` does, byte by byte."""
    planes = zlib.decompress(base64.b64decode(packed["data"], validate=True))
    number = len(planes) // 3
    values = [
        struct.unpack("<f", bytes([0, planes[i], planes[number + i], planes[2 * number + i]]))[0] for i in range(number)
    ]
    return np.array(values).reshape(packed["shape"])


def key(*parts: Any) -> str:
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("source", ["reports", "events"])
def test_the_file_holds_the_run(source: str, tmp_path: Path) -> None:
    run = kept(eventful()) if source == "reports" else logged(tmp_path / "log", *eventful())
    write_page({"my run": run}, tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text("utf-8"))
    (about,) = data["overview"]["runs"]
    assert (about["name"], about["steps"]) == ("my run", [each.step for each in eventful()])
    assert about["loss"][3] is None
    assert set(about["names"]) == set(NAMES)
    for name in NAMES:
        expected = table(eventful(), name)
        np.testing.assert_allclose(unpacked(data["arrays"][key("my run", name)]), expected, rtol=ROUNDING)
    held = {("h.0", 0): [0], ("h.0", 1): [0, 8, 12], (HOSTILE, 0): [15]}
    assert sorted(map(tuple, about["maps"])) == sorted(held)
    assert data["maps"] == {key("my run", *where): steps for where, steps in held.items()}
    pictures = {("h.0", 1, 8): head_map(2, columns=6), (HOSTILE, 0, 15): head_map(4)}
    for (layer, head, step), picture in pictures.items():
        found = unpacked(data["arrays"][key("my run", "map", layer, head, step)])
        np.testing.assert_allclose(found, np.stack(picture.panels()), rtol=ROUNDING)
    usage = data["arrays"][key("my run", "usage", "h.0", 1)]
    assert usage["steps"] == [0, 8, 12]
    np.testing.assert_allclose(unpacked(usage)[1], head_map(2, columns=6).usage, rtol=ROUNDING)
    assert [each["name"] for each in about["alarms"]] == ["logit_explosion", "other"]
    assert data["note"] == f"attnprobe {__version__} · my run: 8 probes · numbers have five digits"


def round_trip(values: Sequence[float]) -> np.ndarray:
    return unpacked(packed(np.array(values, np.float32)))


@given(st.lists(st.floats(width=32), max_size=30))
@reproducible(300)
def test_five_digits_of_any_number_are_kept(values: list[float]) -> None:
    for found, value in zip(round_trip(values).tolist(), values, strict=True):
        if math.isnan(value) or math.isinf(value):
            assert found == pytest.approx(value, nan_ok=True)
        elif abs(value) >= 2.0**-126:
            assert abs(found - value) <= ROUNDING * abs(value)
        else:
            assert abs(found - value) <= 2.0**-141, "the smallest numbers have fewer digits"
            assert (found == 0) == (value == 0)
        assert math.isnan(value) or math.copysign(1, found) == math.copysign(1, value)


def test_numbers_at_the_ends() -> None:
    largest, smallest = 3.4028234663852886e38, 1.401298464324817e-45
    found = round_trip([largest, -largest, smallest, -smallest, math.inf, -math.inf, math.nan, 0.0, 1.0, -1.0])
    assert found[:2] == pytest.approx([largest, -largest], rel=ROUNDING)
    assert np.isfinite(found[:4]).all()
    assert found[2] > 0 > found[3]
    assert found[4:6].tolist() == [math.inf, -math.inf]
    assert math.isnan(found[6])
    assert found[7:].tolist() == [0, 1, -1]
    odd = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)  # NaN, but for their last bits infinite
    assert np.isnan(unpacked(packed(odd))).all()
    assert unpacked(packed(np.array([1e300, -1e-300]))).tolist() == [math.inf, 0.0], "no float32"


def test_of_a_long_run_the_ends_the_alarms_and_the_extremes_are_kept() -> None:
    reports = [report(step, heads=(2,), alarms=(alarm(step),) * (901 <= step <= 903)) for step in range(3000)]
    reports[1].statistics["entropy"][0, 1] = 1e5
    reports[-2].statistics["max_logit"][0, 0] = -1e5
    reports[77].layer["own layer"][0] = 1e5
    data = data_of(page({"a": kept(reports)}))
    (about,) = data["overview"]["runs"]
    steps = about["steps"]
    assert steps == sorted(set(steps))
    assert {0, 1, 77, 901, 903, 2998, 2999} <= set(steps)
    assert PROBES <= len(steps) < PROBES + 30
    assert max(np.diff(steps)) <= 2 * 3000 / PROBES
    assert f"a: {len(steps)} of 3000 probes" in data["note"]
    for name in ("entropy", "max_logit", "own layer"):
        values = table(reports, name)
        found = unpacked(data["arrays"][key("a", name)])
        np.testing.assert_allclose(found, values[steps], rtol=ROUNDING)
        assert [found.min(), found.max()] == pytest.approx([values.min(), values.max()], rel=ROUNDING)
    np.testing.assert_allclose(about["loss"], [reports[step].loss for step in steps], rtol=1e-8)


def many(heads: int, layers: int, probes: int, alarms: int = 0, maps: bool = False) -> LoggedRun:
    names = [f"h.{row}" for row in range(layers)]
    generator = torch.Generator().manual_seed(0)

    def numbers() -> dict[str, torch.Tensor]:
        return {f"statistic {index}": torch.randn(layers, heads, generator=generator) for index in range(30)}

    pictured = tuple(head_map(1, layer, head, 64) for layer in names for head in range(heads)) if maps else ()
    return kept(
        [
            StepReport(
                step, tuple(names), (heads,) * layers,
                numbers(),
                alarms=tuple(alarm(step, f"rule {step}", names[-1]) for _ in range(alarms)),
                maps=pictured if step % 5 == 0 else (),
            )
            for step in range(probes)
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"heads": 12, "layers": 12, "probes": 1500}, 5),
        ({"heads": 64, "layers": 96, "probes": 60, "alarms": 1}, 42),
        ({"heads": 16, "layers": 24, "probes": 12, "maps": True}, 12),
    ],
    ids=["long", "large, an alarm at every probe", "a map of every head"],
)
def test_a_file_has_a_largest_size(options: dict[str, int], most: float) -> None:
    run = many(**options)
    text = page({"a": run})
    print(f"\n{run}: {len(text) / 2**20:.1f} MB")
    assert len(text) < most * 2**20


def test_where_not_all_maps_fit_those_of_alarms_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, usage = 3 * 3 * 4 * BYTES, 4 * BYTES
    monkeypatch.setattr(html, "PICTURES", 2 * (picture + usage))
    maps = tuple(head_map(head, "h.1", head) for head in range(3))
    standing = alarm(0, layer="h.1")
    run = kept([report(0, maps=maps, alarms=(standing.from_dict({**standing.to_dict(), "heads": [2]}),))])
    data = data_of(page({"a": run}))
    assert data["overview"]["runs"][0]["maps"] == [["h.1", 2], ["h.1", 0]]
    assert set(data["maps"]) == {key("a", "h.1", 2), key("a", "h.1", 0)}
    assert "maps of 2 of 3 heads" in data["note"]


def test_runs_stand_side_by_side_by_the_names_that_they_were_given() -> None:
    runs = {name: kept([report(step) for step in steps]) for name, steps in (("x/a", (1, 2)), ("x/b", (3,)))}
    data = data_of(page(runs))
    assert [(about["name"], about["steps"]) for about in data["overview"]["runs"]] == [("x/a", [1, 2]), ("x/b", [3])]
    assert data["title"] == "Attention: x/a, x/b"
    assert "x/a: 2 probes; x/b: 1 probes" in data["note"]


@pytest.mark.parametrize("reports", [[], [StepReport(3, invalid="nothing ran")]])
def test_a_run_without_a_number(reports: list[StepReport]) -> None:
    data = data_of(page({"a": kept(reports)}))
    assert data["arrays"] == data["maps"] == {}
    assert data["overview"]["runs"][0]["steps"] == [each.step for each in reports]
    assert data_of(page({}))["overview"]["runs"] == []


EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> \u2028 ]]> {title} \ud800"


def test_no_name_breaks_out_of_the_data(tmp_path: Path) -> None:
    calm = page({"a": kept([report(0)])})
    evil = report(
        0, layers=(EVIL, "b"), warnings=(EVIL,), notes=(EVIL,), alarms=(alarm(0, EVIL, EVIL),),
        statistics={EVIL: torch.ones(2, 3)}, maps=(head_map(0, EVIL, 0),),
    )  # fmt: skip
    write_page({EVIL: kept([evil, StepReport(1, invalid=EVIL)])}, tmp_path / "page.html", title=EVIL)
    text = (tmp_path / "page.html").read_text("utf-8")
    parts = Parts(text)
    assert parts.elements == Parts(calm).elements
    assert "<" not in parts.texts["script"][0]
    assert parts.texts["script"][1:] == Parts(calm).texts["script"][1:]
    assert parts.texts["title"] == [EVIL.replace("\ud800", "?")]
    data = data_of(text)
    (about,) = data["overview"]["runs"]
    assert (data["title"], about["name"], about["layers"]) == (EVIL, EVIL, [EVIL, "b"])
    # Javascript writes half a surrogate pair as an escape.
    assert list(data["maps"]) == [key(EVIL, EVIL, 0).replace("\ud800", "\\ud800")]


def test_the_page_asks_for_nothing() -> None:
    text = page({"a": kept(eventful())})
    parts = Parts(text)
    assert not [
        (tag, name) for tag, attributes in parts.elements for name in attributes if name in ("src", "href", "action")
    ]
    code = [*parts.texts["script"][1:], *parts.texts["style"]]
    for script in code:
        bare = re.sub(r"/\*.*?\*/|(?<!:)//[^\n]*", "", script, flags=re.DOTALL)
        assert not re.findall(r"https?:[^\s]*|@import|url\((?!data:)|importScripts|XMLHttpRequest|WebSocket", bare)
        assert not re.findall(r"</(?:script|style)", script)
    assert "default-src 'none'" in text
    assert "fetch(" not in code[-2]


def test_every_module_is_bundled_once_after_those_that_it_needs() -> None:
    text = bundle("report.js")
    order = re.findall(r'^modules\["([\w.]+)"\] = ', text, re.MULTILINE)
    assert order[-1] == "report.js"
    needed, waiting = set(), ["report.js"]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        source = (STATIC / name).read_text("utf-8")
        found = re.findall(r'from\s+"\./([^"]+)"', source)
        assert len(found) == len(re.findall(r"^import\b", source, re.MULTILINE))
        assert all(other in order[: order.index(name)] for other in found)
        waiting += set(found) - needed
    assert Counter(order) == Counter(needed)
    ours = {path.name for path in STATIC.glob("*.js")} - {"index.js", "server.js"}
    assert set(order) == ours, "a module that no page needs"
    assert not re.search(r"^\s*(import|export)\b", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
def test_the_bundle_is_javascript_and_reads_what_was_packed(tmp_path: Path) -> None:
    text = bundle("report.js")
    (tmp_path / "bundle.js").write_text(text, "utf-8")
    done = subprocess.run(["node", "--check", tmp_path / "bundle.js"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = Parts(page({"my run": kept(eventful())})).texts["script"][0]
    (tmp_path / "data.json").write_text(data, "utf-8")
    ask = f"""
    import {{ readFileSync }} from "node:fs";
    import {{ Embedded }} from "{(STATIC / "embedded.js").as_uri()}";
    const source = new Embedded(JSON.parse(readFileSync("data.json", "utf8")));
    const layer = {json.dumps(HOSTILE)};
    const found = {{
      entropy: [...await source.frames("my run", "entropy", 0, 8)].map(String),
      head: (await source.head("my run", "h.0", 1)).entropy.values.map(String),
      map: (await source.map("my run", layer, 0, 99)).step,
      usage: (await source.usage("my run", "h.0", 1)).steps,
    }};
    console.log(JSON.stringify(found));
    """
    (tmp_path / "ask.mjs").write_text(ask, "utf-8")
    done = subprocess.run(["node", "ask.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = table(eventful(), "entropy")
    np.testing.assert_allclose([float(value) for value in found["entropy"]], expected.ravel(), rtol=ROUNDING)
    np.testing.assert_allclose([float(value) for value in found["head"]], expected[:, 0, 1], rtol=ROUNDING)
    assert (found["map"], found["usage"]) == (15, [0, 8, 12])


@pytest.mark.parametrize("path", ["nowhere/page.html", ".", "file/page.html", "nul\0l.html", "x" * 300])
def test_a_path_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriterError, match=r"cannot write .*; pass a file that may be written"):
        write_page({"a": kept([report(0)])}, tmp_path / path)


def test_a_home_that_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriterError, match=r"cannot write ~nobody-of-this-name/page\.html"):
        write_page({}, "~nobody-of-this-name/page.html")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_page({}, "~/page.html")
    assert (tmp_path / "page.html").exists()

"""What a notebook shows of a report: well-formed, harmless, bounded, and the same numbers."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sample_reports import HOSTILE, alarm, every_kind, full_report, head_map

import attnprobe
from attnprobe.catalog import STATISTICS
from attnprobe.report import StepReport
from attnprobe.writers.columns import number
from attnprobe.writers.console import COLUMNS
from attnprobe.writers.heatmap import head_picture
from attnprobe.writers.notebook import LINES, MAPS, PICTURES, ROWS
from attnprobe.writers.text import printable

TAGS = {
    "div", "p", "b", "br", "code", "details", "summary", "ul", "li", "figure", "img", "figcaption",
    "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
ATTRIBUTES = {"style", "class", "title", "alt", "src", "open", "cellpadding"}


class Page(HTMLParser):
    """The elements of a page; an unclosed or unexpected tag fails the test."""

    def __init__(self, report: StepReport) -> None:
        super().__init__()
        self.source = report._repr_html_()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.folds: dict[str, bool] = {}
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "details":
            self._unfolded = ("open", None) in attrs
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open[-1] == "summary":
            self.folds[data] = self._unfolded

    def pictures(self) -> dict[str, np.ndarray]:
        """alt -> pixels"""
        head = "data:image/png;base64,"
        names = [value or "" for tag, name, value in self.attributes if (tag, name) == ("img", "alt")]
        sources = [value or "" for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(source.startswith(head) for source in sources)
        images = [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(head)))) for source in sources]
        return dict(zip(names, map(np.asarray, images), strict=True))


@pytest.mark.parametrize("report", every_kind(), ids=lambda report: str(report.step))
def test_every_report_is_static_well_formed_html(report: StepReport) -> None:
    page = Page(report)
    assert "cannot be drawn" not in page.text
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    assert not any("http" in (value or "") or "url(" in (value or "") for _, _, value in page.attributes)
    assert page.source.encode() == page.source.encode("ascii", "xmlcharrefreplace"), "no invisible characters"
    assert f"step {report.step}" in page.text


def test_the_tables_hold_the_numbers_of_the_report() -> None:
    report = full_report(3)
    heads, layers = Page(report).tables
    assert heads[0] == ["layer", "head", *report.statistics]
    assert heads[1:] == [
        [row["layer"], str(row["head"]), *(number(row[name]) for name in report.statistics)] for row in report.rows()
    ]
    assert layers[0] == ["layer", "heads", *report.layer]
    assert layers[2] == [report.layers[1], "2", *(number(float(values[1])) for values in report.layer.values())]


def test_names_are_text_wherever_they_stand() -> None:
    page = Page(every_kind()[9])
    shown = printable(HOSTILE)
    assert "<script" not in page.source
    assert HOSTILE not in page.text
    # Alarm (name, layer), warning, note, caption with both ends, picture, and its row, name and column in the tables.
    assert page.text.count(shown) >= 10
    assert "mathjax_ignore" in page.source, "dollar signs in a name are no formula"


def test_the_first_line_says_what_this_is_and_whether_it_counts() -> None:
    first = Page(full_report(7)).text
    assert first.startswith("attnprobe, step 7: 3 layers, 9 heads, loss 2.5, valid")
    invalid = Page(StepReport(5, invalid="no backward <ran>")).text
    assert invalid == "attnprobe, step 5: 0 layers, 0 heads, loss -, not measured: no backward <ran>"


def test_findings_stand_before_information_and_say_what_to_do() -> None:
    known = dataclasses.replace(alarm(2, name="sink_formation"), severity="information")
    quiet = dataclasses.replace(alarm(2, name="dead_head"), snoozed=True)
    counts = {"query": torch.zeros(3, 4), "error": torch.tensor([[0.0, 7, 0, math.nan], [0, 0, 2, 0], [0] * 4])}
    report = full_report(2, alarms=(known, alarm(2), quiet), warnings=("h.3 unseen",), nonfinite=counts)
    page = Page(report)
    kinds = ("alarm: logit_explosion", "alarm, snoozed: dead_head", "information: sink_formation")
    places = [page.text.index(kind) for kind in kinds]
    assert places == sorted(places)
    assert "transformer.h.0.attn heads 0, 2" in page.text
    assert "123.5 against a threshold of 50. Lower the learning rate." in page.text
    assert "9 elements of error were NaN or infinite" in page.text
    assert "elements of query" not in page.text
    assert page.folds == {
        "warnings (2)": False,
        "notes (1)": False,
        "all heads": False,
        "all layers": False,
    }


def test_a_heat_map_has_one_cell_per_head_and_says_its_range() -> None:
    values = torch.tensor([[0.5, 0.25, 1.0, 0.0], [1.0, math.nan, math.nan, math.nan]], dtype=torch.float64)
    report = StepReport(0, ("a", "b"), (4, 1), {"sink_mass": values, "max_logit": values - 0.5})
    page = Page(report)
    pictures = page.pictures()
    assert list(pictures) == ["max_logit", "sink_mass"], "in the order of the console's columns"
    picture, margin, cell = pictures["sink_mass"], 12, 64
    assert picture.shape == (2 * cell + 2 * margin + 30, 4 * cell + 2 * margin, 3)
    colours = picture[margin + cell // 2 :: cell, margin + cell // 2 :: cell][:2, :4].tolist()
    dark, light, grey = [68, 1, 84], [253, 231, 37], [176] * 3
    assert colours[0][2:] == [light, dark]
    assert colours[1] == [light, grey, grey, grey]
    assert pictures["max_logit"][margin + 5, margin + 5].min() > 240, "signed values: zero is white"
    assert STATISTICS["sink_mass"].meaning in page.text
    assert "highest 1: a head 2" in page.text
    assert "lowest 0: a head 3" in page.text
    assert "lowest -0.5: a head 3" in page.text


def test_what_an_alarm_looks_at_comes_first_and_own_statistics_come_too() -> None:
    found = dataclasses.replace(alarm(), reads=("value_rms", "key_norm", "not measured"))
    statistics = dict(full_report().statistics)
    own = full_report(statistics=statistics | {"mine": statistics["entropy"]}, alarms=(found,))
    assert list(Page(own).pictures()) == ["value_rms", *COLUMNS, "mine"]
    others = [name for name in statistics if name not in COLUMNS]
    rest = full_report(statistics={name: statistics[name] for name in others})
    assert list(Page(rest).pictures()) == others[:PICTURES]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-300])
def test_any_value_can_be_shown(value: float) -> None:
    page = Page(StepReport(0, ("a",), (2,), {"entropy": torch.tensor([[value, math.nan]], dtype=torch.float64)}))
    assert page.tables[0][1:] == [["a", "0", number(value)], ["a", "1", "-"]]
    if math.isnan(value):
        assert "not measured" in page.text
    else:
        assert f"lowest {number(value)}: a head 0" in page.text


def test_one_head_is_a_table_and_no_picture() -> None:
    page = Page(full_report(heads=(1,)))
    assert page.pictures() == {}
    assert page.folds["all heads"]


def test_recorded_maps_are_shown() -> None:
    [picture] = Page(full_report(heads=(1,), maps=(head_map(head=3),))).pictures().values()
    np.testing.assert_array_equal(picture, head_picture(head_map(head=3)))


def test_the_largest_report_stays_small_and_fast() -> None:
    report = full_report(
        heads=(64,) * 48,
        maps=tuple(head_map(head=head) for head in range(64)),
        alarms=tuple(alarm(name=f"rule_{index}") for index in range(500)),
        warnings=tuple(map(str, range(1000))),
    )
    report._repr_html_()  # imports
    took = []
    for _ in range(3):
        start = time.perf_counter()
        source = report._repr_html_()
        took.append(time.perf_counter() - start)
    assert min(took) < 0.3
    assert len(source) < 1_000_000
    page = Page(report)
    assert len(page.tables[0]) == 1 + ROWS
    for hidden, where in (
        (48 * 64 - ROWS, "report.to_frame()"),
        (64 - MAPS, "report.maps"),
        (500 - LINES, "report.alarms"),
        (1000 - LINES, "report.warnings"),
    ):
        assert f"{hidden} more: see {where}" in page.text


def test_a_report_that_cannot_be_drawn_is_shown_as_text_with_the_reason() -> None:
    page = Page(StepReport(0, ("a<b>", "c"), (2, 2), {"entropy": torch.zeros(1, 1)}))
    assert page.text.startswith("This report cannot be drawn: IndexError")
    assert "a<b>" in page.text


def test_an_analyzed_batch_shows_itself() -> None:
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    report = attnprobe.analyze(model, lambda: model(x, x, x, need_weights=False)[0].square().mean(), maps="*")
    page = Page(report)
    assert list(page.pictures())[-2:] == [f"{picture.layer} head {picture.head}" for picture in report.maps]
    assert [row[:2] for row in page.tables[0][1:]] == [[report.layers[0], "0"], [report.layers[0], "1"]]


def test_a_report_costs_nothing_until_it_is_shown() -> None:
    code = "import sys, attnprobe.report\nprint(*(name for name in sys.modules if 'attnprobe.writers' in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

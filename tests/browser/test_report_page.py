"""The report in one file, opened from the disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from attnprobe.cli import main
from attnprobe.logs import read_logs
from attnprobe.view.html import write_page
from attnprobe.writers import JSONLWriter
from attnprobe.writers.heatmap import _VIRIDIS
from tests.browser.runs import HEADS, LAYERS, Runs
from tests.browser.test_tab import STAT, assert_colours, ends, shown, table
from tests.browser.test_tab_growth import assert_harmless, hostile_run
from tests.browser.test_tab_growth import report as small_report
from tests.browser.view import View

Open = Callable[..., View]


@pytest.fixture(scope="module")
def report(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command."""
    path = tmp_path_factory.mktemp("report") / "a name with spaces.html"
    assert main(["report", str(runs.directory), "--html", str(path)]) == 0
    return path


def test_it_shows_the_same_numbers(report: Path, opened: Open, runs: Runs) -> None:
    view = opened(report)
    assert view.panels() == ["fast", "slow"]
    low, high = ends(runs)
    for probe in (19, 5):
        view.slide(probe)
        for run in runs.reports:
            place = (table(runs, run, probe) - low) / (high - low)
            assert_colours(view.colours(run, len(LAYERS), HEADS), place, _VIRIDIS)
    view.click("fast", 1, 2)
    for name, texts in view.values().items():
        if name != "residual":
            expected = [table(runs, run, 5, name)[1, 2] for run in ("fast", "slow")]
            assert [shown(text) for text in texts] == pytest.approx(expected, rel=1e-3)
    assert view.frame.locator(".figures .figures figure").count() == 6
    assert view.frame.locator("canvas[aria-label^='usage']").count() == 2


def test_its_address_brings_the_view_back(report: Path, opened: Open) -> None:
    view = opened(report, f"stat=max_logit&step=30&layer={LAYERS[0]}&head=1")
    view.frame.wait_for_selector(".grid .one canvas")
    assert view.settled().step() == "step 30"
    assert view.text(".head-view h2") == f"{LAYERS[0]} · head 1"
    view.choose(STAT)
    assert f"stat={STAT}" in view.place()


def test_alarms_and_the_dark_theme(report: Path, opened: Open) -> None:
    view = opened(report)
    view.frame.locator(".alarms button").first.click()
    view.frame.wait_for_selector(".grid .one canvas")
    assert view.frame.locator("#stat").input_value() == "logit_spread"
    view.frame.locator(".theme").click()
    assert view.settled().evaluate("document.documentElement.className") == "dark"


def test_it_prints(report: Path, opened: Open, tmp_path: Path) -> None:
    """On paper: light, without buttons, nothing wider than the page."""
    view = opened(report, f"layer={LAYERS[1]}&head=1")
    view.frame.wait_for_selector(".grid .one canvas")
    view.page.set_viewport_size({"width": 760, "height": 1100})
    view.page.emulate_media(media="print")
    view.settled()
    assert view.frame.locator(".timeline button").first.is_hidden()
    assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    printed = view.page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert printed.startswith(b"%PDF")


def test_hostile_names_are_text(tmp_path: Path, opened: Open) -> None:
    hostile_run(tmp_path)
    write_page(read_logs(tmp_path, pictures=True), tmp_path / "report.html")
    assert_harmless(opened(tmp_path / "report.html"))


def test_two_runs_compared(runs: Runs, tmp_path: Path, opened: Open) -> None:
    places = [str(runs.directory / name) for name in ("slow", "fast")]
    assert main(["report", "--compare", *places, "--html", str(tmp_path / "both.html")]) == 0
    assert sorted(view_name.rsplit("/", 1)[-1] for view_name in opened(tmp_path / "both.html").panels()) == [
        "fast",
        "slow",
    ]


def test_a_step_without_numbers_says_so(tmp_path: Path, opened: Open) -> None:
    writer = JSONLWriter(tmp_path)
    for step, value in enumerate((0.5, math.nan)):
        writer.write(small_report(step, value))
    write_page(read_logs(tmp_path), tmp_path / "report.html")
    view = opened(tmp_path / "report.html")
    assert "Nothing was measured at this step." in view.text(".ranking")
    assert "not measured" in view.hover("attention.jsonl", 0, 1)
    view.slide(0)
    assert view.all_text(".ranking .value") == ["0.5", "0.5"]


def test_it_works_without_a_network(report: Path, browser: Browser, page: Page) -> None:
    context = browser.new_context(offline=True)
    offline = context.new_page()
    offline.goto(report.as_uri())
    View(offline, offline.main_frame).ready()
    assert offline.locator(".panel canvas").count() == 2
    context.close()

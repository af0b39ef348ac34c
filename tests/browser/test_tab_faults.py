"""What a first look at sick, odd or growing runs must not get wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page

import attnprobe as ap
from attnprobe.logs import read_logs
from attnprobe.report import Alarm, StepReport
from attnprobe.view.html import write_page
from benchmarks.tab.server import tensorboard
from tests.browser.test_tab import shown
from tests.browser.view import View

Open = Callable[..., View]
LIGHT_MISSING = [184, 188, 194]
LONG = np.random.default_rng(0).uniform(0.1, 0.9, (1500, 3))  # [steps, heads]


def report(step: int, values: list[float], name: str = "entropy", **changes: object) -> StepReport:
    """One layer ``a``."""
    table = torch.tensor([values], dtype=torch.float64)
    return StepReport(step, **({"layers": ("a",), "heads": (len(values),), "statistics": {name: table}} | changes))  # type: ignore[arg-type]


def written(directory: Path, *reports: StepReport) -> None:
    writer = ap.TensorBoardWriter(directory)
    for each in reports:
        writer.write(each)
    writer.close()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``wide`` and ``slim`` differ in heads, steps and statistics; ``long`` has more probes than a curve has points."""
    directory = tmp_path_factory.mktemp("odd")
    alarm = Alarm("logit_explosion", "a", (0,), 7, 7, math.inf, 250.0, "Lower it.", reads=("entropy",))
    written(
        directory / "wide",
        *(report(step, [0.001 * 10**step, 2.0, 3.0, math.nan]) for step in range(7)),
        report(7, [math.inf, -math.inf, 0.5, math.nan], alarms=(alarm,)),
    )
    written(directory / "slim", *(report(step, [1.0, 2.0]) for step in (5, 9)))
    written(directory / "named", report(0, [0.25, 0.5], "constructor"))
    written(directory / "long", *(report(step, values) for step, values in enumerate(LONG.tolist())))
    with tensorboard(directory) as address:
        yield address


def test_infinite_numbers_keep_their_sign(odd: str, tab: Open) -> None:
    view = tab(odd, "run=wide&layer=a&head=0")
    view.frame.wait_for_selector(".grid .one canvas")
    assert view.values() == {"entropy": ["∞"]}
    assert "∞ against 250" in view.text(".own")
    view.click("wide", 0, 1)
    assert view.values() == {"entropy": ["−∞"]}


def test_runs_without_that_head_are_left_out(odd: str, tab: Open) -> None:
    view = tab(odd, "run=wide&run=slim&layer=a&head=2&step=6")
    view.frame.wait_for_selector(".grid .one canvas")
    assert view.values() == {"entropy": ["3"]}
    assert view.all_text(".problem") == []
    view = tab(odd, "run=wide&layer=a&head=99")
    assert "no such head" in view.text(".head-view")


def test_a_comparison_says_with_what(odd: str, tab: Open) -> None:
    view = tab(odd, "run=wide&run=slim&base=3&step=6")
    assert "compared with step 3" in view.panel("wide").inner_text()
    assert "nothing to compare with" in view.panel("slim").inner_text()
    view = tab(odd, "run=wide&run=slim&base=8&step=9")
    assert "compared with step 5" in view.panel("slim").inner_text()
    assert "since step 5" in view.hover("slim", 0, 1)


def test_an_address_of_something_else(odd: str, tab: Open) -> None:
    view = tab(odd, "run=gone&stat=lost&head=-3&layer=a&step=NaN&order=x")
    assert view.all_text(".problem") == ["There is no run gone.", "There is no statistic lost in these runs."]


def test_a_statistic_named_like_what_every_object_has(odd: str, tab: Open) -> None:
    view = tab(odd, "run=wide&run=named&layer=a&head=1&stat=constructor")
    view.frame.wait_for_selector(".grid .one canvas")
    assert view.values()["constructor"] == ["0.5"]


def test_the_curve_follows_the_choice_of_a_logarithm(odd: str, tab: Open) -> None:
    view = tab(odd, "run=wide&layer=a&head=0&log=0")
    view.frame.wait_for_selector(".main canvas")
    picture = "document.querySelector('.main canvas').toDataURL()"
    before = view.settled().evaluate(picture)
    view.frame.get_by_label("logarithmic").check()
    assert view.settled().evaluate(picture) != before


def test_numbers_between_the_points_of_a_curve_are_exact(odd: str, tab: Open) -> None:
    view = tab(odd, "run=long&layer=a&head=2")
    view.frame.wait_for_selector(".grid .one canvas")
    for step in range(701, 706):
        view.slide(step)
        view.wait("!document.querySelector('.values').textContent.includes('…')")
        assert shown(view.values()["entropy"][0]) == pytest.approx(LONG[step, 2], rel=1e-3)


def test_no_pattern_hangs_the_page(tmp_path: Path, tab: Open) -> None:
    written(tmp_path / "r", report(0, [0.5], layers=("a" * 80,)))
    with tensorboard(tmp_path) as address:
        began = time.monotonic()
        view = tab(address, "layers=" + "*a" * 15 + "*b")
        assert "no layer's name matches" in view.panel("r").inner_text()
        assert time.monotonic() - began < 10
        view.frame.get_by_label("filter of layers").fill("a*a*a")
        assert "1 layers" in (view.settled().panel("r").locator("canvas").get_attribute("aria-label") or "")


def test_a_growing_run_neither_flashes_nor_takes_the_focus(tmp_path: Path, tab: Open) -> None:
    writer = ap.TensorBoardWriter(tmp_path / "r")
    writer.write(report(0, [0.1, 0.9], warnings=("careful",)))
    with tensorboard(tmp_path) as address:
        view = tab(address, "layer=a&head=0")
        view.frame.wait_for_selector(".grid .one button")
        view.frame.locator("summary").first.click()
        view.frame.locator(".grid .one button").focus()
        view.evaluate(
            """() => {
              const canvas = document.querySelector('.panel canvas');
              const place = [110, 30].map((at) => at * devicePixelRatio);
              window.seen = new Set();
              const look = () => {
                window.seen.add(`${[...canvas.getContext('2d').getImageData(...place, 1, 1).data].slice(0, 3)}`);
                requestAnimationFrame(look);
              };
              look();
            }"""
        )
        for step in (5, 10):
            writer.write(report(step, [0.1, 0.9]))
            view.wait(f"document.querySelector('.step').textContent === 'step {step}'")
            view.settled()
        assert view.evaluate("[...window.seen]") == ["68,1,84"], "the lower end of the colours all the time"
        assert view.evaluate("document.querySelector('details').open")
        assert view.evaluate("document.activeElement.textContent") == "entropy"
    writer.close()


def test_the_focus_stays_in_the_lists_and_returns_to_the_map(odd: str, tab: Open, page: Page) -> None:
    view = tab(odd, "run=long")
    view.frame.locator(".ranking .head").nth(2).focus()
    name = view.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    assert view.settled().evaluate("document.activeElement.textContent") == name
    view.frame.get_by_role("button", name="close").focus()
    page.keyboard.press("Escape")
    assert view.settled().evaluate("document.activeElement.tagName") == "CANVAS"
    page.keyboard.press("ArrowDown")
    assert "a · head 0" in view.settled().text(".tip")


def test_a_server_that_fails_is_asked_again_but_not_at_once(odd: str, browser: Browser) -> None:
    page = browser.new_page()  # one of its own: the failures are logged as errors
    asked: list[float] = []

    def fail(route: object) -> None:
        asked.append(time.monotonic())
        route.fulfill(status=500, body="out of order")  # type: ignore[attr-defined]

    page.route("**/attnprobe/frames*", fail)
    page.goto(f"{odd}/#attnprobe&run=wide")
    frame = page.wait_for_selector("iframe", state="attached").content_frame()  # type: ignore[union-attr]
    assert frame is not None
    frame.wait_for_selector("text=out of order")
    page.wait_for_timeout(7000)
    assert 1 < len(asked) < 4
    page.unroute("**/attnprobe/frames*")
    frame.wait_for_selector(".problem", state="detached", timeout=15_000)
    view = View(page, frame).ready()
    assert "0.5" in view.hover("wide", 0, 2)
    page.close()


def test_what_is_dark_is_printed_light(tmp_path: Path, opened: Open) -> None:
    written(tmp_path / "r", report(0, [0.5, math.nan]))
    write_page(read_logs(tmp_path), tmp_path / "report.html")
    view = opened(tmp_path / "report.html")
    view.frame.locator(".theme").click()
    view.settled()
    assert view.colours("r", 1, 2)[0, 1].tolist() != LIGHT_MISSING
    view.evaluate("window.dispatchEvent(new Event('beforeprint'))")  # and no frame is drawn before it is read
    assert view.colours("r", 1, 2)[0, 1].tolist() == LIGHT_MISSING

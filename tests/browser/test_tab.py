"""The Attention tab of a real TensorBoard over real runs, in a real browser."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page

from attnprobe.catalog import STATISTICS
from attnprobe.writers.heatmap import _DIVERGING, _VIRIDIS, colourize
from tests.browser.runs import HEADS, LAYERS, Runs
from tests.browser.view import View

Open = Callable[..., View]
STAT = "normalized_entropy"


def shown(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("−", "-").replace("∞", "inf"))


def table(runs: Runs, run: str, probe: int, stat: str = STAT) -> NDArray[np.float64]:
    return runs.reports[run][probe][stat].numpy()


def ends(runs: Runs, stat: str = STAT) -> tuple[float, float]:
    every = np.stack([report[stat].numpy() for reports in runs.reports.values() for report in reports])
    return float(np.nanmin(every)), float(np.nanmax(every))


def assert_colours(found: NDArray[np.uint8], place: NDArray[np.float64], anchors: Any) -> None:
    expected = colourize(np.clip(place, 0, 1), anchors).astype(int)
    assert np.abs(found.astype(int) - expected).max() <= 6


def test_it_is_listed_and_opens(server: str, tab: Open) -> None:
    listed = json.load(urllib.request.urlopen(f"{server}/data/plugins_listing"))
    assert listed["attnprobe"]["enabled"]
    assert listed["attnprobe"]["tab_name"] == "Attention"
    view = tab(server)
    assert view.panels() == ["fast", "slow"]
    assert view.step() == "step 57"
    meaning = view.text(".meaning")
    assert STATISTICS[STAT].meaning in meaning
    assert STATISTICS[STAT].formula in meaning
    assert "neither end is good in itself" in meaning


def test_the_colours_are_the_numbers_on_one_scale(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    low, high = ends(runs)
    for run in ("fast", "slow"):
        assert_colours(view.colours(run, len(LAYERS), HEADS), (table(runs, run, -1) - low) / (high - low), _VIRIDIS)
    labels = [shown(text) for text in view.all_text(".labels span")]
    assert labels == pytest.approx([low, (low + high) / 2, high], rel=1e-3)


def test_values_under_the_pointer(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    for run, row, head in (("fast", 0, 1), ("slow", 2, 3)):
        lines = view.hover(run, row, head).split("\n")
        assert lines[0] == f"{LAYERS[row]} · head {head}"
        name, number = lines[1].split()
        assert name == STAT
        assert shown(number) == pytest.approx(table(runs, run, -1)[row, head], rel=1e-3)


def test_the_slider_moves_through_the_steps(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    low, high = ends(runs)
    for probe in (0, 7, 13):
        view.slide(probe)
        assert view.step() == f"step {3 * probe}"
        assert parse_qs(view.place())["step"] == [str(3 * probe)]
        assert_colours(
            view.colours("fast", len(LAYERS), HEADS), (table(runs, "fast", probe) - low) / (high - low), _VIRIDIS
        )
    view.frame.get_by_role("button", name="latest").click()
    assert view.settled().step() == "step 57"
    assert "step" not in parse_qs(view.place())


def test_any_statistic(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    listed = view.all_text("#stat option")
    report = runs.reports["fast"][0]
    assert set(listed) == {*report.statistics, *report.layer, "residual"}
    assert listed[:2] == ["entropy", "normalized_entropy"]
    view.choose("value_norm")
    assert "unit: norm" in view.text(".meaning")
    _, number, *_ = view.hover("slow", 1, 2).split("\n")[1].split()
    assert shown(number) == pytest.approx(table(runs, "slow", -1, "value_norm")[1, 2], rel=1e-3)
    view.choose("shared_dead_columns")
    assert "lower is better" in view.text(".meaning")
    assert "1 heads" in (view.panel("fast").locator("canvas").get_attribute("aria-label") or "")


def test_the_difference_to_an_earlier_step(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    view.slide(4)
    view.frame.get_by_role("button", name="compare from here").click()
    view.slide(19)
    changes = {run: table(runs, run, -1) - table(runs, run, 4) for run in runs.reports}
    end = max(np.abs(change).max() for change in changes.values())
    for run, change in changes.items():
        assert_colours(view.colours(run, len(LAYERS), HEADS), (change / end + 1) / 2, _DIVERGING)
    assert "since step 12" in view.hover("fast", 1, 1)
    ranked = view.all_text(".ranking .value")
    sizes = sorted((abs(value) for change in changes.values() for value in change.ravel()), reverse=True)
    assert [abs(shown(text)) for text in ranked] == pytest.approx(sizes[: len(ranked)], rel=2e-3)
    view.frame.get_by_role("button", name="changes since step 12").click()
    assert "base" not in parse_qs(view.settled().place())


def test_heads_in_the_order_of_a_statistic(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server, "stat=value_norm")
    values = np.sort(np.concatenate([table(runs, run, -1, "value_norm").ravel() for run in runs.reports]))
    found = [shown(text) for text in view.all_text(".ranking .value")]
    assert found == pytest.approx(values[::-1][: len(found)], rel=1e-3)
    view.frame.locator(".ranking > button").click()
    found = [shown(text) for text in view.settled().all_text(".ranking .value")]
    assert found == pytest.approx(values[: len(found)], rel=1e-3)
    view.frame.locator(".ranking .head").first.click()
    view.frame.wait_for_selector(".grid .one canvas")
    place = parse_qs(view.place())
    row, head = LAYERS.index(place["layer"][0]), int(place["head"][0])
    assert values[0] in {table(runs, run, -1, "value_norm")[row, head] for run in runs.reports}


def test_a_click_on_a_head_shows_all_about_it(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    view.click("fast", 1, 3)
    assert view.text(".head-view h2") == f"{LAYERS[1]} · head 3"
    values = view.values()
    assert set(values) == {*runs.reports["fast"][0].statistics, "residual"}
    for name in runs.reports["fast"][0].statistics:
        expected = [table(runs, run, -1, name)[1, 3] for run in ("fast", "slow")]
        assert [shown(text) for text in values[name]] == pytest.approx(expected, rel=1e-3)
    assert view.frame.locator(".main canvas").count() == 1
    assert view.frame.locator(".small canvas").count() == len(values)
    assert "logit_explosion" in view.text(".own")
    assert view.frame.locator(".figures .figures figure").count() == 6  # three of each run
    assert view.frame.locator("canvas[aria-label='usage of the keys over steps']").count() == 2


def test_pictures_are_those_that_were_recorded(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server, f"layer={LAYERS[1]}&head=2&step=30&run=slow")
    canvas = view.frame.locator("canvas[aria-label^='attention']")
    canvas.wait_for()
    (picture,) = (each for each in runs.reports["slow"][10].maps if each.head == 2)
    assert "at step 30" in view.text(".maps")
    for row, column in ((0, 0), (5, 9), (15, 3)):
        canvas.hover(position={"x": (column + 0.5) * 11, "y": (row + 0.5) * 11})
        where, number = view.text(".tip").split("\n")
        assert where == f"query block {row}, key block {column}"
        assert shown(number) == pytest.approx(float(picture.attention[row, column]), rel=1e-3)
    usage = view.frame.locator("canvas[aria-label^='usage']")
    box = usage.bounding_box()
    assert box is not None
    usage.hover(position={"x": box["width"] * 4.5 / 16, "y": box["height"] * 10.5 / 20})
    where, number = view.text(".tip").split("\n")
    assert where == "step 30, key block 4"
    assert picture.usage is not None
    assert shown(number.removeprefix("usage ")) == pytest.approx(float(picture.usage[4]), rel=1e-3)


def test_a_head_without_pictures_says_how_to_record_them(server: str, tab: Open) -> None:
    view = tab(server, f"layer={LAYERS[0]}&head=0")
    view.frame.wait_for_selector(".maps code")
    assert f'maps=["{LAYERS[0]}"]' in view.text(".maps")


def test_an_alarm_leads_to_its_head_and_step(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    raised = [
        (run, alarm) for run, reports in runs.reports.items() for each in reports for alarm in each.alarms if alarm.new
    ]
    assert view.text(".alarms h2") == f"Alarms ({len(raised)})"
    run, alarm = next((run, alarm) for run, alarm in raised if alarm.layer == LAYERS[2])
    view.frame.locator(".alarms button", has_text=LAYERS[2]).first.click()
    view.frame.wait_for_selector(".grid .one canvas")
    assert view.settled().step() == f"step {alarm.step}"
    assert view.text(".head-view h2") == f"{alarm.layer} · head {alarm.heads[0]}"
    assert view.frame.locator("#stat").input_value() == "logit_spread"
    assert alarm.advice in view.text(".own")
    assert "logit_explosion" in view.hover(run, 2, alarm.heads[0])


def test_corners_are_on_the_heads_that_an_alarm_names_at_the_step(server: str, tab: Open, runs: Runs) -> None:
    view = tab(server)
    found = set()
    for probe in (2, 4, 7, 12, 19):
        view.slide(probe)
        for run, reports in runs.reports.items():
            named = {(alarm.layer, head) for alarm in reports[probe].alarms for head in alarm.heads}
            expected = [[(layer, head) in named for head in range(HEADS)] for layer in LAYERS]
            assert view.corners(run, len(LAYERS), HEADS).tolist() == expected
            found.add(str(expected))
    assert len(found) > 3, "the heads change"


def test_an_address_brings_everything_back(server: str, tab: Open, page: Page) -> None:
    view = tab(server)
    view.choose("max_logit")
    view.slide(9)
    view.click("slow", 2, 1)
    view.frame.get_by_label("filter of layers").fill("layers.2 layers.0*")
    view.frame.locator(".runs input").first.uncheck()
    view.settled()
    place = view.place()
    again = tab(server, place)
    again.frame.wait_for_selector(".grid .one canvas")
    assert again.settled().place() == place
    assert again.panels() == ["slow"]
    assert again.step() == "step 27"
    assert again.frame.locator("#stat").input_value() == "max_logit"
    assert again.text(".head-view h2") == f"{LAYERS[2]} · head 1"
    assert "2 layers, 4 heads" in (again.panel("slow").locator("canvas").get_attribute("aria-label") or "")


def test_the_view_survives_a_look_at_another_tab(server: str, tab: Open, page: Page) -> None:
    view = tab(server, "stat=sink_mass&step=30")
    page.get_by_role("tab", name="Text").click()
    page.wait_for_url("**/*#text*")
    page.get_by_role("tab", name="Attention").click()
    page.wait_for_url("**/*#attnprobe*stat=sink_mass*")
    assert view.settled().step() == "step 30"


def test_the_layers_that_match(server: str, tab: Open) -> None:
    view = tab(server)
    view.frame.get_by_label("filter of layers").fill("*.1.*")
    assert "1 layers" in (view.settled().panel("fast").locator("canvas").get_attribute("aria-label") or "")
    view.frame.get_by_label("filter of layers").fill("nothing")
    view.settled()
    assert "no layer's name matches the filter" in view.text(".panel >> nth=0")


def test_keys(server: str, tab: Open, page: Page) -> None:
    view = tab(server)
    view.click("fast", 0, 0)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert view.settled().text(".head-view h2") == f"{LAYERS[1]} · head 2"
    page.keyboard.press("Escape")
    assert view.settled().frame.locator(".head-view").is_hidden()
    view.frame.locator("body").click(position={"x": 3, "y": 3})
    page.keyboard.press("Home")
    assert view.settled().step() == "step 0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("d")
    page.keyboard.press("ArrowRight")
    assert view.settled().step() == "step 6"
    assert parse_qs(view.place())["base"] == ["3"]
    page.keyboard.press("End")
    assert view.settled().step() == "step 57"


def test_play(server: str, tab: Open, page: Page) -> None:
    view = tab(server, "step=45")
    view.frame.locator(".timeline button").first.click()
    view.wait("document.querySelector('.step').textContent === 'step 57'")
    view.wait("document.querySelector('.timeline button').textContent === '▶'")


def test_dark_and_light(server: str, tab: Open, page: Page) -> None:
    view = tab(server, query="?darkMode=true")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(32, 33, 36)"
    page.evaluate("document.body.classList.remove('dark-mode')")
    view.settled()
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"

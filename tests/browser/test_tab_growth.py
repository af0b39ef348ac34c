"""The tab over runs that grow, are broken, named with malice, large, or not there."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page

import attnprobe as ap
from attnprobe.report import Alarm, StepReport
from benchmarks.tab.server import tensorboard
from benchmarks.tab.synthetic import write_run
from tests.browser.view import View

Open = Callable[..., View]


def report(step: int, value: float = 0.5, layer: str = "a", **changes: object) -> StepReport:
    values = torch.full((1, 2), value, dtype=torch.float64)
    return StepReport(step, **({"layers": (layer,), "heads": (2,), "statistics": {"entropy": values}} | changes))  # type: ignore[arg-type]


def test_new_probes_and_runs_appear_by_themselves(tmp_path: Path, tab: Open) -> None:
    writer = ap.TensorBoardWriter(tmp_path / "one")
    writer.write(report(0))
    with tensorboard(tmp_path) as address:
        view = tab(address)
        assert view.step() == "step 0"
        writer.write(report(5, 0.7))
        view.wait("document.querySelector('.step').textContent === 'step 5'")
        assert "0.7" in view.settled().hover("one", 0, 0)
        view.slide(0)  # whoever looks at an earlier step stays there
        writer.write(report(10))
        other = ap.TensorBoardWriter(tmp_path / "two")
        other.write(report(0))
        view.wait("document.querySelectorAll('.panel').length === 2")
        assert view.settled().step() == "step 0"
        # Resumed from a checkpoint: steps come again, and each is there once.
        again = ap.TensorBoardWriter(tmp_path / "one")
        again.write(report(5, 0.2))
        view.wait("document.querySelector('.runs').textContent.includes('one 2 probes')")
        view.slide(1)
        assert "0.2" in view.hover("one", 0, 1)
        for each in (writer, other, again):
            each.close()


@pytest.mark.parametrize("option", ["--load_fast=true", "--load_fast=false"])
def test_both_readers_show_every_probe(option: str, tmp_path: Path, tab: Open) -> None:
    write_run(tmp_path / "long", [2], 3, 1500)
    with tensorboard(tmp_path, option) as address:
        view = tab(address)
        assert "1,500 probes" in view.text(".runs")
        assert view.evaluate("document.querySelector('.timeline input').max") == "1499"
        view.slide(777)
        assert view.step() == "step 7,770"


def test_many_heads(tmp_path: Path, tab: Open) -> None:
    write_run(tmp_path / "a", [32] * 32, 4, 30)
    write_run(tmp_path / "b", [32, 16] * 16, 4, 20, seed=1)
    with tensorboard(tmp_path) as address:
        view = tab(address)
        assert view.panels() == ["a", "b"]
        top = "canvas => canvas.getBoundingClientRect().top"
        assert view.panel("a").locator("canvas").evaluate(top) == view.panel("b").locator("canvas").evaluate(top)
        assert "transformer.h.31.attn · head 31" in view.hover("a", 31, 31)
        view.panel("b").locator("canvas").hover(position=view.cell("b", 1, 20))  # type: ignore[arg-type]
        assert view.frame.locator(".tip").is_hidden(), "that layer has sixteen heads"
        view.slide(25)
        assert "step 190" in view.panel("b").inner_text()


HOSTILE = [
    "<img src=x onerror=\"window.top.hacked='image'\">",
    "\"><script>window.top.hacked='script'</script>",
    "'; window.top.hacked='quote'; '",
    "</script><svg onload=window.top.hacked='svg'>",
    "javascript:window.top.hacked='link'",
]


def hostile_run(directory: Path) -> None:
    """Layers, statistics, alarms and their advice, warnings and a run's name that would like to be markup."""
    values = torch.tensor([[0.5, 0.25]] * len(HOSTILE), dtype=torch.float64)
    alarms = tuple(
        Alarm(name, layer, (0,), 0, 0, 2.0, 1.0, name, reads=(name,))
        for name, layer in zip(HOSTILE, HOSTILE, strict=True)
    )
    found = StepReport(
        0,
        layers=tuple(HOSTILE),
        heads=(2,) * len(HOSTILE),
        statistics=dict.fromkeys(["entropy", *HOSTILE], values),
        alarms=alarms,
        warnings=tuple(HOSTILE),
        notes=tuple(HOSTILE),
    )
    # No slash, which a directory cannot have.
    writer = ap.TensorBoardWriter(directory / HOSTILE[0])
    writer.write(found)
    writer.write(StepReport(1, invalid=HOSTILE[0]))
    writer.close()


def assert_harmless(view: View) -> None:
    """Every name is on the page as text, and none did anything."""
    view.frame.locator(".alarms button").first.click()
    view.frame.wait_for_selector(".grid .one canvas")
    view.settled()
    view.frame.locator(".panel canvas").hover(position={"x": 110, "y": 25})
    text = view.frame.locator("body").inner_text()
    for name in HOSTILE:
        assert name in text
        view.choose(name)
    assert view.page.evaluate("window.top.hacked") is None
    assert view.frame.locator("main img, main script, main svg").count() == 0


def test_hostile_names_are_text(tmp_path: Path, tab: Open) -> None:
    hostile_run(tmp_path)
    with tensorboard(tmp_path) as address:
        view = tab(address)
        assert view.panels() == [HOSTILE[0]]
        assert_harmless(view)


def test_nothing_there_says_what_to_do(tmp_path: Path, tab: Open, page: Page) -> None:
    with tensorboard(tmp_path) as address:
        page.goto(f"{address}/#attnprobe")
        page.wait_for_selector("iframe", state="attached")
        frame = next(each for each in page.frames if "plugin_entry" in each.url)
        frame.wait_for_selector(".empty h2")
        text = frame.locator(".empty").inner_text()
        assert "No attention was recorded here yet" in text
        assert "attnprobe.TensorBoardWriter" in text
        assert str(tmp_path) in text


def test_a_broken_directory_breaks_nothing(tmp_path: Path, tab: Open) -> None:
    """Beside a good run: noise, a torn file, damage in the middle, another program's file, a directory, a lost link."""
    write_run(tmp_path / "good", [2], 2, 5)
    for name, change in (
        ("torn", lambda data: data[:-20]),
        ("damaged", lambda data: data[:900] + b"\xff" * 40 + data[940:]),
    ):
        path = write_run(tmp_path / name, [2], 2, 5)
        path.write_bytes(change(path.read_bytes()))
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "events.out.tfevents.1").write_bytes(os.urandom(5000))
    (tmp_path / "noise" / "events.out.tfevents.2").touch()
    (tmp_path / "noise" / "events.out.tfevents.3").mkdir()
    (tmp_path / "noise" / "events.out.tfevents.4").symlink_to(tmp_path / "nowhere")
    from torch.utils.tensorboard import SummaryWriter

    other = SummaryWriter(str(tmp_path / "other"))
    other.add_scalar("loss", 1.0, 0)
    other.close()
    with tensorboard(tmp_path) as address:
        view = tab(address)
        assert "good" in view.panels()
        assert "other" not in view.panels()
        assert "damaged from byte" in view.text(".problems")
        assert "4 probes" in view.frame.locator(".runs label", has_text="torn").inner_text()
        listed = json.load(urllib.request.urlopen(f"{address}/data/plugins_listing"))
        assert listed["attnprobe"]["enabled"]
        assert json.load(urllib.request.urlopen(f"{address}/data/runs"))

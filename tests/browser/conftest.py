"""A real browser, and pages that must not complain or talk to anybody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.tab.browser import CHROMIUM, QUIET, tab_frame
from benchmarks.tab.server import tensorboard
from tests.browser.runs import real_runs
from tests.browser.view import View


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        assert "CI" not in os.environ, "CI must install chromium"
        pytest.skip("no chromium here: install it to see the Attention tab tested")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose test fails where it asks another host, logs an error or lets an exception through."""
    found = browser.new_page(viewport={"width": 1500, "height": 1100})
    complaints: list[str] = []
    hosts: set[str] = set()
    found.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: hosts.add(urlsplit(request.url).hostname or ""))
    found.set_default_timeout(20_000)
    yield found
    found.close()
    assert complaints == []
    assert hosts <= {"127.0.0.1", ""}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two trainings, with alarms and maps, and what was written: directory, and reports by run."""
    return real_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def server(runs: Any) -> Iterator[str]:
    with tensorboard(runs.directory) as address:
        yield address


@pytest.fixture
def tab(page: Page) -> Callable[[str, str], View]:
    """Opens the Attention tab at an address and part of the page's own."""

    def opened(address: str, place: str = "", query: str = "") -> View:
        page.goto("about:blank")
        page.goto(f"{address}/{query}#attnprobe{place and '&'}{place}")
        return View(page, tab_frame(page)).ready()

    return opened


@pytest.fixture
def opened(page: Page) -> Callable[[Path, str], View]:
    """Opens a report from the disk."""

    def open_file(path: Path, place: str = "") -> View:
        page.goto("about:blank")
        page.goto(f"{path.as_uri()}#{place}")
        return View(page, page.main_frame).ready()

    return open_file

"""The Attention tab: what it adds to TensorBoard's start, how soon it shows something, and how it bears large runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attnprobe.tensorboard_plugin.loader import NAME
from benchmarks.tab.browser import CHROMIUM, QUIET, tab_frame
from benchmarks.tab.server import running, tensorboard
from benchmarks.tab.synthetic import write_run
from benchmarks.table import Row, Section
from benchmarks.timing import Spread

ABOUT = """Wall-clock times; TensorBoard and the browser share the machine's cores. The large run is an event file of
random numbers of the size given."""
LARGE = ([64] * 48, 25, 5000)
#: What TensorBoard does before it listens, with or without our entry point.
START = f"""
import sys, time
began = time.perf_counter()
from tensorboard import default, program
found = default._iter_entry_points
default._iter_entry_points = lambda group: [
    point for point in found(group) if point.name != {NAME!r} or sys.argv[1] == "with"
]
board = program.TensorBoard(default.get_plugins())
board.configure(argv=["", "--logdir", sys.argv[2], "--port", "0", "--load_fast=false"])
address = board.launch()
assert ("attnprobe.tensorboard_plugin.plugin" in sys.modules) == (sys.argv[1] == "with")
print(time.perf_counter() - began, "torch" in sys.modules)
"""


def benchmark(short: bool) -> Iterator[Section]:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        rows = [*_start(directory, 3 if short else 9), *_large(directory / "large")]
        if CHROMIUM is None:
            rows.append(Row("the page", note="not measured: no chromium here"))
        else:
            rows += _browser(directory, 3 if short else 9)
        yield Section("The Attention tab", ABOUT, rows)


def _start(directory: Path, rounds: int) -> Iterator[Row]:
    """How much later TensorBoard listens with the plugin: both in turn, each in a process of its own."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    torch = False
    for _ in range(rounds):
        for which, found in seconds.items():
            command = [sys.executable, "-c", START, which, str(directory)]
            # Elsewhere: what a build left in the project's directory would stand in for the installed package.
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
            taken, loaded = done.stdout.split()[-2:]
            found.append(float(taken))
            torch |= which == "with" and loaded == "True"
    more = [one - other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    note = f"{Spread.of(seconds['without']).median:.2f} s without it; torch {'is' if torch else 'is not'} loaded"
    yield Row("TensorBoard starts later with the plugin by", value=Spread.of(more), unit="s", target=0.3, note=note)


def _large(directory: Path) -> Iterator[Row]:
    heads, statistics, probes = LARGE
    size = write_run(directory / "run", heads, statistics, probes).stat().st_size
    name = f"{len(heads)} x {heads[0]} heads, {statistics} statistics, {probes} probes ({size / 1e9:.1f} GB)"
    with running(directory) as (address, process):
        began, longest = time.perf_counter(), 0.0
        ask = _asker(address)
        while True:
            answer, seconds = ask("runs")
            longest = max(longest, seconds)
            if b'"complete":true' in answer and b'"runs":[{' in answer:
                break
        yield Row(f"{name}: all probes known after", value=Spread.of([time.perf_counter() - began]), unit="s")
        requests: dict[str, dict[str, Any]] = {
            "range": {"name": "entropy"},
            "frames": {"name": "entropy", "start": 2000, "stop": 2170},
            "head": {"layer": "transformer.h.7.attn", "head": 5, "points": 1000},
        }
        for question, query in requests.items():
            for _ in range(3):
                longest = max(longest, ask(question, run="run", **query)[1])
        yield Row("the longest answer", value=Spread.of([longest]), unit="s", target=1.0)
        used = sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
        yield Row("memory of the server and its reader", value=Spread.of([used / 2**20]), unit="MiB", target=1024)
    shutil.rmtree(directory)


def _asker(address: str) -> Callable[..., tuple[bytes, float]]:
    def ask(question: str, **query: Any) -> tuple[bytes, float]:
        began = time.perf_counter()
        url = f"{address}/data/plugin/{NAME}/{question}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read(), time.perf_counter() - began

    return ask


def _browser(directory: Path, rounds: int) -> Iterator[Row]:
    from playwright.sync_api import sync_playwright

    write_run(directory / "first" / "a", [12] * 12, 29, 1000)
    write_run(directory / "wide" / "a", [32] * 32, 29, 200)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        with tensorboard(directory / "first") as address:
            seconds = []
            for _ in range(rounds):
                page = browser.new_page(viewport={"width": 1500, "height": 1000})
                began = time.perf_counter()
                _drawn(page, address)
                seconds.append(time.perf_counter() - began)
                page.close()
        note = "from the address to the picture, TensorBoard's own page included"
        yield Row("first paint, 12 x 12 heads, 1,000 probes", value=Spread.of(seconds), unit="s", target=3.0, note=note)
        with tensorboard(directory / "wide") as address:
            page = browser.new_page(viewport={"width": 1500, "height": 1000})
            frame = _drawn(page, address)
            moves: list[float] = frame.evaluate(MOVES, 20 * rounds)
            page.close()
        yield Row("a move of the slider, 32 x 32 heads", value=Spread.of(moves), unit="ms", target=50.0,
                  note=f"until it is drawn; the slowest of {len(moves)} took {max(moves):.0f} ms")  # fmt: skip
        browser.close()


def _drawn(page: Any, address: str) -> Any:
    page.goto(f"{address}/#{NAME}")
    frame = tab_frame(page)
    frame.wait_for_function("performance.getEntriesByName('attnprobe:redraw').length > 0")
    return frame


#: Milliseconds of each of so many moves, from the event to the end of the drawing.
MOVES = """async (number) => {
  const slider = document.querySelector('.timeline input');
  const drawn = () => performance.getEntriesByName('attnprobe:redraw').length;
  const found = [];
  for (let index = 0; index < number; index += 1) {
    slider.value = Math.round(slider.max * ((index * 0.618) % 1));
    const [before, began] = [drawn(), performance.now()];
    slider.dispatchEvent(new Event('input'));
    while (drawn() === before) await new Promise((done) => setTimeout(done));
    found.push(performance.now() - began);
  }
  return found;
}"""

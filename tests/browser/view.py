"""What a person sees and does on the page."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import Frame, Locator, Page

# The page's own sizes, in CSS pixels.
LABEL, TOP = 92, 16
# Its colour of an alarm, in the light.
ALARM = (0xC2, 0x18, 0x5B)


class View:
    def __init__(self, page: Page, frame: Frame) -> None:
        self.page, self.frame = page, frame

    def ready(self) -> View:
        """Waits for the first picture."""
        self.wait("performance.getEntriesByName('attnprobe:redraw').length > 0")
        return self.settled()

    def wait(self, condition: str) -> None:
        """Until that holds; from here, since the report allows no page to evaluate text."""
        deadline = time.monotonic() + 20
        while not self.frame.evaluate(condition):
            assert time.monotonic() < deadline, f"not in 20 seconds: {condition}"
            time.sleep(0.05)

    def settled(self) -> View:
        """Waits until nothing is drawn any more."""
        self.frame.evaluate(
            """async () => {
              const drawn = () => performance.getEntriesByName('attnprobe:redraw').length;
              for (let before = -1, still = 0; still < 3; still = before === drawn() ? still + 1 : 0) {
                before = drawn();
                await new Promise((done) => setTimeout(done, 60));
              }
            }"""
        )
        return self

    def panel(self, run: str) -> Locator:
        return self.frame.locator(".panel").filter(has=self.frame.get_by_role("heading", name=run, exact=True))

    def panels(self) -> list[str]:
        return self.frame.locator(".panel h3").all_inner_texts()

    def cell(self, run: str, row: int, head: int) -> dict[str, float]:
        """Where a head's cell is on its canvas."""
        size = self.cell_size(run)
        return {"x": LABEL + (head + 0.4) * size, "y": TOP + (row + 0.6) * size}

    def cell_size(self, run: str) -> float:
        label = self.panel(run).locator("canvas").get_attribute("aria-label") or ""
        heads = int(label.split(" layers, ")[1].split()[0])
        width: float = self.panel(run).locator("canvas").evaluate("canvas => parseFloat(canvas.style.width)")
        return (width - LABEL - 2) / heads

    def colours(self, run: str, rows: int, heads: int) -> NDArray[np.uint8]:
        """``[rows, heads, 3]``: the pixel at the lower left of the middle of each cell, where no alarm's corner is."""
        cells = [[self.cell(run, row, head) for head in range(heads)] for row in range(rows)]
        return self.pixels(run, [[[cell["x"], cell["y"]] for cell in row] for row in cells])

    def corners(self, run: str, rows: int, heads: int) -> NDArray[np.bool_]:
        """``[rows, heads]``: whether the upper right of the cell has the colour of an alarm."""
        size = self.cell_size(run)
        places = [
            [[LABEL + (head + 1) * size - 4, TOP + row * size + 2] for head in range(heads)] for row in range(rows)
        ]
        return np.abs(self.pixels(run, places).astype(int) - ALARM).max(-1) <= 6

    def pixels(self, run: str, places: list[list[list[float]]]) -> NDArray[np.uint8]:
        """``[rows, heads, 3]`` of the run's map at these places."""
        canvas = self.panel(run).locator("canvas")
        found = canvas.evaluate(
            """(canvas, places) => {
              const context = canvas.getContext('2d');
              const ratio = window.devicePixelRatio;
              const read = ([x, y]) => [...context.getImageData(x * ratio, y * ratio, 1, 1).data].slice(0, 3);
              return places.map((row) => row.map(read));
            }""",
            places,
        )
        return np.array(found, np.uint8)

    def hover(self, run: str, row: int, head: int) -> str:
        self.panel(run).locator("canvas").hover(position=self.cell(run, row, head))  # type: ignore[arg-type]
        return self.frame.locator(".tip").inner_text()

    def click(self, run: str, row: int, head: int) -> None:
        self.panel(run).locator("canvas").click(position=self.cell(run, row, head))  # type: ignore[arg-type]
        self.frame.wait_for_selector(".grid .one canvas")
        self.settled()

    def slide(self, index: int) -> None:
        self.frame.locator(".timeline input").evaluate(
            "(slider, index) => { slider.value = index; slider.dispatchEvent(new Event('input')); }", index
        )
        self.settled()

    def choose(self, stat: str) -> None:
        self.frame.locator("#stat").select_option(stat)
        self.settled()

    def step(self) -> str:
        return self.frame.locator(".step").inner_text()

    def text(self, selector: str) -> str:
        return self.frame.locator(selector).inner_text()

    def all_text(self, selector: str) -> list[str]:
        return self.frame.locator(selector).all_inner_texts()

    def values(self) -> dict[str, list[str]]:
        """Statistic -> the numbers at the step shown, one a run, out of the small curves of a head."""
        found: dict[str, list[str]] = {}
        for cell in self.frame.locator(".grid .one").all():
            found[cell.locator("button").inner_text()] = cell.locator(".values span").all_inner_texts()
        return found

    def place(self) -> str:
        """The page's own part of the address, which follows with some delay."""
        self.page.wait_for_timeout(450)
        return str(self.page.evaluate("location.hash")).removeprefix("#attnprobe").removeprefix("#").lstrip("&")

    def evaluate(self, script: str) -> Any:
        return self.frame.evaluate(script)

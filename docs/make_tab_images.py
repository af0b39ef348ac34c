"""Trains a small GPT-2 twice, once with a learning rate that is too high, and takes the pictures of the Attention tab.

Run ``python docs/make_tab_images.py`` where chromium and playwright are installed; it takes some minutes.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright
from transformers import GPT2Config, GPT2LMHeadModel

import attnprobe as ap
from attnprobe.logs import read_logs
from attnprobe.view.html import write_page
from benchmarks.tab.browser import CHROMIUM, QUIET, tab_frame
from benchmarks.tab.server import tensorboard

IMAGES = Path(__file__).parent / "images"
RATES = {"lr 1e-3": 1e-3, "lr 3e-2": 3e-2}
LENGTH, BATCH, LAYERS, HEADS = 128, 8, 6, 8
MAPS = "transformer.h.3.attn"


def train(directory: Path, rate: float, steps: int) -> None:
    text = "\n".join(pydoc_data.topics.topics.values())
    characters = sorted(set(text))
    tokens = torch.tensor([characters.index(character) for character in text])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(characters), n_positions=LENGTH, n_embd=16 * HEADS, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    writer = ap.TensorBoardWriter(directory, projector_every=1000)
    with ap.AttentionProbe(
        model, every_n_steps=5, statistics="all", maps=[MAPS], writers=[writer], action="record"
    ) as probe:
        for _ in range(steps):
            starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
            batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step(loss)


def show(page: Page, address: str, place: str, dark: bool = False) -> Any:
    page.goto("about:blank")
    page.goto(f"{address}/{'?darkMode=true' * dark}#attnprobe&{place}")
    frame = tab_frame(page)
    frame.wait_for_selector(".panel canvas")
    page.wait_for_timeout(2000)
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=Path, help="where the runs are, or go (default: nowhere that stays)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        runs = options.runs or Path(place)
        for name, rate in RATES.items():
            if not (runs / name).exists():
                train(runs / name, rate, options.steps)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1180})
        with tensorboard(runs) as address:
            show(page, address, f"stat=logit_spread&layer={MAPS}&head=2&step=100")
            page.screenshot(path=IMAGES / "attention-tab-head.png")
            page.set_viewport_size({"width": 1400, "height": 700})
            show(page, address, "stat=normalized_entropy&base=0", dark=True)
            page.screenshot(path=IMAGES / "attention-tab-dark.png")
        report = Path(place) / "report.html"
        write_page(read_logs(runs, pictures=True), report, "A learning rate that is too high")
        page.set_viewport_size({"width": 1400, "height": 720})
        page.goto(f"{report.as_uri()}#stat=sink_mass")
        page.wait_for_timeout(2000)
        page.screenshot(path=IMAGES / "attention-report.png")
        browser.close()


if __name__ == "__main__":
    main()

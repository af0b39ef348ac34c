"""Which browser there is, and how it is started so that it talks to nobody of its own accord."""

from __future__ import annotations

import shutil
from typing import Any

#: None where there is none.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def tab_frame(page: Any) -> Any:
    """The frame of the plugin that a page of TensorBoard shows."""
    element = page.wait_for_selector("iframe", state="attached")
    assert element is not None
    frame = element.content_frame()
    assert frame is not None
    return frame

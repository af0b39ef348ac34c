"""Event files read back with TensorBoard's own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def read_events() -> Callable[[Path], Any]:
    def read(directory: Path) -> Any:
        accumulator = EventAccumulator(str(directory), {"tensors": 0, "scalars": 0, "images": 0})
        return accumulator.Reload()

    return read

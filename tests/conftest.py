"""Settings of all tests, and proof after each that nothing global is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.global_state import global_state

# At test sizes more threads wait for each other longer than they compute.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = global_state()
    yield
    assert global_state() == before

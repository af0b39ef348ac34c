"""Every test here also shows that nothing global is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.probe.models import global_state


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = global_state()
    torch.manual_seed(0)
    yield
    assert global_state() == before

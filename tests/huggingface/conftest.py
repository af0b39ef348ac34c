"""The Trainer's noise filtered narrowly, its traces in the environment removed; nothing here without transformers."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from unittest import mock

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may ask the hub

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]

# The old name is the one that every version knows.
NOISE = ["ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            for noise in NOISE:
                item.add_marker(pytest.mark.filterwarnings(noise), append=False)


@pytest.fixture(scope="package", autouse=True)
def collected() -> Iterator[None]:
    """Every training collects garbage, which takes longer than its steps if it has to look at all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Precision and compiler go from the arguments to accelerate in environment variables."""
    with mock.patch.dict(os.environ):
        yield

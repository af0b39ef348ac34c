"""Both packages, their noise filtered narrowly."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

NOISE = [
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:GPU available but not used",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            for noise in NOISE:
                item.add_marker(pytest.mark.filterwarnings(noise), append=False)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

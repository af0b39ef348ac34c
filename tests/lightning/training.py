"""A module and a trainer for either package."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader

import attnprobe as ap
from attnprobe.lightning import AttentionMonitor
from tests.probe.models import batches, net

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "max_epochs": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@cache
def module_class(package: ModuleType) -> Any:
    class Module(package.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, kind: str = "sdpa", optimizer: str = "SGD", dropout: float = 0.0) -> None:
            super().__init__()
            self.net, self.optimizer = net(kind, dropout=dropout), optimizer
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.net(batch).square().mean()
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("validation", self.net(batch).mean())

        def configure_optimizers(self) -> Any:
            return getattr(torch.optim, self.optimizer)(self.parameters(), 0.01)

    return Module


def loader(count: int = 8, size: int = 4) -> Any:
    return DataLoader(torch.cat([*batches(count, size)]), batch_size=size)


class Run:
    """One fit with a monitor: the reports and everything that took part."""

    def __init__(
        self,
        package: ModuleType,
        module: Any = None,
        *,
        every: int = 1,
        data: Any = None,
        validation: Any = None,
        callbacks: Any = (),
        fit: dict[str, Any] | None = None,
        monitor: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.memory = ap.MemoryWriter()
        self.monitor = AttentionMonitor(every, **{"writers": self.memory} | (monitor or {}))
        self.module = module or module_class(package)()
        self.trainer = package.Trainer(callbacks=[*callbacks, self.monitor], **QUIET | trainer)
        self.arguments = (self.module, loader() if data is None else data, validation)
        self.options = fit or {}

    def fit(self) -> Run:
        self.trainer.fit(*self.arguments, **self.options)
        return self

    @property
    def reports(self) -> list[ap.StepReport]:
        return self.memory.reports

    @property
    def steps(self) -> list[int]:
        return [report.step for report in self.reports]


def said(told: Any) -> list[str]:
    """What the probe said, without Lightning's own warnings."""
    return [str(w.message) for w in told if issubclass(w.category, ap.AttnProbeWarning)]

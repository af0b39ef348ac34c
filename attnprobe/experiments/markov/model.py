"""One arm as a LightningModule: the paper's single-head model of every seed, trained at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import Architecture, Ensemble
from attnprobe.experiments.ensemble.training import Course, Task, Training
from attnprobe.experiments.markov.quiet import Progress, quiet
from attnprobe.experiments.markov.task import SYMBOLS, WIDTH
from attnprobe.lightning import AttentionMonitor
from attnprobe.writers import JSONLWriter, MemoryWriter

FORM = Architecture(WIDTH, SYMBOLS)


class MarkovModel(pl.LightningModule):  # type: ignore[misc]
    """Predicts the present symbol from all observations up to now."""

    def __init__(self, arm: Arm, task: Task, seeds: tuple[int, ...]) -> None:
        super().__init__()
        self.model = Ensemble(FORM, seeds)
        self.arm, self.training_course = arm, Training(self.model, task)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_course.loss()
        self.log("loss", loss.detach() / len(self.model.seeds), prog_bar=True)
        return loss

    def on_train_end(self) -> None:
        self.training_course.check()

    def configure_optimizers(self) -> Any:
        return self.arm.build(self.model)


class _Monitor(AttentionMonitor):
    """All seeds together train on the sum of their losses; the alarms, and the logs, want the mean."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        mean = {"loss": outputs["loss"] / len(pl_module.model.seeds)}
        super().on_train_batch_end(trainer, pl_module, mean, batch, batch_idx)


class _Steps(Dataset[int]):
    """The full batch belongs to the model; an epoch is a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> int:
        return index


def fit(arm: Arm, task: Task, seeds: tuple[int, ...], *, steps: int, directory: Path) -> Course:
    """Train every seed with Lightning, and write events and JSONL to ``directory``/arm."""
    model = MarkovModel(arm, task, seeds)
    memory = MemoryWriter()
    logger = TensorBoardLogger(directory, name="", version=arm.name)
    monitor = _Monitor(
        every_n_steps=50,
        statistics="all",
        maps="model.attention.0:0",
        writers=[memory, JSONLWriter(logger.log_dir)],
        action="record",
        uninformed_loss=math.log(SYMBOLS),
    )
    with quiet():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=logger,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[monitor, Progress(arm.name)],
        )
        trainer.fit(model, DataLoader(_Steps(steps), batch_size=None))
    return model.training_course.course(arm, memory.reports)

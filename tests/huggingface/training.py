"""A tiny GPT-2 and a Trainer for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import attnprobe as ap
from attnprobe.alarms import above, head_values
from attnprobe.huggingface import AttentionMonitorCallback

VOCABULARY, TOKENS = 24, 10
QUIET = {
    "use_cpu": True,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def gpt2(dropout: float = 0.0, **options: Any) -> Any:
    """Two layers of two heads; always the same weights."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**size | rates | options, bos_token_id=0, eos_token_id=0))


LAYERS = ("transformer.h.0.attn", "transformer.h.1.attn")


def sequences(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Random tokens; sequences differ in how many of them have a label."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for index in range(count):
        tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + index % 4 * 2] = -100
        data.append({"input_ids": tokens, "labels": labels})
    return data


class Run:
    """A Trainer with a monitor: the reports and everything that takes part."""

    def __init__(
        self,
        directory: Path,
        *,
        every: int = 1,
        model: Any = None,
        data: Any = None,
        trainer: type[Trainer] = Trainer,
        monitor: dict[str, Any] | None = None,
        callbacks: Any = (),
        watched: bool = True,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.memory = ap.MemoryWriter()
        self.monitor = AttentionMonitorCallback(every, **{"writers": self.memory} | (monitor or {}))
        self.model = model or gpt2()
        self.trainer = trainer(
            model=self.model,
            args=TrainingArguments(output_dir=str(directory), **QUIET | arguments),
            train_dataset=data or sequences(),
            callbacks=[*([self.monitor] if watched else []), *callbacks],
            **options or {},
        )

    def train(self, **options: Any) -> Run:
        self.trainer.train(**options)
        return self

    @property
    def reports(self) -> list[ap.StepReport]:
        return self.memory.reports

    @property
    def steps(self) -> list[int]:
        return [report.step for report in self.reports]

    @property
    def logged(self) -> dict[int, float]:
        """Step -> the loss that the trainer logged."""
        return {entry["step"]: entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry}


class Sharp(ap.AlarmRule):
    """Fires from the third probe on."""

    name = "sharp"
    advice = "Look."
    patience = 3

    def readings(self, report, history):
        for layer, values in head_values(report, report["entropy"]):
            yield above(layer, values, 0.1)


def said(told: Any) -> list[str]:
    """What the probe said, without the warnings of others."""
    return [str(w.message) for w in told if issubclass(w.category, ap.AttnProbeWarning)]

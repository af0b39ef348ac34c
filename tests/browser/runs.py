"""Trainings that the tests look at, and what was written of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import attnprobe as ap
from attnprobe.alarms import LogitExplosion
from attnprobe.report import StepReport

LAYERS = tuple(f"layers.{index}.self_attn" for index in range(3))
HEADS = 4


@dataclass(frozen=True)
class Runs:
    directory: Path
    reports: dict[str, list[StepReport]]


def real_runs(directory: Path) -> Runs:
    """``fast`` and ``slow``: a small encoder at two learning rates, both with alarms."""
    found = {
        name: train(directory / name, rate, seed) for seed, (name, rate) in enumerate([("fast", 3.0), ("slow", 0.03)])
    }
    return Runs(directory, found)


def train(directory: Path, rate: float, seed: int, steps: int = 60) -> list[StepReport]:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, HEADS, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, len(LAYERS), enable_nested_tensor=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    memory = ap.MemoryWriter()
    probe = ap.AttentionProbe(
        model,
        every_n_steps=3,
        statistics="all",
        alarms=[LogitExplosion(threshold=2.0, patience=2)],
        action="record",
        maps=[LAYERS[1]],
        writers=[memory, ap.TensorBoardWriter(directory)],
    )
    with probe:
        for _ in range(steps):
            x = torch.randn(4, 16, 32)
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            probe.step(loss)
    return memory.reports

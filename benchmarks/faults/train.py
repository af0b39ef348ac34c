"""One run, watched: its losses, its gradients' sizes, and a report every ten steps."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from attnprobe import AttentionProbe
from attnprobe.report import StepReport
from benchmarks.faults.injections import SEVERITIES
from benchmarks.faults.model import Transformer
from benchmarks.faults.setup import Setup
from benchmarks.faults.tasks import IGNORED, TASKS, Batch

WIDTH, BATCH, EVERY = 32, 16, 10
RATES = {"sgd": 0.2, "adamw": 3e-3}
#: Tasks that are unstable at the rate of the others.
OF_TASK = {("digits", "sgd"): 0.05, ("order", "sgd"): 0.1}
WARM_UP, CLIP = 50, 1.0
#: Of the initial weights: torch's own for linear layers of this width, and GPT-2's.
SPREAD = {"sgd": 0.1, "adamw": 0.02}
#: What is logged beside the core statistics: what rules read that do not run by default.
STATISTICS = (
    "core", "head_similarity", "output_stable_rank", "future_mass", "padding_mass", "hidden_tokens",
)  # fmt: skip
#: Heights of what is built into a healthy variant: a bias for the first key, and for the one before.
SINK, SHARP = 4.0, 15.0


@dataclass
class Run:
    """What became of a setup; ``losses`` and ``gradients`` (norms before clipping) have one entry per step."""

    setup: Setup
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)


def train(setup: Setup) -> Run:
    """Train ``setup`` to its end, whatever happens."""
    torch.manual_seed(setup.seed)
    task, fault, run = TASKS[setup.task], setup.injected, Run(setup)
    level = dict(zip(SEVERITIES, fault.levels, strict=False)).get(setup.severity, math.nan)
    model = build(setup)
    fault.prepare(model, level)
    rate, warm_up = fault.schedule(_rate(setup), WARM_UP, level)
    optimizer = optimizer_for(model, setup.optimizer, rate)
    data = Generator().manual_seed(setup.seed + 1)
    noise = Generator().manual_seed(setup.seed + 2)
    padded = setup.variant == "padded"
    reference = task.batch(Generator().manual_seed(setup.seed + 3), 4, setup.length, padded=False).inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with AttentionProbe(
            model, every_n_steps=EVERY, statistics=STATISTICS, alarms=(), reference_batch=reference
        ) as probe:
            for step in range(setup.steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / max(1, warm_up))
                if step == fault.start:
                    fault.inject(model, level)
                batch = task.batch(data, BATCH, setup.length, padded=padded)
                if step >= fault.start:
                    batch = fault.spoil(batch, level, step, noise)
                tokens = torch.arange(setup.length) < batch.lengths[:, None] if padded else None
                if tokens is not None:
                    probe.token_mask(tokens)
                with fault.precision(step):
                    loss = loss_of(model(batch.inputs, tokens), batch)
                loss.backward()
                run.gradients.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)))
                optimizer.step()
                optimizer.zero_grad()
                if step >= fault.start:
                    fault.each_step(model, level)
                run.losses.append(float(loss.detach()))
                report = probe.step(loss)
                if report is not None:
                    run.reports.append(report)
    return run


def _rate(setup: Setup) -> float:
    return OF_TASK.get((setup.task, setup.optimizer), RATES[setup.optimizer])


def build(setup: Setup) -> Transformer:
    task = TASKS[setup.task]
    model = Transformer(
        symbols=task.symbols,
        features=task.features,
        classes=task.classes,
        length=setup.length,
        layers=setup.layers,
        heads=setup.heads,
        width=WIDTH,
        causal=task.causal,
        pooled=setup.task in ("majority", "digits"),
        post=setup.variant == "post",
        norm_keys=setup.variant == "qk-norm",
        spread=SPREAD[setup.optimizer] * (2 if setup.variant == "wide" else 1),
    )
    for attention in model.attentions:
        if setup.variant == "sink":
            attention.bias = SINK * (torch.arange(setup.length) == 0).float()
        if setup.variant == "sharp":
            place = torch.arange(setup.length)
            before = (place == (place[:, None] - 1).clamp(min=0)).float()
            which = (torch.arange(setup.heads) < setup.heads // 2)[:, None, None].float()
            attention.bias = SHARP * before * which
    return model


def optimizer_for(model: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)


def loss_of(predictions: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(predictions.float().flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORED)

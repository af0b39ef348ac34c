"""LayerNorm on values, residual connections and four heads, under SGD and Adam, on the retrieval and Markov tasks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import Architecture, Ensemble
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.markov.model import FORM as MARKOV
from attnprobe.experiments.markov.task import entropy_rate, task
from attnprobe.experiments.paper.base import Setting, interval, text
from attnprobe.experiments.paper.style import COLORS, bars, plain_axes
from attnprobe.experiments.retrieval import FORM as RETRIEVAL
from attnprobe.experiments.retrieval import look, retrieval

CLAIM = "routing and values specialise in the same way with LayerNorm on values, residual connections and several heads"
SEEDS, STEPS, LENGTH, SEQUENCES = 10, 1000, 200, 64
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LayerNorm on values": {"value_norm": True},
    "residual": {"residual": True},
    "4 heads": {"heads": 4},
    "all three": {"value_norm": True, "residual": True, "heads": 4},
}
#: Rates at which the plain model learns within the steps.
ARMS = {
    "retrieval": (Arm("sgd", rate=1.0), Arm("adam", "adam", rate=0.003)),
    "markov": (Arm("sgd", rate=0.3), Arm("adam", "adam", rate=0.003)),
}

Job = tuple[str, str, Arm, Setting]


def measure(setting: Setting) -> dict[str, Any]:
    jobs: list[Job] = [(where, name, arm, setting) for where in ARMS for arm in ARMS[where] for name in VARIANTS]
    results = each(_run, jobs, jobs=setting.jobs)
    rows = [
        {"task": where, "variant": name, "optimizer": arm.label, "rate": arm.rate, **found}
        for (where, name, arm, _), found in zip(jobs, results, strict=True)
    ]
    return {"length": LENGTH, "entropy_rate": entropy_rate("clean"), "runs": rows}


def _run(job: Job) -> dict[str, Any]:
    where, name, arm, setting = job
    form: Architecture = dataclasses.replace(RETRIEVAL if where == "retrieval" else MARKOV, **VARIANTS[name])
    data = retrieval(setting.seeds) if where == "retrieval" else task("clean", LENGTH, setting.seeds, count=SEQUENCES)
    model = Ensemble(form, setting.seeds)
    course = train(model, data, arm, setting.steps, probe={}, events=_events(setting.directory, job))
    best, half = course.held_out.min(0), math.log(8) / 2
    found = {
        "best_held_out": interval(best),
        "final_held_out": interval(course.held_out[-1]),
        "steps_to_half": interval(course.held_below([half] * len(setting.seeds)) if where == "retrieval" else []),
    }
    if where == "markov":
        entropy = torch.from_numpy(course.final("normalized_entropy")).view(len(setting.seeds), form.heads)
        return found | {"entropy": interval(entropy.mean(1).numpy())}
    weights, entropy = look(model, data.held_x)
    return found | {
        "entropy": interval(entropy.mean(1).numpy()),
        "correct_weight": interval(weights.nanmean(2).amax(1).numpy()),
    }


def _events(directory: Path, job: Job) -> Path:
    where, name, arm, _ = job
    return directory / f"{where}-{arm.name}-{name.replace(' ', '_')}"


def describe(result: dict[str, Any]) -> list[str]:
    lines = []
    for where in ARMS:
        least = (
            f"lowest possible loss {result['entropy_rate']:.3f}" if where == "markov" else "knowing nothing costs 2.079"
        )
        lines.append(f"{where} ({least})")
        for run in (run for run in result["runs"] if run["task"] == where):
            right = (
                f", the best head's weight on the right token {text(run['correct_weight'], 2)}"
                if where == "retrieval"
                else ""
            )
            lines.append(
                f"  {run['optimizer']:4} {run['variant']:19} held-out loss {text(run['best_held_out'])}, "
                f"entropy {text(run['entropy'], 2)}{right}"
            )
    return [*lines, "(means and 95% intervals over seeds; the held-out loss is the lowest of the run)"]


def draw(result: dict[str, Any], figure: Any) -> None:
    figure.set_size_inches(13, 7.5)
    columns = (
        ("best_held_out", "lowest held-out loss"),
        ("entropy", "entropy / ln n at the end"),
        ("correct_weight", "right token's weight, best head"),
    )
    grid = figure.subplots(2, 3)
    for row, where in enumerate(ARMS):
        runs = [run for run in result["runs"] if run["task"] == where]
        colors = [COLORS[[arm.label for arm in ARMS[where]].index(run["optimizer"])] for run in runs]
        labels = [f"{run['optimizer']}: {run['variant']}" for run in runs]
        for axes, (name, title) in zip(grid[row], columns, strict=True):
            if name not in runs[0]:
                axes.axis("off")
                continue
            plain_axes(axes, f"{where}: {title}")
            bars(axes, labels, [run[name] for run in runs], colors)
            axes.locator_params(axis="x", nbins=4)
            if axes is not grid[row][0]:
                axes.set_yticklabels([])
        if where == "markov":
            grid[row][0].axvline(result["entropy_rate"], color="0.4", linestyle=":")
            low = min(run["best_held_out"]["mean"] for run in runs)
            grid[row][0].set_xlim(min(low, result["entropy_rate"]) - 0.05)

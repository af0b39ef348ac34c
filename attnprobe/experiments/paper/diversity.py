"""Query diversity, from identical over clustered to uniform, on the retrieval task."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import Ensemble
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.paper.base import Setting, interval, text
from attnprobe.experiments.paper.style import COLORS, plain_axes
from attnprobe.experiments.retrieval import FORM, look, retrieval

CLAIM = "heads and values specialise only where queries are diverse enough: identical queries give no specialisation"
SEEDS, STEPS = 10, 1000
KINDS = (1, 2, 4, 8)
ARMS = (Arm("sgd", rate=1.0), Arm("adam", "adam", rate=0.003))
HEADS = (1, 4)
MEASURED = {
    "final_held_out": "held-out loss at the end (nats)",
    "steps_to_half": "steps to half the first loss",
    "entropy": "attention entropy / ln n of the queries",
    "correct_weight": "weight on the right token",
    "error_diversity": "diversity of the errors u at the start",
}

Job = tuple[int, int, Arm, Setting]


def measure(setting: Setting) -> dict[str, Any]:
    jobs: list[Job] = [(kinds, heads, arm, setting) for arm in ARMS for heads in HEADS for kinds in KINDS]
    results = each(_run, jobs, jobs=setting.jobs)
    rows = [
        {"kinds": kinds, "heads": heads, "optimizer": arm.label, "rate": arm.rate, **found}
        for (kinds, heads, arm, _), found in zip(jobs, results, strict=True)
    ]
    return {"runs": rows}


def _run(job: Job) -> dict[str, Any]:
    kinds, heads, arm, setting = job
    data = retrieval(setting.seeds, kinds=kinds)
    model = Ensemble(dataclasses.replace(FORM, heads=heads), setting.seeds)
    course = train(
        model,
        data,
        arm,
        setting.steps,
        probe={"statistics": ["core", "error_diversity"]},
        events=setting.directory / f"{arm.name}-{heads}heads-{kinds}kinds",
    )
    weights, entropy = look(model, data.held_x)
    halves = course.held_below([math.log(8) / 2] * len(setting.seeds))
    diversity = course.statistics["error_diversity"][0, 0].reshape(len(setting.seeds), heads)
    return {
        "final_held_out": interval(course.held_out[-1]),
        "steps_to_half": interval(halves),
        "entropy": interval(entropy.mean(1).numpy()),
        "correct_weight": interval(weights.nanmean(2).amax(1).numpy()),
        "error_diversity": interval(diversity.mean(1)),
    }


def describe(result: dict[str, Any]) -> list[str]:
    lines = []
    for run in result["runs"]:
        heads = f"{run['heads']} head{'s' if run['heads'] > 1 else ' '}"
        lines += [
            f"{run['optimizer']:4} {heads}, {run['kinds']} of 8 keys asked for: held-out loss "
            f"{text(run['final_held_out'])}, half the loss at step {text(run['steps_to_half'], 0)}",
            f"  {'':25}entropy {text(run['entropy'], 2)}, the best head's weight on the right token "
            f"{text(run['correct_weight'], 2)}",
        ]
    alike = [run for run in result["runs"] if run["kinds"] == 1]
    learned = sum(run["correct_weight"]["low"] is not None and run["correct_weight"]["low"] > 0.5 for run in alike)
    lines.append(
        f"With identical queries some head has most of its attention on the right token in {learned} of {len(alike)} "
        "settings (by the lower end of the interval; uniform attention has 0.06)."
    )
    return lines


def draw(result: dict[str, Any], figure: Any) -> None:
    figure.set_size_inches(15, 3.6)
    for axes, (name, title) in zip(figure.subplots(1, len(MEASURED)), MEASURED.items(), strict=True):
        series = [(arm.label, heads) for arm in ARMS for heads in HEADS]
        for color, (optimizer, heads) in zip(COLORS, series, strict=False):
            runs = [run for run in result["runs"] if (run["optimizer"], run["heads"]) == (optimizer, heads)]
            found = [run[name] for run in runs]
            label = f"{optimizer}, {heads} head{'s' if heads > 1 else ''}"
            axes.plot(KINDS, [each["mean"] for each in found], marker="o", color=color, label=label)
            if all(each["low"] is not None for each in found):
                axes.fill_between(
                    KINDS, [e["low"] for e in found], [e["high"] for e in found], color=color, alpha=0.15, linewidth=0
                )
        plain_axes(axes, title, "kinds of queries (1 = identical)")
        axes.title.set_fontsize(8.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(KINDS, [str(kinds) for kinds in KINDS])
    axes.legend(frameon=False, fontsize=8)

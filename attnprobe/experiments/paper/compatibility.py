"""Compatibility, advantage and attention between targets and symbols, over a training on the Markov task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import Ensemble
from attnprobe.experiments.ensemble.pairs import Pairs, pairs
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.markov.task import SYMBOLS, sequences, task, transitions
from attnprobe.experiments.paper.base import Setting, interval, text
from attnprobe.experiments.paper.style import COLORS, plain_axes
from attnprobe.experiments.toy import train as train_toy

CLAIM = (
    "scores rise where the advantage A = -(b - E[b]) is positive, so that queries come to attend to the values "
    "that lower their loss; the error pulls values towards the queries that use them"
)
SEEDS, STEPS, LENGTH = 10, 1000, 500
#: Arm, and how many training sequences take turns.
ARMS = {
    "sgd": (Arm.of("sgd"), 1),
    "v10": (Arm.of("v10"), 1),
    "adam": (Arm("adam", "adam", rate=0.003), 64),
}
LOOKED_AT = 4
QUANTITIES = {
    "compatibility": "compatibility b",
    "advantage": "advantage A",
    "attention": "attention / uniform",
}

Job = tuple[str, Setting, list[int]]


def measure(setting: Setting) -> dict[str, Any]:
    moments = sorted({0, setting.steps // 10, setting.steps // 3, setting.steps})
    jobs: list[Job] = [(name, setting, moments) for name in ARMS]
    arms = dict(zip(ARMS, each(_arm, jobs, jobs=setting.jobs), strict=True))
    toy = interval([float(train_toy(seed=seed).followed.mean()) for seed in setting.seeds])
    return {"length": LENGTH, "moments": moments, "arms": arms, "toy_scores_follow_advantage": toy}


def _arm(job: Job) -> dict[str, Any]:
    name, setting, moments = job
    arm, count = ARMS[name]
    data = task("clean", LENGTH, setting.seeds, count=count)
    x, y = data.x[:LOOKED_AT], data.y[:LOOKED_AT]
    symbols = [[one.z for one in sequences("clean", LENGTH, seed, len(x))] for seed in setting.seeds]
    z = torch.stack([torch.stack(of_seed) for of_seed in symbols], 1)
    maps: list[dict[str, Tensor]] = []  # of each moment, [S, 8, 8]
    followed: list[Tensor] = []
    before: list[tuple[Pairs, Tensor]] = []

    def observe(step: int, model: nn.Module) -> None:
        assert isinstance(model, Ensemble)
        if before:  # the step after a moment
            found, seen = before.pop()
            followed.append(_followed(found, model.layer(0).scores(seen).detach()))
        if step in moments:
            maps.append(_by_symbol(pairs(model, x, y), y, z))
        if step in (*moments[:-1], setting.steps - 1):  # the steps that come right after a moment, and the last one
            before.append((pairs(model, *data.at(step)), data.at(step)[0]))

    course = train(
        Ensemble(FORM, setting.seeds),
        data,
        arm,
        setting.steps,
        probe={"maps": "attention.0:0", "uninformed_loss": math.log(SYMBOLS)},
        events=setting.directory / name,
        observe=observe,
    )
    wanted = transitions("clean").T.float()  # [target, symbol before]: how likely the key's symbol makes the target
    first, last = maps[0], maps[-1]
    return {
        "label": arm.label + (f", {count} sequences in turn" if count > 1 else ""),
        "rate": arm.rate,
        "final_loss": interval(course.losses[-1]),
        "final_held_out": interval(course.held_out[-1]),
        "maps": {q: [moment[q].mean(0).tolist() for moment in maps] for q in QUANTITIES},
        "compatibility_with_transition": [interval(_correlation(-m["compatibility"], wanted)) for m in maps],
        "attention_with_advantage": [interval(_correlation(m["attention"].log(), m["advantage"])) for m in maps],
        "first_advantage_with_change_of_attention": interval(
            _correlation(last["attention"].log() - first["attention"].log(), first["advantage"])
        ),
        "scores_follow_advantage": [interval(share.numpy()) for share in followed],
    }


def _by_symbol(found: Pairs, y: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Means over the visible pairs of target ``y`` and key's symbol ``z`` (both ``[B, S, T]``): ``[S, 8, 8]``."""
    targets, symbols = (nn.functional.one_hot(t, SYMBOLS).float() for t in (y, z))
    visible = torch.ones(LENGTH, LENGTH).tril()
    uniform = visible / visible.sum(1, keepdim=True)

    def total(matrix: Tensor) -> Tensor:
        return (targets.mT @ (matrix * visible) @ symbols).sum(0)

    count = total(visible)
    # The error at a position is that of a mean over all of them: b of one position's own loss is so many times larger.
    positions = y.shape[0] * y.shape[2]
    return {
        "compatibility": total(found.compatibility) / count * positions,
        "advantage": total(found.advantage) / count * positions,
        "attention": total(found.attention) / total(uniform),
    }


def _followed(before: Pairs, after: Tensor) -> Tensor:
    """``[S]``: share of the visible pairs whose score changed in a step with the sign of its advantage."""
    visible = before.scores[0].isfinite()
    same = (after[0] - before.scores[0]).sign() == before.advantage[0].sign()
    return (same & visible).sum((1, 2)) / visible.sum((1, 2))


def _correlation(left: Tensor, right: Tensor) -> list[float]:
    """Of 8 x 8 maps, one for each seed, without their row means: what matters is what a query prefers."""
    right = right.expand_as(left)
    a, b = (m - m.mean(-1, keepdim=True) for m in (left, right))
    return ((a * b).sum((1, 2)) / (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()).tolist()


def describe(result: dict[str, Any]) -> list[str]:
    lines = []
    for arm in result["arms"].values():
        ends = {name: [text(arm[name][i], 2) for i in (0, -1)] for name in _TITLES}
        lines += [
            f"{arm['label']}: loss {text(arm['final_loss'])}, held out {text(arm['final_held_out'])}",
            *(f"  {title}: {' -> '.join(ends[name])}" for name, title in _TITLES.items()),
            "  the advantage before training foretells where attention goes (correlation): "
            + text(arm["first_advantage_with_change_of_attention"], 2),
        ]
    return [
        *lines,
        f"The toy (attnprobe toy): {text(result['toy_scores_follow_advantage'], 2)} of its scores move with the sign "
        "of their advantage, on average over 200 steps.",
        "(95% intervals over seeds; from the first moment to the last)",
    ]


_TITLES = {
    "compatibility_with_transition": "-b is high where the key's symbol makes the target likely (correlation)",
    "attention_with_advantage": "attention is high where the advantage is (correlation)",
    "scores_follow_advantage": "share of scores that a step moves as their advantage asks",
}


def draw(result: dict[str, Any], figure: Any) -> None:
    moments, arms = result["moments"], result["arms"]
    figure.set_size_inches(16, 8.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.9, 1))
    for sub, arm in zip(top.subfigures(1, len(arms), wspace=0.02), arms.values(), strict=True):
        sub.suptitle(arm["label"], fontsize=11)
        grid = sub.subplots(len(QUANTITIES), len(moments), sharex=True, sharey=True)
        for row, (quantity, title) in enumerate(QUANTITIES.items()):
            maps = np.array(arm["maps"][quantity])
            middle = 1.0 if quantity == "attention" else 0.0
            bound = float(np.abs(maps - middle).max())
            for column, step in enumerate(moments):
                axes = grid[row, column]
                image = axes.imshow(maps[column], cmap="PuOr_r", vmin=middle - bound, vmax=middle + bound)
                axes.set_xticks([0, SYMBOLS - 1])
                axes.set_yticks([0, SYMBOLS - 1])
                axes.tick_params(length=0, labelsize=7)
                if row == 0:
                    axes.set_title(f"step {step}", fontsize=9)
                if column == 0:
                    axes.set_ylabel(f"{title}\ntarget", fontsize=8.5)
            sub.colorbar(image, ax=grid[row, :], shrink=0.8).ax.tick_params(labelsize=7)
        sub.supxlabel("symbol behind the key", fontsize=9)
    for axes, (name, title) in zip(bottom.subplots(1, 3), _TITLES.items(), strict=True):
        for color, arm in zip(COLORS, arms.values(), strict=False):
            curve = [moment["mean"] for moment in arm[name]]
            low, high = ([moment[end] for moment in arm[name]] for end in ("low", "high"))
            axes.plot(moments[: len(curve)], curve, marker="o", color=color, label=arm["label"])
            if None not in low:
                axes.fill_between(moments[: len(curve)], low, high, color=color, alpha=0.15, linewidth=0)
        plain_axes(axes, title.removesuffix(" (correlation)"), "step")
        axes.title.set_fontsize(8.5)
        axes.axhline(0.5 if name == "scores_follow_advantage" else 0, color="0.6", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=8)

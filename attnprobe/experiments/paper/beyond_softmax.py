"""What is left of the advantage's laws in linear attention and in a state-space layer that train on the Markov task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.markov.task import task
from attnprobe.experiments.mixing.model import MECHANISMS, MixingModel
from attnprobe.experiments.mixing.watch import Watch
from attnprobe.experiments.paper.base import Setting, difference, interval, text
from attnprobe.experiments.paper.style import COLORS, bars, plain_axes

CLAIM = (
    "the laws are derived for softmax attention; whether linear attention and state-space models that route values by "
    "content have analogues of advantage and responsibility is left open"
)
SEEDS, STEPS, LENGTH, HELD_OUT = 10, 1000, 200, 4


@dataclass(frozen=True)
class Regime:
    """How a training goes: a step takes one of ``sequences`` sequences, in turn."""

    label: str
    arm: Arm
    sequences: int


#: On one sequence, every rate at which all four learn it ends in learning it by heart: the held-out loss rises.
REGIMES = {
    "paper": Regime("one sequence, SGD at 0.01", Arm("sgd"), 1),
    "fresh": Regime("64 sequences in turn, Adam at 0.003", Arm("adam", "adam", rate=0.003), 64),
}

Job = tuple[str, str, Setting]


def measure(setting: Setting) -> dict[str, Any]:
    jobs: list[Job] = [(regime, mechanism, setting) for regime in REGIMES for mechanism in reversed(MECHANISMS)]
    runs = dict(zip([job[:2] for job in jobs], each(_run, jobs, jobs=setting.jobs), strict=True))
    found = {}
    for name, regime in REGIMES.items():
        mechanisms = {mechanism: runs[name, mechanism] for mechanism in MECHANISMS}
        for one in mechanisms.values():
            for loss in ("training", "held_out"):
                one[f"{loss}_above_softmax"] = difference(one[loss], mechanisms["softmax"][loss])
        found[name] = {"label": regime.label, "mechanisms": mechanisms}
    return {"length": LENGTH, "table": _table(setting.steps), "regimes": found}


def _table(steps: int) -> list[int]:
    return sorted({0, steps // 10, steps // 3, steps - 1})


def _run(job: Job) -> dict[str, Any]:
    name, mechanism, setting = job
    regime, steps = REGIMES[name], setting.steps
    data = task("clean", LENGTH, setting.seeds, count=regime.sequences, held_out=HELD_OUT)
    watch = Watch(data, [*_table(steps), *(steps * tenth // 10 for tenth in range(10))])
    model = MixingModel(mechanism, FORM, setting.seeds, LENGTH)
    events = setting.directory / f"{name}-{mechanism}"
    probe: dict[str, Any] | None = {} if mechanism == "softmax" else None  # which sees nothing else
    course = train(model, data, regime.arm, steps, probe=probe, events=events, observe=watch.observe)
    with SummaryWriter(str(events / "routing")) as board:
        for quantity, course_of in watch.found.items():
            for step, value in zip(watch.steps, course_of, strict=True):
                board.add_scalar(f"routing/{quantity}", float(value.mean()), step)
    found = {quantity: [interval(value.numpy()) for value in moments] for quantity, moments in watch.found.items()}
    above = [(a - b).numpy() for a, b in zip(watch.found["followed"], watch.found["by_chance"], strict=True)]
    return {
        "moments": watch.steps,
        **found,
        "above_chance": [interval(values) for values in above],
        "largest_error": float(torch.stack(watch.found["error"]).max()),
        "foretold": {which: interval(value.numpy()) for which, value in watch.foretold().items()},
        "training": interval(course.losses[-max(1, steps // 10) :].mean(0)),
        "held_out": interval(course.held_out[-1]),
        "lowest_held_out": interval(course.held_out.min(0)),
        "held_out_curve": [course.held_steps.tolist(), course.held_out.mean(1).tolist()],
        "training_curve": _smooth(course.losses.mean(1)),
    }


def _smooth(losses: np.ndarray[Any, Any]) -> list[list[float]]:
    """Means over tens of steps, and where these are."""
    starts = np.arange(0, len(losses), 10)
    return [(starts + 5).tolist(), [float(losses[start : start + 10].mean()) for start in starts]]


def describe(result: dict[str, Any]) -> list[str]:
    table = result["table"]
    runs = [run for regime in result["regimes"].values() for run in regime["mechanisms"].values()]
    error = max(run["largest_error"] for run in runs)
    lines = [f"{result['length']} tokens; gradients by hand are within {error:.0e} of autograd's, at every moment"]
    for regime in result["regimes"].values():
        lines.append(f"{regime['label']}:")
        for name, run in regime["mechanisms"].items():
            above = {
                loss: f", minus softmax's {text(run[f'{loss}_above_softmax'])}" for loss in ("held_out", "training")
            }
            last = difference(run["followed"][-1], regime["mechanisms"]["softmax"]["followed"][-1])
            following = f"; the last minus softmax's {text(last)}"
            if name == "softmax":
                above, following = dict.fromkeys(above, ""), ""
            lines += [
                f"  {MECHANISMS[name]}: held-out loss {text(run['held_out'])}{above['held_out']}; "
                f"training {text(run['training'])}{above['training']}",
                f"    weights moved as their advantage asks: {_at(run, 'followed', table)}{following}",
                f"    that is above chance by {_at(run, 'above_chance', table)}: {verdict(run, table)}",
                f"    weighted by their gradients: {_at(run, 'push_followed', table)}",
                f"    entropy {_ends(run, 'entropy')}; relative spread of the advantage {_ends(run, 'spread')}; "
                f"part of its square common to a row {_ends(run, 'common')}",
                f"    first advantage with all change of the mixing (correlation): {text(run['foretold']['all'], 2)}; "
                f"within rows {text(run['foretold']['rows'], 2)}",
            ]
            if "retention_followed" in run:
                chance = zip(run["retention_followed"], run["retention_by_chance"], strict=True)
                more = {"moments": run["moments"], "above": [difference(*pair) for pair in chance]}
                lines += [
                    f"    retention moved against the flow: {_at(run, 'retention_followed', table)}",
                    f"    that is above chance by {_at(more, 'above', table)}",
                    f"    weighted by the flow: {_at(run, 'retention_push_followed', table)}",
                ]
    moments = ", ".join(map(str, table))
    return [*lines, f"(95% intervals over seeds; at the steps {moments}, or from the first to the last)"]


def _at(run: dict[str, Any], quantity: str, table: list[int]) -> str:
    return "; ".join(text(run[quantity][run["moments"].index(step)]) for step in table)


def _ends(run: dict[str, Any], quantity: str) -> str:
    return " -> ".join(text(run[quantity][end], 2) for end in (0, -1))


def verdict(run: dict[str, Any], table: list[int]) -> str:
    """At how many of the table's moments more weights follow than by chance, by the intervals over seeds."""
    found = [run["above_chance"][run["moments"].index(step)] for step in table]
    if any(one["low"] is None for one in found):
        return "too few seeds to tell"
    more, less = sum(one["low"] > 0 for one in found), sum(one["high"] < 0 for one in found)
    return f"more at {more} of {len(found)} moments" + (f", fewer at {less}" if less else "")


def draw(result: dict[str, Any], figure: Any) -> None:
    figure.set_size_inches(17, 8.5)
    rows = figure.subfigures(2, 1, hspace=0.04)
    labels = ["softmax", "linear,\nnormalised", "linear,\nunnormalised", "selective\nstate space"]
    for first, sub, regime in zip((True, False), rows, result["regimes"].values(), strict=True):
        sub.suptitle(regime["label"], fontsize=12, x=0.01, ha="left", weight="bold")
        loss, entropy, follow, foretold = sub.subplots(1, 4, width_ratios=(1, 1, 1.15, 0.9))
        runs = regime["mechanisms"]
        for color, (name, run) in zip(COLORS, runs.items(), strict=False):
            loss.plot(*run["held_out_curve"], color=color, label=MECHANISMS[name])
            loss.plot(*run["training_curve"], color=color, linewidth=0.9, linestyle=":")
            _band(entropy, run["moments"], run["entropy"], color)
            _band(follow, run["moments"], run["followed"], color)
            if "retention_followed" in run:
                _band(follow, run["moments"], run["retention_followed"], color, linestyle="--")
        follow.axhline(0.5, color="0.4", linewidth=1, linestyle=":")
        plain_axes(loss, "loss: held-out (dotted: training)", "step", "nats")
        plain_axes(entropy, "entropy of |M| / that of equal weights", "step")
        plain_axes(follow, "moved by a step as its advantage asks (dashed: retention)", "step")
        plain_axes(foretold, "first advantage and change of mixing", "correlation over the pairs of a row")
        bars(foretold, labels, [run["foretold"]["rows"] for run in runs.values()], COLORS)
        foretold.axvline(0, color="0.4", linewidth=0.8)
        follow.set_ylim(0.36, 0.62)
        foretold.set_xlim(-0.1, 0.22)
        if first:
            loss.set_ylim(1.75, 2.35)  # a layer that learns one sequence by heart leaves it
            loss.legend(frameon=False, fontsize=8)


def _band(axes: Any, steps: list[int], found: list[dict[str, Any]], color: str, **style: Any) -> None:
    """Means with the intervals behind them."""
    nan = float("nan")
    mean, low, high = ([nan if one[key] is None else one[key] for one in found] for key in ("mean", "low", "high"))
    axes.plot(steps, mean, color=color, marker="o", markersize=3, **style)
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)

"""Two time scales: does attention settle before the values, and is the routing gradient larger early?"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.intervals import differences
from attnprobe.experiments.ensemble.model import Ensemble
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.settling import Settling
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.markov.model import FORM as MARKOV
from attnprobe.experiments.markov.task import task
from attnprobe.experiments.paper.base import Setting, interval, text
from attnprobe.experiments.paper.style import COLORS, bars, plain_axes
from attnprobe.experiments.retrieval import FORM as RETRIEVAL
from attnprobe.experiments.retrieval import KEYS, retrieval

CLAIM = (
    "frame-precision dissociation: attention (the frame) is in place early, while the values go on to be refined; "
    "routing gradients dominate early, value gradients late"
)
SEEDS, STEPS, LENGTH, SEQUENCES = 10, 1000, 200, 64
EVERY, QUERIES = 10, 16
#: Of the way to the last state, how much is left.
MARKS = {"half": 0.5, "90%": 0.1}
#: Base rates at which the plain model learns within the steps; on one Markov sequence it would learn that by heart.
RATES = {
    "retrieval": {"sgd": 1.0, "momentum": 0.1, "adam": 0.003, "adamw": 0.003, "v10": 0.3},
    "markov": {"sgd": 0.3, "momentum": 0.03, "adam": 0.003, "adamw": 0.003, "v10": 0.1},
}

Job = tuple[str, Arm, Setting]


def measure(setting: Setting) -> dict[str, Any]:
    jobs: list[Job] = [
        (where, _with_rate(name, rate), setting) for where, rates in RATES.items() for name, rate in rates.items()
    ]
    results = each(_run, jobs, jobs=setting.jobs)
    rows = [
        {"task": where, "arm": arm.label, "rate": arm.rate, **found}
        for (where, arm, _), found in zip(jobs, results, strict=True)
    ]
    return {"length": LENGTH, "every": EVERY, "runs": rows}


def _with_rate(name: str, rate: float) -> Arm:
    arm = Arm.of(name)
    return Arm(arm.name, arm.optimizer, arm.part, arm.times, rate=rate)


def _run(job: Job) -> dict[str, Any]:
    where, arm, setting = job
    on_markov = where == "markov"
    data = task("clean", LENGTH, setting.seeds, count=SEQUENCES) if on_markov else retrieval(setting.seeds)
    model = Ensemble(MARKOV if on_markov else RETRIEVAL, setting.seeds)
    layer = model.layer(0)
    # Where attention is looked at: evenly spaced queries, or the queries that have a loss.
    rows = torch.linspace(QUERIES, LENGTH - 1, QUERIES).long() if on_markov else torch.arange(KEYS, 2 * KEYS)

    def look() -> dict[str, Tensor]:
        value = layer.project(data.held_x)[2]
        attention = layer.scores(data.held_x).softmax(-1)[:, :, rows]
        direction = value / value.norm(dim=-1, keepdim=True)
        found = {"attention": attention, "values": value, "directions": direction}
        return {name: tensor.transpose(0, 1) for name, tensor in found.items()}

    settling = Settling(look)
    squares: dict[str, Tensor] = {}  # of the gradients of the step before, which the loop forgets
    ratios: list[Tensor] = []
    for name in ("W_Q", "W_K", "W_V"):
        keep = partial(_keep_square, squares, name)
        getattr(layer, name).register_hook(keep)

    def observe(step: int, _: nn.Module) -> None:
        if squares:
            ratios.append(((squares["W_Q"] + squares["W_K"]) / squares["W_V"]).sqrt())
        if step % EVERY == 0 or step == setting.steps:
            settling.snap(step)

    events = setting.directory / f"{where}-{arm.name}"
    course = train(model, data, arm, setting.steps, probe={}, events=events, observe=observe)
    times = {
        mark: {name: settling.settled(name, left) for name in ("attention", "values", "directions")}
        for mark, left in MARKS.items()
    }
    ratio = torch.stack(ratios)
    tenth = max(1, setting.steps // 10)
    return {
        "final_held_out": interval(course.held_out[-1]),
        "settled": {mark: {name: interval(each_seed) for name, each_seed in of.items()} for mark, of in times.items()},
        "values_later": {mark: interval(differences(of["values"], of["attention"])) for mark, of in times.items()},
        "routing_over_value_gradient": {
            "first tenth": interval(ratio[:tenth].mean(0).numpy()),
            "last tenth": interval(ratio[-tenth:].mean(0).numpy()),
        },
        "steps": settling.steps,
        "remaining": {name: np.nanmean(settling.remaining(name), 1).tolist() for name in times["half"]},
    }


def _keep_square(squares: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    squares[name] = gradient.flatten(1).double().square().sum(1)


def verdict(run: dict[str, Any], mark: str, steps: int) -> str:
    """Who is there first, by the interval of the difference over seeds."""
    later = run["values_later"][mark]
    times = [run["settled"][mark][name]["mean"] for name in ("attention", "values")]
    if None in times or max(times) > 0.9 * steps:
        return "still moving"
    if later["low"] is None or later["low"] <= 0 <= later["high"]:
        return "not told apart"
    return "attention first" if later["mean"] > 0 else "values first"


def describe(result: dict[str, Any]) -> list[str]:
    lines = ["Steps until half, and 90%, of the way to the last state is done, on held-out sequences:"]
    for run in result["runs"]:
        lines.append(
            f"  {run['task']}, {run['arm']} (rate {run['rate']:g}): held-out loss {text(run['final_held_out'])}"
        )
        for mark, found in run["settled"].items():
            times = ", ".join(f"{name} {text(of, 0)}" for name, of in found.items())
            lines.append(f"    {mark}: {times}: {verdict(run, mark, result['steps'])}")
        early, late = (text(found, 2) for found in run["routing_over_value_gradient"].values())
        lines.append(f"    |gradient of W_Q, W_K| / |gradient of W_V|: first tenth {early}, last tenth {late}")
    return [*lines, "(directions: values without their norms; 'still moving': after 90% of the run)"]


def draw(result: dict[str, Any], figure: Any) -> None:
    figure.set_size_inches(15, 7.5)
    columns = len(result["runs"]) // 2
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    grid = top.subplots(2, columns, sharex=True, sharey=True)
    for axes, run in zip(grid.flat, result["runs"], strict=True):
        for color, (name, curve) in zip(COLORS, run["remaining"].items(), strict=False):
            axes.plot(run["steps"], curve, color=color, label=name)
        for left in MARKS.values():
            axes.axhline(left, color="0.6", linestyle=":", linewidth=1)
        plain_axes(axes, f"{run['task']}, {run['arm']}")
        axes.title.set_fontsize(9.5)
    grid[0, 0].legend(frameon=False, fontsize=8)
    top.supylabel("distance to the end / at the start", fontsize=9)
    top.supxlabel("step", fontsize=9)
    left, right = bottom.subplots(1, 2)
    labels = [f"{run['task']}, {run['arm']}" for run in result["runs"]]
    plain_axes(left, "how many steps after attention values are half way (left of 0: before it)")
    bars(left, labels, [run["values_later"]["half"] for run in result["runs"]], [COLORS[1]] * len(labels))
    plain_axes(right, "|gradient of W_Q, W_K| / |gradient of W_V| in the first tenth; x: in the last")
    early = [run["routing_over_value_gradient"]["first tenth"] for run in result["runs"]]
    bars(right, labels, early)
    late = [run["routing_over_value_gradient"]["last tenth"]["mean"] for run in result["runs"]]
    right.plot(late, range(len(labels)), "x", color=COLORS[6])

"""Dimension, ring, entropy and prototypes of values and outputs on held-out sequences, before and after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import Attention, Ensemble
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.markov.task import SYMBOLS, Protocol, Sequence, sequences, task, transitions
from attnprobe.experiments.paper.base import Setting, interval
from attnprobe.experiments.paper.manifold_measures import FIRST, Known, geometry_of
from attnprobe.experiments.paper.manifold_picture import draw
from attnprobe.experiments.paper.manifold_words import describe
from attnprobe.geometry import common_basis, effective_dimension, linear_fit, random_baseline

__all__ = ["CLAIM", "SEEDS", "STEPS", "describe", "draw", "measure"]

CLAIM = (
    "values come to lie on a low-dimensional manifold that the task's variable parametrises; on it the posterior "
    "entropy is the first principal component"
)
SEEDS, STEPS, LENGTH, SNAPSHOTS = 10, 1000, 500, 20
TASKS: tuple[Protocol, ...] = ("clean", "varied")
#: Everything x3.16 takes as large a step as V x10, without its preference for values. Adam at 0.001 would memorise the
#: training sequence within 200 steps; at 0.0001 the held-out loss falls for 800.
ARMS = (Arm.of("sgd"), Arm.of("v10"), Arm.of("all3.16"), Arm("adam", "adam", rate=0.0001))

Job = tuple[Protocol, Arm, Setting]


def measure(setting: Setting) -> dict[str, Any]:
    jobs: list[Job] = [(protocol, arm, setting) for protocol in TASKS for arm in ARMS]
    results = each(_run, jobs, jobs=setting.jobs)
    rows = [
        {"task": protocol, "arm": arm.label, "rate": arm.rate, **found}
        for (protocol, arm, _), found in zip(jobs, results, strict=True)
    ]
    return {
        "length": LENGTH,
        "first": FIRST,
        "tasks": {name: _task(name, setting.seeds) for name in TASKS},
        "runs": rows,
    }


def _task(protocol: Protocol, seeds: tuple[int, ...]) -> dict[str, Any]:
    """What holds for every model: how much there is to read, and what dimension chance gives."""
    held = [sequences(protocol, LENGTH, seed)[1] for seed in seeds]
    known = [Known.of(protocol, sequence) for sequence in held]
    rows = torch.special.entr(transitions(protocol)).sum(-1)
    shape = torch.zeros(LENGTH, FORM.value_width)
    return {
        "best_loss": interval([float(k.loss.mean()) for k in known]),
        "entropy_of_symbols": rows.tolist(),
        "why_undefined": linear_fit(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), rows).reason,
        "entropy_spread": interval([float(k.entropy.std()) for k in known]),
        "entropy_range": [[float(k.entropy.quantile(q)) for q in (0.05, 0.95)] for k in known],
        "most_frequent": interval([float(k.symbol.bincount(minlength=SYMBOLS).max() / len(k.symbol)) for k in known]),
        "gaussian": random_baseline(shape, effective_dimension).mean(),
        "random_weights": interval([random_baseline(shape, inputs=sequence.x).mean() for sequence in held]),
    }


def _run(job: Job) -> dict[str, Any]:
    protocol, arm, setting = job
    data = task(protocol, LENGTH, setting.seeds)
    held = [sequences(protocol, LENGTH, seed)[1] for seed in setting.seeds]
    known = [Known.of(protocol, sequence) for sequence in held]
    model = Ensemble(FORM, setting.seeds)
    layer = model.layer(0)
    looks: list[list[dict[str, float]]] = []
    started: list[Tensor] = []
    steps = sorted({round(part * setting.steps / SNAPSHOTS) for part in range(SNAPSHOTS + 1)})
    path: list[Tensor] = []  # of the first seed, at these steps

    @torch.no_grad()
    def observe(step: int, _: nn.Module) -> None:
        if step in steps:
            path.append(symbol_values(layer, held)[0])
        if step in (0, setting.steps):
            values, attention = layer.project(data.held_x)[2][0], layer.scores(data.held_x)[0].softmax(-1)
            started.append(values)
            heads = zip(values, symbol_values(layer, held), attention, known, started[0], strict=True)
            looks.append([geometry_of(*head) for head in heads])

    events = setting.directory / f"{protocol}-{arm.name}"
    course = train(model, data, arm, setting.steps, check_every=20, probe={}, events=events, observe=observe)
    before, after = ({name: [seed[name] for seed in look] for name in look[0]} for look in (looks[0], looks[-1]))
    basis = common_basis(path, steps=steps)
    with torch.no_grad():
        outputs = layer(data.held_x)[0, 0, FIRST:]
    first = common_basis([outputs], 1).points[0, :, 0]
    return {
        "held_out": {"before": interval(course.held_out[0]), "after": interval(course.held_out[-1])},
        "lowest_held_out": interval(course.held_out.min(0)),
        "measures": {
            name: {
                "before": interval(before[name]),
                "after": interval(after[name]),
                "change": interval([b - a for a, b in zip(before[name], after[name], strict=True)]),
            }
            for name in before
        },
        "trajectory": {"steps": steps, "points": basis.points.tolist(), "shares": basis.shares.tolist()},
        "scatter": {
            "pc1": first.tolist(),
            "entropy": known[0].entropy.tolist(),
            "symbol": known[0].symbol.tolist(),
            "r": after["entropy/outputs/r"][0],
        },
    }


def symbol_values(layer: Attention, held: list[Sequence]) -> Tensor:
    """``[S, 8, E]``: each symbol's value without noise, the mean over all observations of it."""
    return torch.stack([sequence.means for sequence in held]) @ layer.W_V[:, 0].detach()

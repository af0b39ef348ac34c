"""Do heads take disjoint sets of queries, do they agree, and in which order do layers settle?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.intervals import differences
from attnprobe.experiments.ensemble.model import Ensemble
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.settling import Settling
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.paper.base import Setting, difference, interval, text
from attnprobe.experiments.paper.style import COLORS, bars, plain_axes
from attnprobe.experiments.retrieval import FORM, KEYS, look, retrieval

CLAIM = "different heads specialise on different, disjoint sets of queries; lower layers settle before higher ones"
SEEDS, STEPS = 10, 1000
EVERY, PERMUTATIONS = 10, 200
#: Layers, heads, standard deviation of the first weights, and an arm that learns the task with them.
FORMS = (
    (1, 4, 0.3, Arm("sgd", rate=1.0)),
    (1, 4, 0.3, Arm("adam", "adam", rate=0.003)),
    (1, 8, 0.3, Arm("adam", "adam", rate=0.003)),
    (3, 4, 0.15, Arm("adam", "adam", rate=0.003)),
    (4, 4, 0.15, Arm("adamw", "adamw", rate=0.003)),
)

Job = tuple[int, int, float, Arm, Setting]


def measure(setting: Setting) -> dict[str, Any]:
    jobs: list[Job] = [(*form, setting) for form in FORMS]
    results = each(_run, jobs, jobs=setting.jobs)
    return {
        "runs": [
            {"layers": layers, "heads": heads, "optimizer": arm.label, "rate": arm.rate, **found}
            for (layers, heads, _, arm, _), found in zip(jobs, results, strict=True)
        ]
    }


def _run(job: Job) -> dict[str, Any]:
    layers, heads, scale, arm, setting = job
    form = dataclasses.replace(FORM, layers=layers, heads=heads, residual=layers > 1, initial_scale=scale)
    model, data = Ensemble(form, setting.seeds), retrieval(setting.seeds)
    settling = Settling(lambda: _attention(model, data.held_x))

    def observe(step: int, _: nn.Module) -> None:
        if step % EVERY == 0 or step == setting.steps:
            settling.snap(step)

    events = setting.directory / f"{arm.name}-{layers}layers-{heads}heads"
    course = train(model, data, arm, setting.steps, probe={}, events=events, observe=observe)
    # Of a deeper model, the layer in which the right token is found most.
    shares = [look(model, data.held_x, layer)[0].double().numpy() for layer in range(layers)]
    chosen = max(range(layers), key=lambda layer: float(shares[layer].max(1).mean()))
    weights = shares[chosen]
    before = _attention(Ensemble(form, setting.seeds), data.held_x)[str(chosen)]
    settled = [settling.settled(str(layer)) for layer in range(layers)]
    random = np.random.default_rng(0)
    return {
        "final_held_out": interval(course.held_out[-1]),
        "layer": chosen,
        "example": weights[0].tolist(),
        "best_head": interval(weights.max(1).mean(1)),
        "overlap": interval([overlap(each_seed) for each_seed in weights]),
        "overlap_by_chance": interval([_by_chance(each_seed, random) for each_seed in weights]),
        "owners": interval([len(set(each_seed.argmax(0))) for each_seed in weights]),
        "disagreement": interval(_disagreement(_attention(model, data.held_x)[str(chosen)], heads)),
        "disagreement_at_start": interval(_disagreement(before, heads)),
        "settled": [interval(values) for values in settled],
        "last_layer_later": interval(differences(settled[-1], settled[0])),
        "steps": settling.steps,
        "remaining": [np.nanmean(settling.remaining(str(layer)), 1).tolist() for layer in range(layers)],
    }


@torch.no_grad()
def _attention(model: Ensemble, x: Tensor) -> dict[str, Tensor]:
    """Of each layer, the rows of the queries: ``[S, B, H, 8, 16]``."""
    found = {}
    for index in range(model.form.layers):
        rows = model.layer(index).scores(model.before(index, x)).softmax(-1)[:, :, KEYS:]
        found[str(index)] = rows.unflatten(1, (len(model.seeds), -1)).transpose(0, 1)
    return found


def overlap(weights: NDArray[np.float64]) -> float:
    """Mean cosine between the heads' weights ``[H, 8]`` on the right token, by kind of query: 0 if they share none."""
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    cosines = unit @ unit.T
    heads = len(weights)
    return float((cosines.sum() - heads) / (heads * (heads - 1)))


def _by_chance(weights: NDArray[np.float64], random: np.random.Generator) -> float:
    """The same if each head took its kinds of queries without regard to the others'."""
    return float(np.mean([overlap(random.permuted(weights, axis=1)) for _ in range(PERMUTATIONS)]))


def _disagreement(attention: Tensor, heads: int) -> list[float]:
    """Of ``[S, B, H, 8, 16]``: mean total variation between two heads' rows; 0 alike, 1 disjoint. One per seed."""
    apart = (attention[:, :, :, None] - attention[:, :, None]).abs().sum(-1) / 2
    return (apart.sum((1, 2, 3, 4)) / (apart.shape[1] * KEYS * heads * (heads - 1))).tolist()


def describe(result: dict[str, Any]) -> list[str]:
    lines = []
    for run in result["runs"]:
        less = difference(run["overlap"], run["overlap_by_chance"])
        lines += [
            f"{run['optimizer']}, {run['layers']} layer{'s' if run['layers'] > 1 else ''} of {run['heads']} heads: "
            f"held-out loss {text(run['final_held_out'])}",
            f"  kinds of queries shared by two heads of layer {run['layer']} (cosine): {text(run['overlap'], 2)}; "
            f"minus that by chance {text(less, 3)}",
            f"  {text(run['owners'], 1)} heads are the best one for some kind; two heads' rows differ by "
            f"{text(run['disagreement'], 2)} (at the start {text(run['disagreement_at_start'], 2)})",
        ]
        if run["layers"] > 1:
            each_layer = "; ".join(text(found, 0) for found in run["settled"])
            lines += [
                f"  attention of layer 0, 1, ... is 90% in place at step {each_layer}",
                f"  the last layer is later than the first by {text(run['last_layer_later'], 0)} steps",
            ]
    return [*lines, "(rows differ: total variation; 0 alike, 1 disjoint)"]


def draw(result: dict[str, Any], figure: Any) -> None:
    runs = result["runs"]
    figure.set_size_inches(3.1 * len(runs), 8)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.1, 1, 1))
    for axes, run in zip(top.subplots(1, len(runs)), runs, strict=True):
        image = axes.imshow(run["example"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"{run['optimizer']}, {run['layers']} x {run['heads']} heads", fontsize=9.5, loc="left")
        axes.set_xlabel("key that is asked for")
        axes.set_ylabel("head")
    top.colorbar(image, ax=top.axes, shrink=0.8, label="weight on the right token (seed 0)")
    labels = [f"{run['optimizer']}, {run['layers']} x {run['heads']}" for run in runs]
    left, right = middle.subplots(1, 2)
    plain_axes(left, "overlap of the heads' kinds of queries (x: by chance)")
    bars(left, labels, [run["overlap"] for run in runs])
    left.plot([run["overlap_by_chance"]["mean"] for run in runs], range(len(runs)), "x", color=COLORS[6])
    plain_axes(right, "total variation between two heads' rows (x: at the start)")
    bars(right, labels, [run["disagreement"] for run in runs])
    right.plot([run["disagreement_at_start"]["mean"] for run in runs], range(len(runs)), "x", color=COLORS[6])
    deep = [run for run in runs if run["layers"] > 1]
    for axes, run in zip(bottom.subplots(1, len(deep), squeeze=False)[0], deep, strict=True):
        for color, (layer, curve) in zip(COLORS, enumerate(run["remaining"]), strict=False):
            axes.plot(run["steps"], curve, color=color, label=f"layer {layer}")
        axes.axhline(0.1, color="0.6", linestyle=":", linewidth=1)
        plain_axes(axes, f"{run['optimizer']}: attention's distance to the end / at the start", "step")
        axes.legend(frameon=False, fontsize=8)

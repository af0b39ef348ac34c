"""One picture an alarm: what its rule read in a run that fails, and in the healthy twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnprobe.alarms import AlarmEngine, AlarmRule
from benchmarks.faults.cache import Cache
from benchmarks.faults.judge import rules_for
from benchmarks.faults.setup import Setup
from benchmarks.faults.study import Verdict
from benchmarks.faults.tables import MAIN
from benchmarks.faults.tasks import TASKS
from benchmarks.faults.train import Run

#: Alarms whose values span many powers of ten.
LOGARITHMIC = {"logit_explosion", "logit_growth", "value_explosion", "inactive_head", "stalled_layer", "nonfinite"}


def draw(cache: Cache, name: str, verdicts: Sequence[Verdict], folder: Path) -> Setup | None:
    """The example of one alarm; None where no run raised it. Gives the failing run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    raised = [verdict for verdict in verdicts if name in verdict.alarms[MAIN]]
    if not raised:
        return None
    # The one that shows it best: named first, with as many layers and heads as there are.
    example = max(raised, key=lambda v: (next(iter(v.alarms[MAIN])) == name, v.setup.layers, v.setup.heads))
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True, layout="constrained")
    for axis, setup in zip(axes, (example.setup, example.setup.twin), strict=True):
        run = cache.read(setup)
        rule = next(rule for rule in rules_for(setup) if rule.name == name)
        for layer, (steps, values) in _readings(run, rule).items():
            axis.plot(steps, values, marker=".", markersize=3, linewidth=1, label=layer or "run")
        threshold = getattr(rule, "threshold", None) or getattr(rule, "share", None) or getattr(rule, "always", None)
        if threshold:
            axis.axhline(threshold, color="tab:red", linestyle=":", linewidth=1)
        if name in LOGARITHMIC:
            axis.set_yscale("symlog" if name in ("nonfinite", "stalled_layer") else "log", **_linear(name))
        losses = axis.twinx()
        losses.plot(_smooth(run.losses), color="0.75", linewidth=1, zorder=0)
        losses.set_ylim(bottom=0)
        losses.set_ylabel("loss", color="0.6")
        axis.set_xlabel("step")
        axis.set_zorder(losses.get_zorder() + 1)
        axis.patch.set_visible(False)
    if example.start:
        axes[0].axvline(example.start, color="0.4", linestyle="--", linewidth=1)
    axes[0].axvline(example.alarms[MAIN][name], color="tab:red", linewidth=1)
    axes[0].set_title(f"{example.setup.fault}, {example.setup.severity}", fontsize=9)
    axes[1].set_title("the healthy twin", fontsize=9)
    axes[0].set_ylabel(name)
    axes[0].legend(fontsize=7, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"alarm-{name}.png", dpi=90)
    plt.close(figure)
    return example.setup


def _readings(run: Run, rule: AlarmRule) -> dict[str, tuple[list[int], list[float]]]:
    """layer -> steps and the rule's values there."""
    engine = AlarmEngine([rule], uninformed_loss=TASKS[run.setup.task].uninformed(), strict=True)
    found: dict[str, tuple[list[int], list[float]]] = {}
    for report in run.reports:
        engine.update(report)
        if report.valid or rule.judges_invalid:
            for reading in rule.readings(report, engine.history):
                steps, values = found.setdefault(reading.layer, ([], []))
                steps.append(report.step)
                values.append(reading.value)
    return found


def _smooth(losses: Sequence[float], window: int = 10) -> np.ndarray:
    return np.convolve(np.asarray(losses, float), np.ones(window) / window, "valid")


def _linear(name: str) -> dict[str, float]:
    return {"linthresh": 1e-6 if name == "stalled_layer" else 1.0} if name in ("nonfinite", "stalled_layer") else {}

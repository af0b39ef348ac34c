"""One picture an alarm: what its rule read in a run that fails, and in the healthy twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnprobe.alarms import AlarmEngine, AlarmRule
from benchmarks.faults.cache import Cache
from benchmarks.faults.injections import SEVERITIES
from benchmarks.faults.judge import rules_for
from benchmarks.faults.setup import Setup
from benchmarks.faults.study import MAIN, Verdict
from benchmarks.faults.tasks import TASKS
from benchmarks.faults.train import Run

#: Alarms whose values span many powers of ten, and those whose values may be zero besides.
LOGARITHMIC = {"logit_explosion", "logit_growth", "value_explosion"}
NEAR_ZERO = {"inactive_head": 1e-8, "stalled_layer": 1e-8, "nonfinite": 1.0}
#: Where the bound of an alarm's value is not called a threshold.
THRESHOLDS = {"attention_collapse": "share", "dead_values": "always"}


def draw(cache: Cache, rule: AlarmRule, healthy: Sequence[Verdict], faulty: Sequence[Verdict], folder: Path) -> str:
    """Draw the example of one rule; gives its caption, empty where no run is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = _example(cache, rule, healthy) if rule.severity == "information" else _failure(rule, faulty)
    if chosen is None:
        return ""
    verdict, other, titles, caption = chosen
    example = verdict.setup
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True, layout="constrained")
    for axis, setup, title in zip(axes, (example, other), titles, strict=True):
        _panel(axis, cache.read(setup), next(each for each in rules_for(setup) if each.name == rule.name))
        axis.set_title(title, fontsize=9)
    if verdict.start:
        axes[0].axvline(verdict.start, color="0.4", linestyle="--", linewidth=1)
    axes[0].axvline((verdict.alarms[MAIN] | verdict.information)[rule.name], color="tab:red", linewidth=1)
    axes[0].set_ylabel(rule.name)
    axes[0].legend(fontsize=7, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"alarm-{rule.name}.png", dpi=90)
    plt.close(figure)
    return caption


Chosen = tuple[Verdict, Setup, tuple[str, str], str]
_MARKS = "Dotted red the threshold, dashed the injection, red the alarm, grey the loss."


def _failure(rule: AlarmRule, faulty: Sequence[Verdict]) -> Chosen | None:
    """A run that raises the alarm, and its healthy twin."""
    name = rule.name
    raised = [verdict for verdict in faulty if name in verdict.alarms[MAIN]]
    if not raised:
        return None

    def shows_it(verdict: Verdict) -> tuple[bool, bool, bool, int]:
        """What it is for, named first, severe, with as many layers as there are."""
        first, severe = next(iter(verdict.alarms[MAIN])) == name, verdict.setup.severity == SEVERITIES[-1]
        return name in verdict.accepted(MAIN), first, severe, verdict.setup.layers

    example = max(raised, key=shows_it)
    setup = example.setup
    titles = (f"{setup.fault}, {setup.severity}", "the healthy twin")
    return example, setup.twin, titles, f"{str(setup).capitalize()}: left with the fault, right without. {_MARKS}"


def _example(cache: Cache, rule: AlarmRule, healthy: Sequence[Verdict]) -> Chosen | None:
    """A healthy run in which there is something to tell, and one, of the same task if there is one, without."""
    plain = [verdict for verdict in healthy if verdict.setup.variant == "plain"]
    example = next((verdict for verdict in plain if rule.name in verdict.information), None)
    if example is None:
        return None
    task, layers = example.setup.task, example.setup.layers
    quiet = [verdict.setup for verdict in plain if rule.name not in verdict.information]
    quiet.sort(key=lambda setup: (setup.task != task, setup.layers != layers))
    other = next((setup for setup in quiet if _readings(cache.read(setup), rule)), None)
    if other is None:
        return None
    return example, other, (str(example.setup), str(other)), f"Two healthy runs. {_MARKS}"


def _panel(axis: Any, run: Run, rule: AlarmRule) -> None:
    for layer, (steps, values) in _readings(run, rule).items():
        axis.plot(steps, values, marker=".", markersize=3, linewidth=1, label=layer or "run")
    threshold = getattr(rule, THRESHOLDS.get(rule.name, "threshold"), None)
    if threshold:
        axis.axhline(threshold, color="tab:red", linestyle=":", linewidth=1)
    if rule.name in LOGARITHMIC:
        axis.set_yscale("log")
    if rule.name in NEAR_ZERO:
        axis.set_yscale("symlog", linthresh=NEAR_ZERO[rule.name])
    losses = axis.twinx()
    losses.plot(_smooth(run.losses), color="0.75", linewidth=1, zorder=0)
    losses.set_ylim(bottom=0)
    losses.set_ylabel("loss", color="0.6")
    axis.set_xlabel("step")
    axis.set_zorder(losses.get_zorder() + 1)
    axis.patch.set_visible(False)


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

"""What a set of Markov runs shows, as numbers, as text and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnprobe.experiments.markov.task import Protocol, entropy_rate
from attnprobe.report import StepReport
from attnprobe.writers.console import table

if TYPE_CHECKING:
    from attnprobe.experiments.markov.run import Run

NAMES = {"sgd": "plain SGD", "em": "EM-like (values x10)"}
COLUMNS = ("normalized_entropy", "sink_mass", "value_norm", "relative_advantage_std", "score_grad_norm")


def summarize(runs: list[Run], protocol: Protocol, *, steps: int, length: int) -> dict[str, Any]:
    """Final losses, attention entropies, and how soon the EM-like runs reach SGD's final loss."""
    arms = {schedule: [run for run in runs if run.schedule == schedule] for schedule in ("sgd", "em")}
    finals = [run.losses[-1] for run in arms["sgd"]]
    mean = statistics.fmean(finals)
    # The authors compare every seed with the mean over seeds; a fair comparison is within a seed.
    thresholds = [mean] * len(finals) if protocol == "authors" else finals
    reached = [
        next((step for step, loss in enumerate(run.losses) if loss < threshold), None)
        for run, threshold in zip(arms["em"], thresholds, strict=True)
    ]
    return {
        "protocol": protocol,
        "steps": steps,
        "length": length,
        "final_loss": {k: [run.losses[-1] for run in v] for k, v in arms.items()},
        "final_held_out": {k: [run.held_out[max(run.held_out)] for run in v] for k, v in arms.items()},
        "final_entropy": {k: [_last(run, "normalized_entropy") for run in v] for k, v in arms.items()},
        "entropy_at_threshold": [_at(run, step) for run, step in zip(arms["em"], reached, strict=True)],
        "thresholds": thresholds,
        "steps_to_sgd_loss": reached,
    }


def _last(run: Run, name: str) -> float:
    return float(run.probes[-1][name][0, 0])


def _at(run: Run, step: int | None) -> float | None:
    """Normalised entropy at the probe next to a step."""
    if step is None:
        return None
    return float(min(run.probes, key=lambda report: abs(report.step - step))["normalized_entropy"][0, 0])


def describe(runs: list[Run], result: dict[str, Any], directory: Path, picture: Path | None) -> str:
    """The text of a finished run, for the terminal."""
    first = _side_by_side({run.name: run.probes[0] for run in runs})
    last = _side_by_side({run.name: run.probes[-1] for run in runs})
    alarms = [f"  {run.name}: {alarm}" for run in runs for alarm in run.alarms]
    lines = [
        "",
        f"Sticky Markov task, {result['protocol']} protocol: {_count(len(result['thresholds']), 'seed')}, "
        f"T = {result['length']}, {result['steps']} steps, {result['seconds']:.0f} s",
        "",
        f"Each head, at the first probe (step {first.step}) -> at the last (step {last.step}):",
        table(first, last, COLUMNS),
        "",
        f"Alarms: {'none' if not alarms else ''}",
        *alarms,
        *_comparison(result),
        "",
        f"Numbers: {directory / 'summary.json'}",
        f"Picture: {picture}" if picture else "No picture: matplotlib is missing (pip install 'attnprobe[plots]')",
        "See every head over the steps:",
        f"  tensorboard --logdir {directory}",
    ]
    return "\n".join(lines)


def _comparison(result: dict[str, Any]) -> list[str]:
    rows = [f"{'':22}{'loss':>16}{'held-out loss':>18}{'attention entropy / ln n':>28}"]
    for arm, name in NAMES.items():
        values = [result[key][arm] for key in ("final_loss", "final_held_out", "final_entropy")]
        rows.append(f"{name:22}{_spread(values[0]):>16}{_spread(values[1]):>18}{_spread(values[2]):>28}")
    reached = [step for step in result["steps_to_sgd_loss"] if step is not None]
    count, steps = len(result["steps_to_sgd_loss"]), result["steps"]
    against = "SGD's final training loss"
    against += " (mean over seeds)" if result["protocol"] == "authors" else " (of the same seed)"
    lines = ["", "At the end (mean +- standard deviation over seeds; the lowest possible loss is "]
    lines[-1] += f"{entropy_rate(result['protocol']):.4f}, knowing nothing costs 2.0794):"
    lines += [*rows, ""]
    if not reached:
        return [*lines, f"No EM-like run got below {against} within {steps} steps: no speed-up here."]
    mean = statistics.fmean(reached)
    lines.append(
        f"EM-like gets below {against} in {_spread(reached, 0)} of {steps} steps "
        f"({len(reached)} of {count} runs): {steps / max(mean, 1):.1f} times sooner."
    )
    then = [value for value in result["entropy_at_threshold"] if value is not None]
    entropies = statistics.fmean(then), statistics.fmean(result["final_entropy"]["sgd"])
    difference = entropies[0] - entropies[1]
    diffuse = "as diffuse as" if abs(difference) < 0.002 else f"{'more' if difference > 0 else 'less'} diffuse than"
    lines += [
        f"At that loss its attention is {diffuse} SGD's: entropy {entropies[0]:.3f} against {entropies[1]:.3f}.",
        "What this shows: with this base rate, a ten times larger value rate reaches the same loss sooner.",
        "What it does not show: that values have to be the ones. The total step is larger too, and this run has no",
        "arm with a larger rate for everything, or with a tuned one. "
        f"{_count(count, 'seed')} {'is' if count == 1 else 'are'} no confidence interval.",
    ]
    return lines


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _spread(values: list[float], digits: int = 4) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def _side_by_side(reports: dict[str, StepReport]) -> StepReport:
    """Reports of several runs as one, with the run in front of the layer's name."""
    each = list(reports.values())
    return StepReport(
        max(report.step for report in each),
        tuple(f"{name} {layer}" for name, report in reports.items() for layer in report.layers),
        tuple(heads for report in each for heads in report.heads),
        {name: torch.cat([report[name] for report in each]) for name in each[0].statistics},
    )

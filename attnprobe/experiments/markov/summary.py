"""What a set of Markov runs shows, as numbers and as text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnprobe.experiments.ensemble.arms import PARTS
from attnprobe.experiments.ensemble.intervals import Interval, differences, first_below
from attnprobe.experiments.ensemble.training import Course
from attnprobe.experiments.markov.task import SYMBOLS, entropy_rate
from attnprobe.report import StepReport
from attnprobe.writers.console import table
from attnprobe.writers.text import plural

if TYPE_CHECKING:
    from attnprobe.experiments.markov.run import Job

SHOWN = (
    ("final_loss", "final loss", 17),
    ("final_held_out", "held-out loss", 18),
    ("final_entropy", "entropy / ln n", 17),
    ("steps_to_sgd_loss", "steps to SGD's loss", 21),
    ("steps_to_sgd_held_out", "to its held-out loss", 28),
)
COLUMNS = ("normalized_entropy", "sink_mass", "value_norm", "relative_advantage_std", "score_grad_norm")


def summarize(courses: list[Course], job: Job) -> dict[str, Any]:
    """Losses, attention entropies, and how soon each arm reaches the final losses of plain SGD, with intervals."""
    sgd = courses[0]
    finals = sgd.losses[-1]
    # The authors compare every seed with the mean over seeds; a fair comparison is within a seed.
    thresholds = np.full_like(finals, finals.mean()) if job.protocol == "authors" else finals
    arms = {course.arm.name: _arm(course, sgd, thresholds, job.steps) for course in courses}
    if "v10" in arms:
        for arm in arms.values():
            arm["steps_after_v10"] = _difference(arm, arms["v10"], "steps_to_sgd_loss").to_dict()
        more = _difference(arms["v10"], arms["sgd"], "entropy_at_sgd_loss", "final_entropy")
        arms["v10"]["entropy_above_sgd"] = more.to_dict()
    return {
        "protocol": job.protocol,
        "steps": job.steps,
        "length": job.length,
        "seeds": list(job.seeds),
        "entropy_rate": entropy_rate(job.protocol),
        "thresholds": thresholds.tolist(),
        "arms": arms,
    }


def _difference(arm: dict[str, Any], other: dict[str, Any], name: str, others: str = "") -> Interval:
    """Of what the same seeds have under two arms."""
    return Interval.over(differences(arm["seeds"][name], other["seeds"][others or name]))


def _arm(course: Course, sgd: Course, thresholds: Any, steps: int) -> dict[str, Any]:
    seeds = range(course.losses.shape[1])
    entropy = course.statistics["normalized_entropy"][:, 0]
    reached = [first_below(course.losses[:, s], thresholds[s]) for s in seeds]
    at_threshold = [
        None if step is None else entropy[np.abs(course.probe_steps - step).argmin(), s]
        for s, step in zip(seeds, reached, strict=True)
    ]
    found = {
        "final_loss": course.losses[-1],
        "final_held_out": course.held_out[-1],
        "best_held_out": np.nanmin(course.held_out, 0),
        "final_entropy": entropy[-1],
        "entropy_at_sgd_loss": at_threshold,
        "steps_to_sgd_loss": reached,
        "steps_to_sgd_held_out": course.held_below(sgd.held_out[-1]),
    }
    intervals = {name: Interval.over(values).to_dict() for name, values in found.items()}
    return {
        "label": course.arm.label,
        "rate": course.arm.rate,
        "intervals": intervals,
        "times_sooner": _ratio(Interval.over(reached), steps),
        "seeds": {name: [_plain(value) for value in values] for name, values in found.items()},
        "losses": _thin(course.losses),
        "normalized_entropy": {"steps": course.probe_steps.tolist(), "mean": entropy.mean(1).tolist()},
        "alarms": [alarm.to_dict() for alarm in course.alarms],
    }


def _ratio(needed: Interval, steps: int) -> list[float | None]:
    """How many times sooner, with the ends of its interval; None where a seed did not get there."""
    bounds = (needed.mean, needed.high, needed.low)
    return [steps / bound if needed.count == needed.of and bound > 0 else None for bound in bounds]


def _plain(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _thin(losses: Any) -> dict[str, Any]:
    chosen = sorted({*range(0, len(losses), 10), len(losses) - 1})
    return {"steps": chosen, "mean": [_plain(value) for value in losses[chosen].mean(1)]}


def describe(
    courses: list[Course], result: dict[str, Any], directory: Path, picture: Path | None, seconds: float
) -> str:
    """The text of a finished run, for the terminal."""
    first, last = (_side_by_side(courses, index) for index in (0, -1))
    alarms = [f"  {course.arm.name}: {alarm}" for course in courses for alarm in course.alarms]
    seeds = len(result["seeds"])
    lines = [
        "",
        f"Sticky Markov task, {result['protocol']} protocol: {plural(seeds, 'seed')}, "
        f"T = {result['length']}, {result['steps']} steps, {seconds:.0f} s",
        "",
        f"Each arm's head (means over seeds), at the first probe (step {first.step}) -> the last (step {last.step}):",
        table(first, last, COLUMNS),
        "",
        f"Alarms: {'none' if not alarms else ''}",
        *alarms,
        *comparison(result),
        "",
        f"Numbers: {directory / 'summary.json'}",
        f"Picture: {picture}" if picture else "No picture: matplotlib is missing (pip install 'attnprobe[plots]')",
        "See every head over the steps (head 0 is the first seed):",
        f"  tensorboard --logdir {directory}",
    ]
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> list[str]:
    """The arms beside each other, with intervals, and what they show, of what ``summarize`` made."""
    arms = result["arms"]
    width = max(len(arm["label"]) for arm in arms.values()) + 1
    lines = [
        "",
        f"Mean and 95% interval over {plural(len(result['seeds']), 'seed')}. The lowest possible loss is "
        f"{result['entropy_rate']:.4f}; knowing nothing costs {math.log(SYMBOLS):.4f}.",
        f"{'':{width}}" + "".join(f"{title:>{wide}}" for _, title, wide in SHOWN) + f"{'times sooner':>25}",
    ]
    for name, arm in arms.items():
        found = {key: Interval.from_dict(arm["intervals"][key]) for key, *_ in SHOWN}
        texts = {key: cell.text(0) if key.startswith("steps") else cell.short() for key, cell in found.items()}
        if name == "sgd":
            texts |= dict.fromkeys([key for key in texts if key.startswith("steps")], "-")
        cells = "".join(f"{texts[key]:>{wide}}" for key, _, wide in SHOWN)
        lines.append(f"{arm['label']:{width}}{cells}{'-' if name == 'sgd' else _sooner(arm['times_sooner']):>25}")
    against = "the mean over seeds of SGD's final training losses"
    if result["protocol"] != "authors":
        against = "SGD's final training loss of the same seed"
    lines += ["", f"Steps: the first at which the training loss is below {against}.", *_conclusion(result)]
    return lines


def _sooner(bounds: list[float | None]) -> str:
    mean, low, high = bounds
    if mean is None:
        return "-"
    return f"{mean:.2f}x" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def _conclusion(result: dict[str, Any]) -> list[str]:
    """What the arms at hand show about the paper's claim, and what they cannot."""
    if (em := result["arms"].get("v10")) is None:
        return []
    needed = Interval.from_dict(em["intervals"]["steps_to_sgd_loss"])
    if needed.count < needed.of:
        return [
            f"EM-like runs (V x10) that got below it within {result['steps']} steps: {needed.count} of {needed.of}."
        ]
    lines = []
    if result["protocol"] == "authors":
        taken = em["seeds"]["steps_to_sgd_loss"]
        lines.append(
            f"As the authors' script prints it: {np.mean(taken):.0f} +- {np.std(taken):.0f} steps, "
            f"{result['steps'] / np.mean(taken):.1f}x (paper: 430 +- 143, 2.3x)."
        )
    more = Interval.from_dict(em["entropy_above_sgd"])
    lines.append(
        f"At that loss EM-like attention is {_compared(more, 'more diffuse than', 'less diffuse than')} SGD's: entropy "
        f"{em['intervals']['entropy_at_sgd_loss']['mean']:.3f}, by seed {more.text(4)} more."
    )
    if needed.of > 1 and needed.high < result["steps"]:
        lines.append(
            "What this shows: with this base rate, a ten times larger value rate reaches the same loss sooner."
        )
    return [*lines, *_controls(result["arms"], needed)]


def _compared(difference: Interval, more: str, less: str) -> str:
    if math.isnan(difference.low) or difference.low <= 0 <= difference.high:
        return "not told apart from"
    return more if difference.mean > 0 else less


def _controls(arms: dict[str, Any], em: Interval) -> list[str]:
    """Which other arms with a larger total step are as fast, seed by seed."""
    lines = []
    groups: dict[str, list[str]] = {"sooner than": [], "not told apart from": [], "later than": []}
    for name, arm in arms.items():
        steps = Interval.from_dict(arm["intervals"]["steps_to_sgd_loss"])
        if name not in ("sgd", "v10") and steps.count == steps.of:
            later = Interval.from_dict(arm["steps_after_v10"])
            groups[_compared(later, "later than", "sooner than")].append(f"{arm['label']} ({later.text(0)} steps)")
    for word, names in groups.items():
        if names:
            lines.append(f"{word.capitalize()} V x10, seed by seed: {', '.join(names)}.")
    for name, arm in arms.items():
        base = arms.get(name.removesuffix("-v10"))
        if base is not None and name.endswith("-v10"):
            later = _difference(arm, base, "steps_to_sgd_loss")
            lines.append(f"{arm['label']} needs {later.text(1)} steps more than {base['label']}, seed by seed.")
    if not any(groups.values()):
        parts = ", ".join(f"{part}10 ({what} x10)" for part, (what, _) in PARTS.items() if part != "v")
        lines.append(
            "What it does not show: that values have to be the ones. The total step is larger too; compare with "
            f"--arms sgd,v10,qk10,o10,all3.16,tuned,tuned-v10 ({parts})."
        )
    if em.of < 3:
        lines.append(f"{plural(em.of, 'seed')} {'is' if em.of == 1 else 'are'} hardly a sample: use --seeds 20.")
    return lines


def _side_by_side(courses: list[Course], index: int) -> StepReport:
    """One probe of every arm as one report: an arm is a layer with one head, the mean over seeds."""
    means = {
        name: torch.tensor([[float(course.statistics[name][index, 0].mean())] for course in courses])
        for name in COLUMNS
    }
    names = tuple(course.arm.name for course in courses)
    return StepReport(int(courses[0].probe_steps[index]), names, (1,) * len(names), means)

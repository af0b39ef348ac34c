"""What a run of the toy shows, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnprobe.errors import WriterError

if TYPE_CHECKING:
    from attnprobe.experiments.toy import Trajectory


def numbers(result: Trajectory) -> dict[str, Any]:
    """The scalars of summary and JSON; None where the error has vanished altogether."""
    spread, entropy = result.advantage_std, result.normalized_entropy
    correct = (result.probabilities.argmax(2) == result.targets).sum(1)
    share = result.targets.bincount().double() / len(result.targets)
    peak = int(spread.argmax())
    relative = spread / (result.error.square().sum(2).mean(1) * result.values.square().sum(2).mean(1)).sqrt()
    followed = result.followed
    return {
        "loss": [float(result.loss[0]), float(result.loss[-1])],
        "loss_of_class_frequencies": float(torch.special.entr(share).sum()),
        "correct": [int(correct[0]), int(correct[-1])],
        "normalized_entropy": [float(entropy[0]), float(entropy[-1])],
        "advantage_std": [float(spread[0]), float(spread[-1])],
        "advantage_std_largest": {"step": result.steps[peak], "value": float(spread[peak])},
        "relative_advantage_std": [value if math.isfinite(value) else None for value in relative[[0, -1]].tolist()],
        "score_changes_with_sign_of_advantage": {
            "first_step": float(followed[0]),
            "mean": float(followed.mean()),
            "min": float(followed.min()),
            "max": float(followed.max()),
        },
    }


def summary(result: Trajectory) -> str:
    """What was computed, as a few lines of text: arrows lead from the first to the last step."""
    found, tokens = numbers(result), len(result.targets)

    def change(name: str) -> str:
        return " -> ".join("undefined" if value is None else f"{value:.4g}" for value in found[name])

    largest, follow = found["advantage_std_largest"], found["score_changes_with_sign_of_advantage"]
    guess = found["loss_of_class_frequencies"]
    lines = (
        f"One attention head, {tokens} tokens, gradients derived by hand: "
        f"{result.steps[-1]} steps at lr {result.lr:g}, seed {result.seed}",
        f"  loss                 {change('loss')} nats (class frequencies alone: {guess:.4g})",
        f"  correct tokens       {change('correct')} of {tokens}",
        f"  normalized entropy   {change('normalized_entropy')}",
        f"  advantage spread     {change('advantage_std')}, largest {largest['value']:.4g} at step {largest['step']}",
        f"  relative to |u| |v|  {change('relative_advantage_std')}",
        f"  score changes with the sign of their advantage: {follow['first_step']:.0%} in the first step, "
        f"{follow['mean']:.0%} on average ({follow['min']:.0%} to {follow['max']:.0%})",
        "  (the law is exact for free scores; here scores move together through W_Q and W_K)",
    )
    return "\n".join(lines)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder, and say by name what cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise WriterError(
            f"cannot write {path}: {error.strerror or error}; choose a file in a writable folder"
        ) from error


def write_json(result: Trajectory, path: Path) -> None:
    """Write the numbers behind the picture: the summary, curves, and matrices at the drawn moments.

    Raises:
        WriterError: ``path`` cannot be written.
    """
    matrices = {name: getattr(result, name) for name in ("attention", "compatibility", "advantage", "values")}
    data = {
        "steps": result.steps[-1],
        "lr": result.lr,
        "seed": result.seed,
        "targets": result.targets.tolist(),
        "summary": numbers(result),
        "loss": result.loss.tolist(),
        "score_changes_with_sign_of_advantage": result.followed.tolist(),
        "recorded_steps": list(result.steps),
        "advantage_std": result.advantage_std.tolist(),
        "normalized_entropy": result.normalized_entropy.tolist(),
        "moments": [
            {"step": result.steps[index]} | {name: tensor[index].tolist() for name, tensor in matrices.items()}
            for index in result.moments
        ],
        "readout": {"start": result.start.W_O.tolist(), "end": result.end.W_O.tolist()},
    }
    with writing(path):
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")

"""What the errors say of the weights: statistics of advantages and score gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.statistics.averages import Averages, by_head
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.sums import Sums

SPREAD = 1e-3


def add_gradients(averages: Averages, sums: Sums) -> None:
    record, row = sums.record, sums.row
    rows, choosing = sums.rows, sums.choosing
    if record.error is None:
        rows = choosing = torch.zeros_like(rows)
    drift = row["drift"]  # E = u.o + drift
    g = torch.zeros_like(drift)
    if record.lse_error is not None:
        g = (record.lse_error.flatten(0, 1) * sums.vectors.unit[:, None]).to(drift.dtype)
    shift = drift - g  # A = shift - c
    square = (row["pcc"] - drift.square()).clamp(min=0) + g.square()
    score_gradient = row["ppcc"] - 2 * shift * row["ppc"] + shift.square() * row["concentration"]
    averages.mean("advantage_std", square, choosing, 2)
    averages.largest("advantage_max", shift - row["min_c"], rows, 1)
    averages.mean("score_grad_norm", score_gradient.clamp(min=0), rows, 2)
    averages.mean("residual", drift.square(), rows, 2)
    if "advantage_alignment" in averages.wanted:
        averages.mean("advantage_alignment", *_alignment(sums, rows))


def value_gradient(sums: Sums) -> Partial:
    """Squared norm of the value gradient."""
    heads = sums.scores.heads
    rows = sums.rows if sums.record.error is not None else torch.zeros_like(sums.rows)
    squares = sums.value_gradient / sums.vectors.unit**2
    return {
        "value_grad_norm.sum": by_head(squares, heads),
        "value_grad_norm.count": by_head(rows.sum(-1, dtype=torch.float64), heads),
    }


def _alignment(sums: Sums, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation over visible keys of weight and advantage, which is minus that of weight and compatibility."""
    row, number, centre = sums.row, sums.visible_keys, sums.vectors.centre
    spread = row["cc"] - row["c"].square() / number
    mean_square = (row["cc"] + 2 * centre * row["c"] + number * centre.square()) / number
    correlation = -row["ec"] / (row["ee"] * spread).sqrt()
    varied = (row["ee"] * number > SPREAD**2) & (spread / number > SPREAD**2 * mean_square)
    return correlation.clamp(-1, 1), rows & (number >= 3) & varied

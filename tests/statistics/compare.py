"""When is a fast result the same number as the reference?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnprobe.catalog import STATISTICS, Statistic
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import DEAD_USAGE, MIN_SPREAD, DenseParts, dense_parts, from_parts

#: Everything that one record can tell; a displacement compares two.
NAMES = tuple(name for name in STATISTICS if not name.endswith("_displacement"))
#: Shares of a number of columns: whole numbers, whatever the dtype of the inputs.
COUNTED = ("dead_column_fraction", "shared_dead_columns")
#: Relative to how far the outputs differ.
OF_DIFFERENCES = ("head_similarity", "output_stable_rank")
EXACT = 1e-14
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-9, torch.bfloat16: 1e-6}


def assert_close(values: dict[str, Tensor], record: AttentionRecord, tolerance: float) -> None:
    """``|x - ref| <= tolerance * max(|ref|, scale)`` for every statistic, and NaN exactly where the reference is."""
    parts = dense_parts(record)
    reference = from_parts(parts, values)
    wrong = []
    for name, expected in reference.items():
        actual = values[name]
        assert actual.shape == expected.shape, name
        assert actual.dtype == expected.dtype == torch.float64, name
        if undecidable(name, parts):
            continue
        scale = tolerance_scale(STATISTICS[name], record, parts)
        bound = (EXACT if name in (*COUNTED, "hidden_tokens") else tolerance) * expected.abs().clamp(min=scale)
        same = ((actual - expected).abs() <= bound) | (actual == expected)  # inf - inf is NaN
        if not (same | (actual.isnan() & expected.isnan())).all():
            wrong.append(f"{name}: {actual.tolist()} instead of {expected.tolist()}, at most {bound.tolist()} apart")
    assert not wrong, "\n".join(wrong)


def tolerance_scale(statistic: Statistic, record: AttentionRecord, parts: DenseParts | None = None) -> float:
    """The size of the numbers that a statistic is made of, and with it of their rounding errors."""
    parts = dense_parts(record) if parts is None else parts
    if statistic.name in OF_DIFFERENCES and record.output is None:
        # A far mean drowns the differences when the output is computed anew in single precision.
        varied = _varied(parts)
        return varied.where(varied > 0, 1).rsqrt().max().item()
    if statistic.name == "advantage_alignment":
        # Weights are rounded relative to themselves, not to the small differences that correlate.
        smallest = torch.minimum(*_spreads(parts)).where(_correlated(parts), 1).min().item()
        return max(1.0, 5e-3 / smallest)
    queries, keys = parts.weights.shape[-2:]
    vectors = {"query_norm": parts.query, "key_norm": parts.key, "output_norm": parts.output}

    def compatibility() -> float:
        return _rms_norm(parts.error) * _rms_norm(parts.value)

    scale = {
        "one": lambda: 1.0,
        "log_keys": lambda: math.log(keys),
        "keys": lambda: float(keys),
        "logit": lambda: parts.scores[parts.visible].square().mean().sqrt().item(),
        "norm": lambda: _rms_norm(vectors.get(statistic.name, parts.value)),
        "compatibility": compatibility,
        "gradient": lambda: compatibility() * math.sqrt(queries),
        "own": lambda: 0.0,
    }[statistic.scale]()
    return 0.0 if math.isnan(scale) else scale


def undecidable(name: str, parts: DenseParts) -> bool:
    """Whether rounding alone decides the value: at a threshold, or 0 / 0."""
    if name in COUNTED:
        return bool(((parts.usage - DEAD_USAGE).abs() < 1e-4).any())
    if name == "advantage_alignment":
        return any(bool(((spread / MIN_SPREAD - 1).abs() < 0.01)[parts.rows].any()) for spread in _spreads(parts))
    if name in OF_DIFFERENCES:
        # Exactly 0 (one row, or rows that are all alike) has an answer: NaN.
        varied = _varied(parts)
        return bool(((varied > 0) & (varied < 1e-9)).any())
    return False


def _varied(parts: DenseParts) -> Tensor:
    """Share of each head's output that is not its mean over the rows that count in every head, ``[H]``."""
    output = parts.output.transpose(1, 2)[parts.rows.all(dim=1)]
    return (output - output.mean(0)).square().sum((0, 2)) / output.square().sum((0, 2))


def _rms_norm(vectors: Tensor) -> float:
    return vectors.square().sum(-1).mean().sqrt().item()


def _spreads(parts: DenseParts) -> tuple[Tensor, Tensor]:
    """Standard deviation over the visible keys of alpha, relative to its mean, and of b, to its rms, ``[B, H, T]``."""

    def over_keys(x: Tensor) -> Tensor:
        return x.where(parts.choices, 0).sum(-1) / parts.count

    weights, b = parts.weights, parts.compatibilities
    alpha_std, b_std = (over_keys((x - over_keys(x)[..., None]).square()).sqrt() for x in (weights, b))
    return alpha_std / over_keys(weights), b_std / over_keys(b.square()).sqrt()


def _correlated(parts: DenseParts) -> Tensor:
    """Rows that take part in the alignment, ``[B, H, T]``."""
    alpha, b = _spreads(parts)
    return parts.rows & (parts.count >= 3) & (alpha > MIN_SPREAD) & (b > MIN_SPREAD)

"""The record of a probe, in plain values, back into its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnprobe.errors import LogError
from attnprobe.logs.plain import alarm_of, number_of
from attnprobe.report import StepReport

if TYPE_CHECKING:
    from torch import Tensor


def report_of(record: Mapping[str, Any]) -> StepReport:
    """The report that a JSON line stands for, ``[L, H]`` tensors padded with NaN; the inverse of ``jsonl.to_dict``.

    Keys that are missing from the line have the defaults of ``StepReport``.

    Raises:
        LogError: the line is not that of a probe.
    """
    try:
        heads = tuple(int(count) for count in record.get("heads", ()))
        layers = tuple(map(str, record.get("layers", ())))
        if len(layers) != len(heads) or min(heads, default=0) < 0:
            raise ValueError(f"{len(layers)} layers, and {list(heads)} as their numbers of heads")
        statistics = record.get("statistics", {})
        residual = record.get("residual")
        return StepReport(
            step=int(record["step"]),
            layers=layers,
            heads=heads,
            statistics={name: _padded(rows, heads) for name, rows in statistics.items()},
            layer={name: _vector(values, heads) for name, values in record.get("layer_statistics", {}).items()},
            standard_errors={
                name: _padded(values, heads) if name in statistics else _vector(values, heads)
                for name, values in record.get("standard_errors", {}).items()
            },
            residual=None if residual is None else _padded(residual, heads),
            nonfinite={kind: _padded(rows, heads) for kind, rows in record.get("nonfinite", {}).items()},
            loss=number_of(record.get("loss")),
            invalid=str(record.get("invalid", "")),
            warnings=tuple(map(str, record.get("warnings", ()))),
            notes=tuple(map(str, record.get("notes", ()))),
            alarms=tuple(map(alarm_of, record.get("alarms", ()))),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise LogError(f"not the record of a probe: {type(error).__name__}: {error}") from error


def _vector(values: Sequence[Any], heads: tuple[int, ...]) -> Tensor:
    """``[L]``."""
    if len(values) != len(heads):
        raise ValueError(f"a statistic with {len(values)} values for {len(heads)} layers")
    return torch.tensor([number_of(value) for value in values], dtype=torch.float64)


def _padded(rows: Sequence[Sequence[Any]], heads: tuple[int, ...]) -> Tensor:
    """``[L, H]`` with NaN where a layer has fewer heads."""
    width = max(heads, default=0)
    sizes = [len(row) for row in rows]
    if len(sizes) != len(heads) or any(not least <= size <= width for size, least in zip(sizes, heads, strict=True)):
        raise ValueError(f"a statistic of {sizes} values for {list(heads)} heads")
    full = [[*map(number_of, row), *[math.nan] * (width - len(row))] for row in rows]
    return torch.tensor(full, dtype=torch.float64).reshape(len(heads), width)

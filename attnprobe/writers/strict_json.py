"""Strict JSON: numbers that JSON cannot say become null or text, never bare NaN or Infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: NaN is None, infinities are ``"inf"`` and ``"-inf"``, 9 significant digits."""
    if isinstance(value, float):
        # Nine digits tell any two float32 numbers apart and halve the line.
        return float(f"{value:.9g}") if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return [plain(item) for item in value]


def dumps(value: Any) -> str:
    """One line of strict JSON in ASCII."""
    return json.dumps(plain(value), allow_nan=False, separators=(",", ":"))

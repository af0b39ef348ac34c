"""Plain values of a log back into ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attnprobe.report import Alarm


def number_of(value: Any) -> float:
    """Strict JSON has no NaN: it is null, and infinities are text."""
    return math.nan if value is None else float(value)


def alarm_of(data: Mapping[str, Any]) -> Alarm:
    numbers = {key: number_of(data[key]) for key in ("value", "threshold")}
    kinds = {"step": int, "since": int, "new": bool, "snoozed": bool, "severity": str}
    values = {key: kind(data[key]) for key, kind in kinds.items() if key in data}
    evidence = [(step, number_of(value)) for step, value in data.get("evidence", ())]
    return Alarm.from_dict({**data, **numbers, **values, "evidence": evidence})

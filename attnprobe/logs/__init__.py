"""Logged runs read back: what ``JSONLWriter`` and ``TensorBoardWriter`` wrote, as reports or as arrays.

Nothing is loaded here: the Attention tab reads event files in a process that must not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "LoggedRun": "attnprobe.logs.logged",
    "load": "attnprobe.logs.run",
    "read_logs": "attnprobe.logs.run",
    "read_run": "attnprobe.logs.run",
    "report_of": "attnprobe.logs.record",
}

__all__ = ["LoggedRun", "load", "read_logs", "read_run", "report_of"]

if TYPE_CHECKING:
    from attnprobe.logs.logged import LoggedRun
    from attnprobe.logs.record import report_of
    from attnprobe.logs.run import load, read_logs, read_run


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnprobe.logs' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value

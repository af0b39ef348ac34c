"""Writers: where a report goes. Each is loaded at first use, so that none pays for another's imports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "ConsoleWriter": "attnprobe.writers.console",
    "JSONLWriter": "attnprobe.writers.jsonl",
    "MemoryWriter": "attnprobe.writers.memory",
    "TensorBoardWriter": "attnprobe.writers.tensorboard",
    "Writer": "attnprobe.writers.base",
    "read_jsonl": "attnprobe.writers.jsonl",
}

__all__ = ["ConsoleWriter", "JSONLWriter", "MemoryWriter", "TensorBoardWriter", "Writer", "read_jsonl"]

if TYPE_CHECKING:
    from attnprobe.writers.base import Writer
    from attnprobe.writers.console import ConsoleWriter
    from attnprobe.writers.jsonl import JSONLWriter, read_jsonl
    from attnprobe.writers.memory import MemoryWriter
    from attnprobe.writers.tensorboard import TensorBoardWriter


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnprobe.writers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

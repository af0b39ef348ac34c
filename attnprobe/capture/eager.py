"""Compiled models run eagerly while a step is probed: inside compiled code nothing can be seen.

The stance is one for the whole process, so sessions share it: the first sets it, the last restores it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_sessions: set[int] = set()
_stance: Any = None


def force_eager(session: object) -> None:
    """From now on; does nothing in a process that never compiled anything."""
    global _stance
    if "torch._dynamo" not in sys.modules:
        return
    if not _sessions:
        _stance = torch.compiler.set_stance("force_eager")
    _sessions.add(id(session))


def release(session: object) -> None:
    """Back to what it was, unless another session still needs it."""
    global _stance
    if id(session) in _sessions:
        _sessions.remove(id(session))
        if not _sessions:
            stance, _stance = _stance, None
            stance.__exit__(None, None, None)

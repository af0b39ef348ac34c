"""Compiled models run eagerly while a step is probed: inside compiled code nothing can be seen.

The stance is one for the whole process, so sessions share it: the first sets it, the last restores it.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

#: FlexAttention compiles itself at its first call.
_COMPILERS = {"torch._dynamo", "torch.nn.attention.flex_attention"}

#: What torch says when a compiled module is called while there are hooks on all modules.
_EXTRA = "Using `torch.compile\\(module\\)` when there are global hooks"

_sessions: set[int] = set()
_stance: Any = None


def force_eager(session: object) -> None:
    """From now on; does nothing in a process that never compiled anything."""
    global _stance
    if not _COMPILERS & sys.modules.keys():
        return
    if not _sessions:
        _stance = torch.compiler.set_stance("force_eager")
        # Ours are hooks that fire an extra time; the user can do nothing about it.
        warnings.filterwarnings("ignore", message=_EXTRA, category=UserWarning)
    _sessions.add(id(session))


def release(session: object) -> None:
    """Back to what it was, unless another session still needs it."""
    global _stance
    if id(session) in _sessions:
        _sessions.remove(id(session))
        if not _sessions:
            stance, _stance = _stance, None
            filters: Any = warnings.filters
            filters[:] = [entry for entry in filters if getattr(entry[1], "pattern", entry[1]) != _EXTRA]
            stance.__exit__(None, None, None)

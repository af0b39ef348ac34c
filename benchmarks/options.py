"""Ways to run a probe, or not to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnprobe import AttentionProbe
from attnprobe.catalog import select
from attnprobe.statistics.compiler import usable

#: Query rows per head that row sampling looks at.
SAMPLED_ROWS = 128
_SWITCH = "ATTNPROBE_COMPILED"


def described(statistics: str) -> str:
    """``core (21 statistics)``."""
    return f"{statistics} ({len(select(statistics))} statistics)"


def compiled_available() -> bool:
    """Whether the statistics' compiled kernel is used when nobody switches it off."""
    return usable(torch.device("cpu"), torch.float32)


@contextmanager
def without_compiler() -> Iterator[None]:
    """The one place where the compiled kernel is switched off."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def silent_probe(model: Any, **options: Any) -> AttentionProbe:
    """A probe of every step that does nothing until ``begin()``."""
    defaults: dict[str, Any] = {"every_n_steps": 1, "action": "record"}
    probe = AttentionProbe(model, **defaults | options)
    probe.discard()
    return probe


def postpone(probe: AttentionProbe, steps: int) -> AttentionProbe:
    """Past its first probes, and the next one due in so many steps."""
    probe.load_state_dict(probe.state_dict() | {"count": 0, "next": steps, "probes": 1000, "step": 0})
    return probe

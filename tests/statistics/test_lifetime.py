"""Measuring leaves nothing behind: on a GPU, memory that waits for the garbage collector is memory lost."""

import gc
import weakref

import torch

from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.maps import head_map
from attnprobe.statistics.streaming import measure


def test_a_measured_record_is_freed_at_once() -> None:
    query, key, value, output, error = (torch.randn(2, 4, 20, 8) for _ in range(5))
    record = AttentionRecord(value=value, query=query, key=key, output=output, error=error, causal=True)
    alive = weakref.ref(value)
    gc.disable()
    try:
        measure(record, select(["all", "head_similarity"]))
        head_map("layer", 1, record)
        del record, value
        assert alive() is None
    finally:
        gc.enable()

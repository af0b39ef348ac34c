"""Two thousand steps leave no more behind than two hundred."""

from __future__ import annotations

import gc
import weakref

import psutil
import torch

import attnprobe as ap
from tests.global_state import global_state
from tests.probe.models import batches, loss_of, net


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_memory_is_flat_over_two_thousand_steps(tmp_path):
    model = net(heads=(2,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    writers = [ap.MemoryWriter(limit=3), ap.JSONLWriter(tmp_path)]
    sizes, tensors, states = [], [], []
    with ap.AttentionProbe(model, every_n_steps=10, statistics="all", maps="*:0", writers=writers) as probe:
        for step, x in enumerate(batches(2000), 1):
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step(loss)
            if step % 400 == 5:
                del loss
                tensors.append(live_tensors())
                sizes.append(psutil.Process().memory_info().rss / 2**20)
                states.append(global_state())
    warm, *later = sizes[1:]
    assert max(later) - warm < 5, sizes
    assert len(set(tensors[1:])) == 1, tensors
    assert all(state == states[0] for state in states)


def test_what_was_measured_is_freed_without_the_garbage_collector():
    model = net()
    gc.collect()
    gc.disable()
    try:
        with ap.AttentionProbe(model, every_n_steps=1) as probe:
            loss_of(model, next(batches(1))).backward()
            (first, second) = map(weakref.ref, probe._collector.session.seen)
            assert first().result.heads == second().result.heads == 2
            probe.step()
            assert first() is None
            assert second() is None
    finally:
        gc.enable()

"""Training with the monitor is, bit for bit, the training without it."""

from __future__ import annotations

import pytest
import torch

import attnprobe as ap
from attnprobe.lightning import AttentionMonitor
from tests.lightning.training import QUIET, loader, module_class
from tests.probe.models import KINDS


def train(package, kind, optimizer, monitor):
    """Losses and gradients of 50 steps, then all state at the end."""

    class Traced(module_class(package)):
        def on_before_optimizer_step(self, optimizer):
            self.trace += [p.grad.clone() for p in self.parameters()]

    module = Traced(kind, optimizer, dropout=0.1)
    module.trace = []
    callbacks = [monitor] if monitor else []
    trainer = package.Trainer(**QUIET | {"max_epochs": 2, "gradient_clip_val": 1.0}, callbacks=callbacks)
    trainer.fit(module, loader(25), loader(2))
    state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if v is not None]
    return [*module.trace, torch.tensor(module.losses), *module.state_dict().values(), *state, torch.get_rng_state()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_fifty_steps_are_the_same_with_every_second_one_probed(package, kind, optimizer):
    memory = ap.MemoryWriter()
    monitor = AttentionMonitor(2, statistics="all", maps="*:1", writers=memory)
    plain, probed = train(package, kind, optimizer, None), train(package, kind, optimizer, monitor)
    assert len(plain) > 50 * 12
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert [report.step for report in memory.reports] == [*range(0, 50, 2)]
    assert all(
        report.valid and report["entropy"].isfinite().all() and len(report.maps) == 2 for report in memory.reports
    )

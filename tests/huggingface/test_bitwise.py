"""Training with the monitor is, bit for bit, the training without it."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from tests.huggingface.training import LAYERS, Run, gpt2


class Trace(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients += [p.grad.clone() for p in model.parameters()]


def train(directory, model, **options):
    """The run, and its losses, gradients, parameters, optimizer and random state."""
    trace = Trace()
    run = Run(directory, every=2, model=gpt2(dropout=0.1, **model), callbacks=[trace], max_steps=10, **options).train()
    state = [v for s in run.trainer.optimizer.state.values() for v in s.values()]
    logged = torch.tensor([*run.logged.values()], dtype=torch.float64)
    return run, [logged, *trace.gradients, *run.model.state_dict().values(), *state, torch.get_rng_state()]


CHECKPOINTED = {"gradient_checkpointing": True}
VARIANTS = {
    "sdpa": ({}, {}),
    "eager": ({"attn_implementation": "eager"}, {}),
    "accumulation": ({}, {"gradient_accumulation_steps": 3}),
    "bf16": ({}, {"bf16": True}),
    "reentrant": ({}, CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "not reentrant": ({}, CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    "label smoothing": ({}, {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_are_the_same_with_every_second_one_probed(tmp_path, variant):
    model, options = VARIANTS[variant]
    _, plain = train(tmp_path, model, watched=False, **options)
    run, probed = train(tmp_path, model, monitor={"statistics": "all", "maps": "*:1"}, **options)
    assert len(plain) > 10 * 28
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert run.steps == [1, 3, 5, 7, 9]
    for report in run.reports:
        assert report.valid
        assert not report.warnings
        assert report.layers == LAYERS
        assert report["entropy"].isfinite().all()
        assert (report["error_norm"] > 0).all()
        assert len(report.maps) == 2
        assert report.loss == run.logged[report.step]

"""A resumed run equals the uninterrupted one, and says so where its schedule is another."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn, optim

from attnprobe.errors import AttnProbeWarning
from attnprobe.schedules import ScheduleHandle, ValueLearningRate
from tests.schedules.fused import Last, PerHead, Separate, Stack, batch, train

X = batch(0)[0]


def begin(multiplier: float = 10.0, **options: Any) -> tuple[Stack, optim.Optimizer, ScheduleHandle]:
    model = Stack(Last, PerHead, Separate)
    optimizer = optim.AdamW(model.parameters(), lr=0.005)
    schedule = ValueLearningRate(model, multiplier, confirm=lambda: model(X), **options)
    return model, optimizer, schedule.attach(optimizer)


def constant(optimizer: optim.Optimizer) -> Any:
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_a_resumed_loop_equals_the_uninterrupted_one() -> None:
    straight, optimizer, _ = begin()
    train(straight, optimizer, 10, scheduler=constant(optimizer))
    train(straight, optimizer, 10, scheduler=constant(optimizer))
    first, optimizer, handle = begin()
    train(first, optimizer, 10, scheduler=constant(optimizer))
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "values": handle.state_dict()}
    second, optimizer, handle = begin()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    handle.load_state_dict(json.loads(json.dumps(saved["values"])))  # warnings are errors here
    train(second, optimizer, 10, scheduler=constant(optimizer))
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), straight.parameters(), strict=True))


def test_state_is_plain() -> None:
    _, _, handle = begin()
    assert handle.state_dict() == {
        "multiplier": 10.0,
        "names": [
            "layers.0.c_attn.weight[:, 16:24]",
            "layers.0.c_attn.bias[16:24]",
            "layers.1.query_key_value.weight.unflatten(0, (2, -1))[:, 8:12]",
            "layers.1.query_key_value.bias.unflatten(0, (2, -1))[:, 8:12]",
            "layers.2.v_proj.weight",
            "layers.2.v_proj.bias",
        ],
    }


def test_another_multiplier_or_other_names_are_told() -> None:
    _, _, handle = begin()
    _, _, other = begin(4.0)
    with pytest.warns(AttnProbeWarning, match=r"trained with multiplier 10\.0; from here on 4\.0 is in force"):
        other.load_state_dict(handle.state_dict())
    assert other.schedule.multiplier == 4.0
    _, _, other = begin(parameters="*.c_attn.*")
    match = r"other value weights.*from here on: 'layers\.0\.c_attn\.bias\[16:24\]'.*New: none.*No longer: .*v_proj"
    with pytest.warns(AttnProbeWarning, match=match):
        other.load_state_dict(handle.state_dict())


def test_a_checkpoint_without_a_schedule_loads_silently() -> None:
    _, _, handle = begin()
    handle.load_state_dict({})


def test_wrappers_do_not_count_as_other_names() -> None:
    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, x: Any) -> Any:
            return self._orig_mod(x)

    _, _, handle = begin()
    model = Compiled(Stack(Last, PerHead, Separate))
    schedule = ValueLearningRate(model, confirm=lambda: model(X))
    assert schedule.names[0].startswith("_orig_mod.")
    schedule.load_state_dict(handle.state_dict())

"""A schedule on fused weights equals parameter groups of the same model with split weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from attnprobe.errors import ScheduleError
from attnprobe.schedules import ValueLearningRate
from tests.schedules.decoders import build
from tests.schedules.fused import (
    Grouped,
    KeysAndValues,
    Last,
    Multihead,
    MultiheadOfOtherWidths,
    PerHead,
    Separate,
    Split,
    Stack,
    batch,
    loss_of,
    train,
)
from tests.schedules.optimizers import EXACT

KINDS = (Multihead, Last, PerHead, Grouped)


def schedule_of(model: nn.Module, multiplier: float = 10.0) -> ValueLearningRate:
    dtype = next(model.parameters()).dtype
    return ValueLearningRate(model, multiplier, confirm=lambda: model(batch(0, dtype)[0]))


def both(kind: type, lr: float, *layers: type, **options: Any) -> tuple[Stack, Any, Split, Any]:
    model = Stack(*layers)
    split = Split(model, model.roles)
    optimizer = kind(model.parameters(), lr=lr, **options)
    schedule_of(model).attach(optimizer)
    return model, optimizer, split, kind(split.groups(lr, 10.0), lr=lr, **options)


@pytest.mark.parametrize(("kind", "lr", "options"), EXACT)
def test_every_optimizer_and_layout(kind: type, lr: float, options: dict[str, Any]) -> None:
    model, optimizer, split, other = both(kind, lr, *KINDS, **options)
    start = copy.deepcopy(model)
    train(model, optimizer)
    train(split, other)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(model.parameters(), start.parameters(), strict=True))
    distances = split.distances(model)
    assert {name: d for name, d in distances.items() if d >= 1e-12} == {}


def language_loss(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(step))
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM"])
def test_models_of_transformers(name: str) -> None:
    model, roles = build(name)
    model = model.double().eval()  # GPT-2 drops out
    split = Split(model, roles)
    optimizer = optim.AdamW(model.parameters(), lr=0.003)
    ValueLearningRate(model, confirm=lambda: language_loss(model, 0)).attach(optimizer)
    train(model, optimizer, loss=language_loss)
    train(split, optim.AdamW(split.groups(0.003, 10.0), lr=0.003), loss=language_loss)
    assert max(split.distances(model).values()) < 1e-12


def test_keys_and_values_in_one_weight_beside_separate_ones() -> None:
    model, optimizer, split, other = both(optim.NAdam, 0.005, KeysAndValues, Separate)
    train(model, optimizer)
    train(split, other)
    assert max(split.distances(model).values()) < 1e-12


def test_the_bias_that_stays_fused_beside_separate_weights() -> None:
    model, optimizer, split, other = both(optim.AdamW, 0.005, MultiheadOfOtherWidths)
    train(model, optimizer)
    train(split, other)
    assert max(split.distances(model).values()) < 1e-12


def test_gradient_accumulation() -> None:
    model, optimizer, split, other = both(optim.AdamW, 0.005, Last, PerHead)
    train(model, optimizer, 20, accumulate=3)
    train(split, other, 20, accumulate=3)
    assert max(split.distances(model).values()) < 1e-12


def test_one_cycle_keeps_the_ratio() -> None:
    model, optimizer, split, other = both(optim.SGD, 0.05, Grouped)
    cycle = optim.lr_scheduler.OneCycleLR
    train(model, optimizer, scheduler=cycle(optimizer, max_lr=0.05, total_steps=61))
    train(split, other, scheduler=cycle(other, max_lr=[0.05, 0.5], total_steps=61))
    assert max(split.distances(model).values()) < 1e-12


def test_closures() -> None:
    model, optimizer, split, other = both(optim.Adam, 0.005, Last, Multihead)
    for net, steps in ((model, optimizer), (split, other)):
        for step in range(20):

            def closure(net: nn.Module = net, steps: Any = steps, step: int = step) -> Tensor:
                steps.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            steps.step(closure)
    assert max(split.distances(model).values()) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_gradient_scaler_skips(fused: bool) -> None:
    model = Stack(Last, PerHead, dtype=torch.float32)
    optimizer = optim.Adam(model.parameters(), lr=0.01, fused=fused)
    schedule_of(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for skipped in (True, False, True):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        if skipped:
            model.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
        assert all(same) if skipped else not any(same)


@pytest.mark.parametrize("kind", [Last, PerHead, Grouped, Multihead])
def test_all_but_the_values_is_bit_for_bit_what_the_optimizer_made_of_it(kind: type) -> None:
    plain, fast = Stack(kind, dtype=torch.float32), Stack(kind, dtype=torch.float32)
    for model in (plain, fast):
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        if model is fast:
            schedule_of(model, 7.0).attach(optimizer)
        loss_of(model, 0).backward()
        optimizer.step()
    start = Stack(kind, dtype=torch.float32)
    for name, p in plain.named_parameters():
        q, old = fast.get_parameter(name), start.get_parameter(name)
        axis, role = plain.roles.get(name, (0, torch.zeros(p.shape[0])))
        values, others = (where.nonzero()[:, 0] for where in (role == 2, role != 2))
        assert torch.equal(p.index_select(axis, others), q.index_select(axis, others))
        if values.numel():
            steps = [(x - old).index_select(axis, values) for x in (p, q)]
            torch.testing.assert_close(steps[1], 7 * steps[0], rtol=1e-4, atol=1e-6)


def test_tied_fused_weights() -> None:
    model = Stack(Last, Last)
    model.layers[1].c_attn = model.layers[0].c_attn
    roles = {f"layers.0.{name}": role for name, role in Last.roles.items()}
    split = Split(model, roles)
    # functional_call replaces one name of a tied weight and thus both
    optimizer = optim.AdamW(model.parameters(), lr=0.005)
    schedule = schedule_of(model)
    schedule.attach(optimizer)
    assert schedule.names == ("layers.0.c_attn.weight", "layers.0.c_attn.bias")
    train(model, optimizer)
    train(split, optim.AdamW(split.groups(0.005, 10.0), lr=0.005))
    assert max(split.distances(model).values()) < 1e-12


def test_groups_cannot_hold_a_part_of_a_weight() -> None:
    with pytest.raises(ScheduleError, match=r"whole parameters.*'layers\.0\.c_attn\.weight\[:, 16:24\]'.*attach"):
        schedule_of(Stack(Last)).groups(0.1)
    assert len(schedule_of(Stack(Separate)).groups(0.1)) == 2


def test_a_parameter_without_a_gradient_stays_bit_for_bit() -> None:
    model = Stack(Last, dtype=torch.float32)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    schedule_of(model).attach(optimizer)
    before = copy.deepcopy(model)
    model.head(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(model.layers[0].c_attn.weight, before.layers[0].c_attn.weight)


@pytest.mark.parametrize("kind", [optim.Rprop, optim.Adafactor, optim.ASGD, optim.LBFGS])
def test_optimizers_that_are_refused(kind: type) -> None:
    model = Stack(Last)
    with pytest.raises(ScheduleError, match=rf"{kind.__name__} is not supported"):
        schedule_of(model).attach(kind(model.parameters(), lr=0.1))

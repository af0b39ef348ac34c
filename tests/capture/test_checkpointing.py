"""Activation checkpointing: what runs again in the backward pass is the same call, and torch must not notice us."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from attnprobe import AttentionProbe
from attnprobe.capture.session import FROZEN, REPEATED, SILENT, UNRECORDED
from attnprobe.errors import AttnProbeWarning
from tests.capture.models import WIDTH, Attention, Multihead, bmm, explicit, loss_of, sdpa, tokens
from tests.capture.reference import names, session
from tests.capture.training import assert_same_training
from tests.global_state import global_state

ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Attention(sdpa(is_causal=True)),
    "matmul": lambda: Attention(explicit, dropout=0.2),
    "bmm": lambda: Attention(bmm),
    "multihead": lambda: Multihead(batch_first=True, dropout=0.2),
}
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
each_kind = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION.keys())


class Bare(nn.Module):
    """Attention with no projection after it, so that its inputs are the last thing that checkpointing needs."""

    def forward(self, x: Tensor) -> Tensor:
        return bare_attention(x)


def bare_attention(x: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x * 2, x.sin(), x.cos())


class Checkpointed(nn.Module):
    """Layers under activation checkpointing; ``region`` says what is checkpointed of each."""

    def __init__(
        self,
        attention: Callable[[], nn.Module],
        region: Callable[..., Tensor],
        *,
        layers: int = 2,
        shared: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        modules = [attention()] * layers if shared else [attention() for _ in range(layers)]
        self.layers = nn.ModuleList(modules)
        self.region, self.options = region, options

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + self.region(self, layer, x)
        return x

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x).tanh()


def a_module(self: Checkpointed, layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, **self.options)


def a_method(self: Checkpointed, layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(self.run, layer, x, **self.options)


def nested(self: Checkpointed, layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: checkpoint(self.run, layer, x, **self.options).sin(), x, **self.options)


def a_function(self: Checkpointed, layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: bare_attention(self.embed(x)).sin(), x, **self.options)


REGIONS = {"module": a_module, "method": a_method, "nested": nested}
PLAIN = {
    a_module: lambda self, layer, x: layer(x),
    a_method: lambda self, layer, x: self.run(layer, x),
    nested: lambda self, layer, x: self.run(layer, x).sin(),
}
each_region = pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())


@REENTRANT
@each_region
@each_kind
def test_training_is_the_same(attention: Any, region: Any, reentrant: bool) -> None:
    assert_same_training(partial(Checkpointed, attention, region, use_reentrant=reentrant), tokens())


@REENTRANT
@each_region
@each_kind
def test_calls_are_those_without_checkpointing(attention: Any, region: Any, reentrant: bool) -> None:
    found = []
    for run in (PLAIN[region], region):
        torch.manual_seed(1)
        model, batch = Checkpointed(attention, run, use_reentrant=reentrant).double(), tokens()[0].double()
        torch.manual_seed(2)
        with session(model) as watching:
            loss_of(model(batch)).backward()
        assert names(watching.seen) == [f"layers.{i}{'.attn' * (attention is ATTENTION['multihead'])}" for i in (0, 1)]
        found.append(sorted(watching.seen, key=lambda call: call.rank))
    for plain, again in zip(*found, strict=True):
        for name in ("query", "key", "value", "output", "error"):
            # Reentrant checkpointing adds gradients in another order.
            torch.testing.assert_close(getattr(plain.result, name), getattr(again.result, name), rtol=1e-12, atol=1e-15)


@REENTRANT
@each_region
def test_shared_module(region: Any, reentrant: bool) -> None:
    """Three calls of one module, told apart although reentrant checkpointing computes the last one first."""
    build = partial(Checkpointed, ATTENTION["sdpa"], region, layers=3, shared=True, use_reentrant=reentrant)
    assert_same_training(build, tokens())
    if region is nested and reentrant:
        return  # each call runs in a backward pass of its own: nothing tells their order
    model = build()
    batch = tokens()
    queries: list[Tensor] = []
    handle = model.layers[0].q.register_forward_hook(lambda module, inputs, q: queries.append(q.detach()))
    with session(model) as watching:
        loss = loss_of(model(*batch))
        handle.remove()
        loss.backward()
    assert names(watching.seen) == ["layers.0#0", "layers.0#1", "layers.0#2"]
    for call in watching.seen:
        assert torch.equal(call.result.query.transpose(1, 2).flatten(2), queries[call.index])


@REENTRANT
def test_shared_module_in_micro_batches(reentrant: bool) -> None:
    model = Checkpointed(ATTENTION["sdpa"], a_module, shared=True, use_reentrant=reentrant)
    with session(model) as watching:
        losses = [loss_of(model(*tokens())) for _ in range(2)]
        for loss in losses:
            loss.backward()
    assert names(watching.seen) == ["layers.0#0", "layers.0#0", "layers.0#1", "layers.0#1"]


@REENTRANT
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_attention_at_the_end_of_the_region(layers: int, early_stop: bool, reentrant: bool) -> None:
    """Recomputation stops at the last tensor that is needed, which here is one of ours."""
    build = partial(Checkpointed, Bare, a_module, layers=layers, use_reentrant=reentrant)
    with set_checkpoint_early_stop(early_stop):
        assert_same_training(build, tokens())
        model = build()
        with session(model, strict=False) as watching:
            loss_of(model(*tokens())).backward()
    assert names(watching.seen) == [f"layers.{i}" for i in range(layers)]
    assert not watching.problems


@REENTRANT
def test_bare_function(reentrant: bool) -> None:
    """Torch runs it again outside of any module; what is held for it must not go through its counting."""
    build = partial(Checkpointed, Bare, a_function, use_reentrant=reentrant)
    assert_same_training(build, tokens())
    model = build()
    with session(model) as watching:
        loss_of(model(*tokens())).backward()
    assert names(watching.seen) == ["Checkpointed#0", "Checkpointed#1"]


def test_no_grad_is_named() -> None:
    class Teacher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = F.scaled_dot_product_attention(x, x, x)
            return (x - target) * x.requires_grad_()

    with AttentionProbe(model := Teacher()) as probe:
        loss_of(model(*tokens())).backward()
        with pytest.warns(AttnProbeWarning, match="Teacher: " + UNRECORDED):
            probe.step()


@each_kind
def test_selective_checkpointing(attention: Any) -> None:
    saved = [torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    context = partial(create_selective_checkpoint_contexts, saved)
    build = partial(Checkpointed, attention, a_module, use_reentrant=False, context_fn=context)
    assert_same_training(build, tokens())


def test_saved_tensors_may_be_offloaded() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_same_training(partial(Checkpointed, ATTENTION["sdpa"], Checkpointed.run), tokens(), forward=forward)


def test_backward_twice() -> None:
    model = Checkpointed(ATTENTION["sdpa"], a_module, use_reentrant=False)
    with session(model) as watching:
        loss = loss_of(model(*tokens()))
        loss.backward(retain_graph=True)
        loss.backward()
    assert {call.reason for call in watching.seen} == {REPEATED}


def test_frozen_layers() -> None:
    model = Checkpointed(ATTENTION["sdpa"], a_module, use_reentrant=False)
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    with session(model) as watching:
        loss_of(model(*tokens())).backward()
    assert {(call.module, call.reason) for call in watching.seen} == {("layers.0", FROZEN), ("layers.1", "")}


@pytest.mark.parametrize("region", [a_module, a_method, nested, a_function])
def test_stopped_between_forward_and_backward(region: Any) -> None:
    """Checkpointing counts what is saved: it has to find as much the second time, although nobody looks."""
    torch.manual_seed(0)
    model, batch = Checkpointed(ATTENTION["sdpa"], region, use_reentrant=False), tokens()
    loss_of(model(*batch)).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    before = global_state()
    with session(model) as watching:
        loss = loss_of(model(*batch))
    loss.backward()
    assert {call.reason for call in watching.seen} == {SILENT}
    assert all(map(torch.equal, plain, [p.grad for p in model.parameters() if p.grad is not None]))
    assert global_state() == before


def test_stopped_before_a_backward_that_never_comes() -> None:
    model, batch = Checkpointed(ATTENTION["sdpa"], a_module, use_reentrant=False), tokens()
    before = global_state()
    with session(model):
        loss = loss_of(model(*batch))
    del loss
    model(*batch)
    assert global_state() == before


@pytest.mark.parametrize("region", [a_module, a_method, nested, a_function])
def test_started_between_forward_and_backward(region: Any) -> None:
    torch.manual_seed(0)
    model, batch = Checkpointed(ATTENTION["sdpa"], region, use_reentrant=False), tokens()
    loss_of(model(*batch)).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    loss = loss_of(model(*batch))
    with session(model) as watching:
        loss.backward()
    assert watching.seen == []
    assert all(map(torch.equal, plain, [p.grad for p in model.parameters() if p.grad is not None]))


def test_layer_that_fails_between_forward_and_backward() -> None:
    """The first error that arrives breaks the receiver; the earlier calls are then computed again as before."""

    def receive(module: str, record: object) -> object:
        raise ValueError("broken")

    model, batch = Checkpointed(ATTENTION["sdpa"], a_module, layers=3, shared=True, use_reentrant=False), tokens()
    with session(model, strict=False) as watching:
        watching.receive = receive
        loss_of(model(*batch)).backward()
    assert list(watching.problems) == ["layers.0"]

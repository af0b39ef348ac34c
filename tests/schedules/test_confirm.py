"""The captured values tell which entries of a weight make them, or that they do not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnprobe as ap
from attnprobe.errors import ConfigurationError, ScheduleError
from attnprobe.schedules import ValueLearningRate
from tests.schedules.decoders import MODELS, WRITTEN_OUT, build
from tests.schedules.fused import (
    HEAD,
    HEADS,
    LAYOUTS,
    WIDTH,
    Grouped,
    Last,
    Multihead,
    PerHead,
    Roles,
    Separate,
    Stack,
    attend,
    batch,
)

X = batch(0)[0]


class Projected(nn.Module):
    """A fused ``qkv`` of so many outputs; ``parts`` makes queries, keys and values of them."""

    def __init__(self, parts: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], outputs: int = 3 * WIDTH) -> None:
        super().__init__()
        self.qkv, self.parts = nn.Linear(WIDTH, outputs), parts

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.parts(self.qkv(x)))


def thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.unflatten(-1, (3, HEADS, HEAD)).unbind(-3)
    return q, k, v


def look(model: nn.Module, *, closure: Any = None, **options: Any) -> dict[str, str]:
    """Name of each value weight -> where in it the values are."""
    schedule = ValueLearningRate(model, confirm=closure or (lambda: model(X)), **options)
    return {part.name: str(part).removeprefix(part.name) for part in schedule.parts}


def entries(schedule: ValueLearningRate) -> dict[str, Tensor]:
    """Name of each value weight -> which of its entries are meant."""
    found = {}
    for part in schedule.parts:
        marks = torch.zeros_like(part.parameter, dtype=torch.bool)
        (marks if part.stretch is None else part.stretch.view(marks)).fill_(True)
        found[part.name] = marks
    return found


def expected(model: nn.Module, roles: Roles) -> dict[str, Tensor]:
    marks = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in roles}
    for name, (axis, role) in roles.items():
        marks[name].index_fill_(axis, (role == 2).nonzero()[:, 0], True)
    return {name: mark for name, mark in marks.items() if mark.any()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------- found


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
def test_layouts(kind: type, training: bool) -> None:
    model = Stack(kind, kind).train(training)
    schedule = ValueLearningRate(model, confirm=lambda: model(X))
    assert same(entries(schedule), expected(model, model.roles))
    assert {*schedule.names} == {*model.roles}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, attention: str) -> None:
    if attention == "sdpa" and name in WRITTEN_OUT:
        pytest.skip("it has no other attention")
    model, roles = build(name, attention)
    schedule = ValueLearningRate(model.train(), confirm=lambda: model(input_ids=torch.arange(12).view(2, 6)))
    assert same(entries(schedule), expected(model, roles))


def test_value_weights_of_any_name_are_confirmed_and_trimmed() -> None:
    model = Stack(PerHead)
    model.layers[0].mixed = model.layers[0].query_key_value
    del model.layers[0].query_key_value
    model.layers[0].forward = lambda x: attend(*model.layers[0].mixed(x).unflatten(-1, (HEADS, 3, HEAD)).unbind(-2))
    assert look(model, parameters="*.mixed.*") == {
        "layers.0.mixed.weight": ".unflatten(0, (2, -1))[:, 8:12]",
        "layers.0.mixed.bias": ".unflatten(0, (2, -1))[:, 8:12]",
    }


def test_a_value_that_stands_alone_is_confirmed() -> None:
    model = Separate()
    del model.k_proj
    projections = (model.q_proj, model.q_proj, model.v_proj)
    model.forward = lambda x: attend(*(project(x).unflatten(-1, (HEADS, HEAD)) for project in projections))
    with pytest.raises(ScheduleError, match="cannot tell"):
        ValueLearningRate(model)
    assert look(model.double()) == {"v_proj.weight": "", "v_proj.bias": ""}


@pytest.mark.parametrize("key", [None, "parameter", "buffer"])
def test_biases_beside_a_fused_weight(key: str | None) -> None:
    """BEiT's and Swin v2's: the keys need none."""

    class Beit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
            if key == "parameter":
                self.k_bias = nn.Parameter(torch.zeros(WIDTH))
            elif key == "buffer":
                self.register_buffer("k_bias", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            k_bias = self.k_bias if key else torch.zeros_like(self.v_bias)
            bias = torch.cat([self.q_bias, k_bias, self.v_bias])
            return attend(*thirds(nn.functional.linear(x, self.qkv.weight, bias)))

    model = nn.Sequential(Beit(), Beit()).double()
    assert look(model) == {
        **{"0.v_bias": "", "0.qkv.weight": "[16:24]"},
        **{"1.v_bias": "", "1.qkv.weight": "[16:24]"},
    }
    with pytest.raises(ScheduleError, match=r"'0\.qkv\.weight', '1\.qkv\.weight'.*these alone: '0\.v_bias'"):
        ValueLearningRate(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_of_a_fused_weight() -> None:
    peft = pytest.importorskip("peft")
    model, _ = build("GPT2LMHeadModel")
    options = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(model, options)

    def closure() -> None:
        model(input_ids=torch.arange(12).view(2, 6))

    with pytest.raises(ScheduleError, match=r"c_attn\.base_layer\.weight'.*Pass confirm="):
        ValueLearningRate(model, parameters="*c_attn*")
    for options in ({}, {"parameters": "*c_attn*"}):  # lora_A feeds queries, keys and values alike
        with pytest.raises(ScheduleError, match=r"'[^']*lora_A\.default\.weight': in .*the same entries as the values"):
            look(model, closure=closure, **options)
    found = look(model, closure=closure, parameters=["*.c_attn.base_layer.*", "*.c_attn.lora_B.*"])
    assert {tuple(name.split(".c_attn.")[1:]): where for name, where in found.items()} == {
        ("base_layer.weight",): "[:, 32:48]",
        ("base_layer.bias",): "[32:48]",
        ("lora_B.default.weight",): "[32:48]",
    }


def test_two_calls_of_one_attention_share_a_projection() -> None:
    """As in differential attention: each call has its own half of the values."""

    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = thirds(self.qkv(x))
            return sum(attend(q, k, half) for half in v.chunk(2, -1)).repeat(1, 1, 2)

    model = nn.Sequential(Double(), Double()).double()
    assert look(model)["1.qkv.weight"] == "[16:24]"


def test_weights_that_every_layer_shares() -> None:
    layer = Projected(thirds)
    model = nn.Sequential(layer, layer, layer).double()
    assert look(model) == {"0.qkv.weight": "[16:24]", "0.qkv.bias": "[16:24]"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = Stack(Last, Grouped)

    def closure() -> None:
        x = X.clone().requires_grad_()
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)

    if reentrant:  # it runs without gradients first
        with pytest.raises(ScheduleError, match="ran without gradients"):
            look(model, closure=closure)
    else:
        assert look(model, closure=closure)["layers.1.qkv_proj.weight"] == "[12:16]"


def test_inputs_that_are_zero() -> None:
    """Their columns have no gradient."""
    x = X.clone()
    x[..., 2:5] = 0
    for kind in (Last, PerHead, Separate):
        model = Stack(kind)
        schedule = ValueLearningRate(model, confirm=lambda model=model: model(x))
        assert same(entries(schedule), expected(model, model.roles))


class Kernel(torch.autograd.Function):
    """Attention in a kernel of its own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


def test_kernels() -> None:
    class Own(nn.Module):
        def __init__(self, apply: Callable[..., Tensor]) -> None:
            super().__init__()
            self.qkv, self.apply_kernel = nn.Linear(WIDTH, 3 * WIDTH), apply

        def forward(self, x: Tensor) -> Tensor:
            return self.apply_kernel(*self.qkv(x[:, None]).chunk(3, -1))[:, 0]

    model = Own(lambda *parts: Kernel.apply(*parts)).double()
    with pytest.raises(ScheduleError, match=r"no captured attention depends on it.*inside of an autograd\.Function"):
        look(model)
    ap.register_attention(lambda q, k, v: {"query": q, "key": k, "value": v, "scale": 1.0})(Kernel)
    assert look(model) == {"qkv.weight": "[16:24]", "qkv.bias": "[16:24]"}


# ------------------------------------------------------------------------------------------------- nothing is changed


def state_of(model: nn.Module) -> list[Any]:
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    modes = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    return [gradients, buffers, modes, wanted, torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]]


def test_the_model_is_as_before_and_nothing_is_kept() -> None:
    model = nn.Sequential(Stack(Last), nn.BatchNorm1d(3, dtype=torch.float64), nn.Dropout(0.5))
    model(X).sum().backward()
    model[0].layers[0].c_attn.bias.requires_grad_(False)
    model[2].eval()
    gradient = model[0].layers[0].c_attn.weight.grad
    before = state_of(model)

    def closure(model: nn.Module = model) -> None:
        model.train()
        model(X).sum().backward()

    found = look(model, closure=closure)
    assert found["0.layers.0.c_attn.bias"] == "[16:24]"
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert model[0].layers[0].c_attn.weight.grad is gradient
    gone = weakref.ref(model)
    del model, closure
    gc.collect()
    assert gone() is None


def test_a_closure_that_raises() -> None:
    model = Stack(Last).train()
    before = state_of(model)

    def closure() -> None:
        model(X)
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        look(model, closure=closure)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


def test_a_probe_at_work_sees_nothing_of_it() -> None:
    model, memory = Stack(Last, PerHead), ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=1, writers=memory, action="record") as probe:
        look(model)
        loss = model(X).sum()
        loss.backward()
        probe.step(loss)
    (report,) = memory.reports
    assert report.valid
    assert not report.warnings


# ----------------------------------------------------------------------------------------------------------- refused


class Linear(nn.Module):
    """Attention without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q @ (k.mT @ v)


@pytest.mark.parametrize(
    ("parts", "outputs", "reason"),
    [
        (lambda x: (thirds(x)[0], thirds(x)[2], thirds(x)[2]), 24, "shared, mixed"),
        (lambda x: (*thirds(x)[:2], thirds(x)[2] + thirds(x)[0]), 24, "shared, mixed"),
        (
            lambda x: (thirds(x)[0], thirds(x)[1], X[..., None, :4].expand(6, 5, 2, 4) * x.mean() * 0),
            24,
            "do not depend",
        ),
        (lambda x: thirds(x[..., [*range(17), 20, 18, 19, 21, 22, 23, 24]]), 25, "fit no layout"),
    ],
)
def test_values_that_fit_no_layout(parts: Any, outputs: int, reason: str) -> None:
    model = nn.Sequential(Projected(parts, outputs)).double()
    with pytest.raises(ScheduleError, match=rf"'0\.qkv\.weight', '0\.qkv\.bias': .*{reason}"):
        look(model)


def test_attention_that_was_not_captured() -> None:
    with pytest.raises(ScheduleError, match=r"'0\.qkv\.weight', '0\.qkv\.bias': no captured attention depends on it"):
        look(nn.Sequential(Linear()).double())
    model = nn.Sequential(Linear(), Projected(thirds)).double()
    with pytest.raises(ScheduleError, match=r"'0\.qkv\.weight'.*its own attention was not captured.*Shown: '1\.qkv"):
        look(model)
    assert look(model, parameters="1.*") == {"1.qkv.weight": "[16:24]", "1.qkv.bias": "[16:24]"}


def test_a_forward_pass_that_does_not_reach_the_attention() -> None:
    model = Stack(Last)
    with pytest.raises(ScheduleError, match="no captured attention depends on it"):
        look(model, closure=lambda: None)
    with pytest.raises(ScheduleError, match="ran without gradients, as under no_grad"):
        look(model, closure=torch.no_grad()(lambda: model(X)))
    with pytest.raises(ScheduleError, match="not finite"):
        look(model, closure=lambda: model(X * torch.inf))


def test_a_separate_value_that_is_no_value_is_refused() -> None:
    model = Separate()
    model.k_proj, model.v_proj = model.v_proj, model.k_proj
    model.forward = lambda x: attend(
        *(p(x).unflatten(-1, (HEADS, HEAD)) for p in (model.q_proj, model.v_proj, model.k_proj))
    )
    with pytest.raises(ScheduleError, match=r"'v_proj\.weight': the captured values .* do not depend on it"):
        look(model.double())


def test_torchs_own_needs_no_confirmation_beside_others() -> None:
    model = Stack(Multihead, Last)
    with pytest.raises(ScheduleError, match=r"part: 'layers\.1\.c_attn\.weight', 'layers\.1\.c_attn\.bias'"):
        ValueLearningRate(model)
    names = ValueLearningRate(model, parameters="layers.0.attention.in_proj_*").names
    assert names == ("layers.0.attention.in_proj_weight", "layers.0.attention.in_proj_bias")
    assert same(entries(ValueLearningRate(model, confirm=lambda: model(X))), expected(model, model.roles))


@pytest.mark.parametrize("confirm", [True, "batch", torch.ones(1)])
def test_confirm_is_a_function(confirm: Any) -> None:
    with pytest.raises(ConfigurationError, match="confirm must be a function"):
        ValueLearningRate(copy.deepcopy(Stack(Last)), confirm=confirm)

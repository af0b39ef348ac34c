"""The EM-like schedule: equal to parameter groups, found by name, refused where it would not hold."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, prune

from attnprobe.errors import AttnProbeWarning, ConfigurationError, ScheduleError
from attnprobe.schedules import ValueLearningRate

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
BERT = ("query", "key", "value", "dense")


class Attention(nn.Module):
    """Two heads with separate projections, named as asked; only the value has a bias."""

    def __init__(self, width: int = 8, parts: tuple[str, str, str, str] = LLAMA) -> None:
        super().__init__()
        self.parts = parts
        for part in parts:
            self.add_module(part, nn.Linear(width, width, bias=part == parts[2]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.get_submodule(part)(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in self.parts[:3])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.get_submodule(self.parts[3])(mixed)


class Model(nn.Module):
    def __init__(self, layers: int = 2, width: int = 8, parts: tuple[str, str, str, str] = LLAMA) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(width, parts) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


class BareAttention(nn.Module):
    """Projections that are parameters of the module itself, biases too."""

    def __init__(self, names: tuple[str, ...] = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(2, 4, 4)))


def build(dtype: torch.dtype = torch.float64, layers: int = 2) -> Model:
    torch.manual_seed(0)
    return Model(layers).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 5, 8, generator=generator, dtype=dtype)
    return x, (x[:, 0, :3]).argmax(-1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, target = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), target)


def warmup_cosine(step: int) -> float:
    return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / 60))


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 60, scheduler: Any = None) -> nn.Module:
    scheduler = scheduler or optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than these sizes gain, and a busy machine makes it far worse."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ equal to groups


@pytest.mark.parametrize(
    ("kind", "lr", "options"),
    [
        (optim.SGD, 0.05, {"momentum": 0.9, "weight_decay": 0.1}),
        (optim.AdamW, 0.005, {"fused": True, "weight_decay": 0.3}),
        (optim.RMSprop, 0.001, {"momentum": 0.5, "centered": True}),
    ],
)
def test_the_hook_equals_parameter_groups(kind: type, lr: float, options: dict[str, Any]) -> None:
    start, hooked, grouped = build(layers=1), build(layers=1), build(layers=1)
    optimizer = kind(hooked.parameters(), lr=lr, **options)
    ValueLearningRate(hooked).attach(optimizer)
    train(hooked, optimizer)
    train(grouped, kind(ValueLearningRate(grouped).groups(lr, **options)))
    assert distance(hooked, start) > 1e-3
    assert distance(hooked, grouped) < (2e-11 if kind is optim.RMSprop else 1e-12)


def test_the_values_really_move_faster() -> None:
    plain, fast = build(), build()
    for model in (plain, fast):
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        if model is fast:
            ValueLearningRate(model, 7.0).attach(optimizer)
        train(model, optimizer, steps=1)
    start = dict(build().named_parameters())
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        factor = 7.0 if "v_proj" in name else 1.0
        torch.testing.assert_close(b - start[name], factor * (a - start[name]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("form", ["attach", "groups"])
def test_decoupled_weight_decay_is_multiplied(form: str) -> None:
    model = build()
    schedule = ValueLearningRate(model)
    if form == "attach":
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        schedule.attach(optimizer)
    else:
        optimizer = optim.AdamW(schedule.groups(1e-2, weight_decay=0.1))
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old * (1 - (1e-2 if "v_proj" in name else 1e-3)))


def test_any_number_of_groups_with_rates_of_their_own() -> None:
    def rates(model: nn.Module, multiplier: float) -> list[dict[str, Any]]:
        base = {"layers.0": 0.1, "layers.1": 0.02, "head": 0.05}
        return [
            {"params": [p], "lr": lr * (multiplier if "v_proj" in name else 1)}
            for name, p in model.named_parameters()
            for prefix, lr in base.items()
            if name.startswith(prefix)
        ]

    hooked, grouped = build(), build()
    optimizer = optim.SGD(rates(hooked, 1.0), momentum=0.9)
    ValueLearningRate(hooked, 3.0).attach(optimizer)
    train(hooked, optimizer)
    train(grouped, optim.SGD(rates(grouped, 3.0), momentum=0.9))
    assert distance(hooked, grouped) < 1e-12


def test_two_optimizers_each_hold_a_part() -> None:
    hooked, grouped = build(), build()
    schedule = ValueLearningRate(hooked)
    pair = [optim.SGD(hooked.layers[0].parameters(), lr=0.05), optim.Adam(hooked.layers[1].parameters(), lr=0.01)]
    handles = [schedule.attach(optimizer) for optimizer in pair]
    other = [
        optim.SGD(ValueLearningRate(grouped.layers[0]).groups(0.05)),
        optim.Adam(ValueLearningRate(grouped.layers[1]).groups(0.01)),
    ]
    for model, optimizers in ((hooked, pair), (grouped, other)):
        for step in range(10):
            model.zero_grad()
            loss_of(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert distance(hooked, grouped) < 1e-12
    assert len({id(handle) for handle in handles}) == 2


def test_one_cycle_keeps_the_ratio_with_the_hook_and_with_a_rate_per_group() -> None:
    hooked, grouped = build(), build()
    one = optim.SGD(hooked.parameters(), lr=0.01)
    ValueLearningRate(hooked).attach(one)
    train(hooked, one, scheduler=optim.lr_scheduler.OneCycleLR(one, max_lr=0.05, total_steps=61))
    two = optim.SGD(ValueLearningRate(grouped).groups(0.01))
    train(grouped, two, scheduler=optim.lr_scheduler.OneCycleLR(two, max_lr=[0.05, 0.5], total_steps=61))
    assert distance(hooked, grouped) < 1e-12


def test_a_closure() -> None:
    hooked, grouped = build(), build()
    one = optim.AdamW(hooked.parameters(), lr=0.005)
    ValueLearningRate(hooked).attach(one)
    two = optim.AdamW(ValueLearningRate(grouped).groups(0.005))
    for model, optimizer in ((hooked, one), (grouped, two)):
        for step in range(20):

            def closure(model: nn.Module = model, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert isinstance(optimizer.step(closure), Tensor)
    assert distance(hooked, grouped) < 1e-12


def test_a_closure_that_raises_does_no_harm() -> None:
    hooked, grouped = build(), build()
    optimizer = optim.SGD(hooked.parameters(), lr=0.05)
    ValueLearningRate(hooked).attach(optimizer)

    def fails() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    assert distance(hooked, build()) == 0
    train(hooked, optimizer)
    assert distance(hooked, train(grouped, optim.SGD(ValueLearningRate(grouped).groups(0.05)))) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_gradient_scaler_skips(fused: bool) -> None:
    model = build(torch.float32)
    optimizer = optim.Adam(model.parameters(), lr=0.01, fused=fused)
    ValueLearningRate(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for skipped in (True, False, True):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        if skipped:
            model.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert (distance(model, before) == 0) is skipped


def test_parameters_without_a_gradient_stay_bit_for_bit() -> None:
    model = build(torch.float32)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    ValueLearningRate(model).attach(optimizer)
    before = copy.deepcopy(model)
    model.head(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert distance(model.layers, before.layers) == 0
    assert distance(model.head, before.head) > 0


# ------------------------------------------------------------------------------------------- handles and optimizers


def test_removed_hooks_leave_a_plain_optimizer() -> None:
    hooked, plain = build(), build()
    optimizer = optim.SGD(hooked.parameters(), lr=0.05)
    schedule = ValueLearningRate(hooked)
    with schedule.attach(optimizer) as handle:
        assert handle.active
    assert not handle.active
    handle.remove()
    train(hooked, optimizer, steps=5)
    assert distance(hooked, train(plain, optim.SGD(plain.parameters(), lr=0.05), steps=5)) == 0
    schedule.attach(optimizer)  # free again


def test_nothing_multiplies_twice() -> None:
    model = build()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    schedule = ValueLearningRate(model)
    schedule.attach(optimizer)
    for again in (schedule, ValueLearningRate(model, 2.0)):
        with pytest.raises(ScheduleError, match="already multiplies"):
            again.attach(optimizer)
    grouped = optim.SGD(schedule.groups(0.05))
    with pytest.raises(ScheduleError, match=r"already multiplies .* groups\(\)"):
        schedule.attach(grouped)


def test_one_weight_in_two_optimizers_is_multiplied_once() -> None:
    model = build()
    first, second = (optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    handle = ValueLearningRate(model).attach(first)
    with pytest.raises(ScheduleError, match=r"already multiplies .* in another optimizer, SGD.*remove\(\) its handle"):
        ValueLearningRate(model, parameters="layers.1.v_proj.*").attach(second)
    handle.remove()
    handle = ValueLearningRate(model, parameters="layers.0.*").attach(first)
    ValueLearningRate(model, parameters="layers.1.v_proj.*").attach(second)
    assert handle.active


def test_an_optimizer_that_was_dropped_is_in_nobodys_way() -> None:
    model = build()
    for _ in range(3):  # a notebook cell that ran again
        optimizer = optim.SGD(model.parameters(), lr=0.05)
        optimizer.itself = optimizer  # only the garbage collector ends that
        ValueLearningRate(model).attach(optimizer)


def test_disjoint_schedules_share_an_optimizer() -> None:
    model = build()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    ValueLearningRate(model, parameters="layers.0.v_proj.*").attach(optimizer)
    ValueLearningRate(model, 2.0, parameters="layers.1.v_proj.*").attach(optimizer)


def test_a_parameter_group_added_later_is_multiplied() -> None:
    hooked, grouped = build(), build()
    optimizer = optim.SGD(hooked.layers[0].parameters(), lr=0.05)
    ValueLearningRate(hooked).attach(optimizer)
    optimizer.add_param_group({"params": [*hooked.layers[1].parameters(), *hooked.head.parameters()]})
    train(hooked, optimizer)
    assert distance(hooked, train(grouped, optim.SGD(ValueLearningRate(grouped).groups(0.05)))) < 1e-12


def test_state_dicts_are_unchanged_and_resume() -> None:
    straight, first = build(), build()
    whole = optim.Adam(straight.parameters(), lr=0.01)
    ValueLearningRate(straight).attach(whole)
    half = optim.Adam(first.parameters(), lr=0.01)
    keys = half.state_dict().keys()
    ValueLearningRate(first).attach(half)
    assert half.state_dict().keys() == keys
    for model, optimizer in ((straight, whole), (first, half)):
        train(model, optimizer, steps=5, scheduler=optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
    second = build()
    second.load_state_dict(first.state_dict())
    resumed = optim.Adam(second.parameters(), lr=0.01)
    resumed.load_state_dict(half.state_dict())
    ValueLearningRate(second).attach(resumed)
    for model, optimizer in ((straight, whole), (second, resumed)):
        train(model, optimizer, steps=5, scheduler=optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
    assert distance(straight, second) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_optimizer_has_no_hooks(copied: Callable[[Any], Any]) -> None:
    model = build()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    schedule = ValueLearningRate(model)
    schedule.attach(optimizer)
    twin, twin_optimizer, twin_schedule = copied((model, optimizer, schedule))
    train(twin, twin_optimizer, steps=3)
    plain = build()
    assert distance(twin, train(plain, optim.SGD(plain.parameters(), lr=0.05), steps=3)) == 0
    twin_schedule.attach(twin_optimizer)


def test_nothing_outlives_the_optimizer() -> None:
    model = build()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    model.optimizer = [optimizer]  # as a Lightning model reaches its optimizers
    ValueLearningRate(model).attach(optimizer)
    gone = weakref.ref(optimizer), weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_the_copy_lives_during_the_step_only() -> None:
    model = build()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    handle = ValueLearningRate(model).attach(optimizer)
    sizes = []
    optimizer.register_step_pre_hook(lambda *_: sizes.append(len(handle._old)))
    train(model, optimizer, steps=2)
    assert sizes == [4, 4]
    assert handle._old == []


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", [optim.Rprop, optim.Adafactor, optim.LBFGS, optim.ASGD, optim.SparseAdam])
def test_optimizers_that_would_not_be_exact_are_refused(kind: type) -> None:
    model = build()
    with pytest.raises(ScheduleError, match=kind.__name__):
        ValueLearningRate(model).attach(kind(model.parameters(), lr=0.01))


def test_refused_names_hold_for_subclasses_and_other_packages() -> None:
    model = build()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    kinds = [type("Mine", (optim.Rprop,), {}), type("Muon", (optim.SGD,), {})]
    if hasattr(optim, "Muon"):
        kinds.append(optim.Muon)
    for kind in kinds:
        with pytest.raises(ScheduleError, match=r"Rprop|Muon"):
            ValueLearningRate(model).attach(kind(matrices, lr=0.01))


def test_an_unknown_optimizer_warns_once() -> None:
    class Lion(optim.SGD):
        pass

    model = build()
    optimizer = Lion(model.parameters(), lr=0.01)
    with pytest.warns(AttnProbeWarning, match=r"not verified with .*Lion") as caught:
        ValueLearningRate(model).attach(optimizer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    train(model, optimizer, steps=2)  # warnings are errors here


def test_an_optimizer_without_value_weights_is_refused() -> None:
    model = build()
    with pytest.raises(ScheduleError, match=r"none of the value parameters: 'layers\.0\.v_proj\.weight'"):
        ValueLearningRate(model).attach(optim.SGD(model.head.parameters(), lr=0.1))


def test_half_precision_weights_and_differentiable_steps_are_refused() -> None:
    half, model = build(torch.bfloat16), build()
    with pytest.raises(ScheduleError, match="32 bits"):
        ValueLearningRate(half).attach(optim.SGD(half.parameters(), lr=0.1))
    with pytest.raises(ScheduleError, match="differentiable"):
        ValueLearningRate(model).attach(optim.SGD(model.parameters(), lr=0.1, differentiable=True))


def one_step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_weights_that_are_cast_after_attach_are_left_alone() -> None:
    model, plain = build(), build()
    optimizers = [optim.SGD(net.parameters(), lr=0.5) for net in (model, plain)]
    ValueLearningRate(model).attach(optimizers[0])
    for net in (model, plain):
        net.layers[0].bfloat16()
    with pytest.warns(AttnProbeWarning, match=r"does not multiply 'layers\.0\.v_proj\.weight', .*32 bits") as caught:
        one_step(model, optimizers[0])
    assert len(caught) == 1
    one_step(plain, optimizers[1])
    assert torch.equal(model.layers[0].v_proj.weight, plain.layers[0].v_proj.weight)
    start = build().layers[1].v_proj.weight
    torch.testing.assert_close(model.layers[1].v_proj.weight, start - 5)
    one_step(model, optimizers[0])  # warnings are errors here


def test_a_parameter_group_added_later_is_checked() -> None:
    model = build()
    model.layers[1].bfloat16()
    before = model.layers[1].v_proj.weight.detach().clone()
    optimizer = optim.SGD(model.layers[0].parameters(), lr=0.5)
    ValueLearningRate(model).attach(optimizer)
    optimizer.add_param_group({"params": [*model.layers[1].parameters()]})
    with pytest.warns(AttnProbeWarning, match=r"does not multiply 'layers\.1\.v_proj\.weight'"):
        one_step(model, optimizer)
    assert torch.equal(model.layers[1].v_proj.weight, before - 0.5)
    torch.testing.assert_close(model.layers[0].v_proj.weight, build().layers[0].v_proj.weight - 5)


def test_frozen_value_weights() -> None:
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("v_proj" not in name)
    schedule = ValueLearningRate(model)
    assert len(schedule.names) == 4
    for use in (lambda: schedule.groups(0.1), lambda: schedule.attach(optim.SGD(model.parameters(), lr=0.1))):
        with pytest.raises(ScheduleError, match="frozen"):
            use()
    model.layers[1].v_proj.requires_grad_()
    _, fast = schedule.groups(0.1)
    assert [id(p) for p in fast["params"]] == [id(p) for p in model.layers[1].v_proj.parameters()]
    frozen = model.layers[0].v_proj.weight.clone()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    schedule.attach(optimizer)
    train(model, optimizer, steps=3)
    assert torch.equal(model.layers[0].v_proj.weight, frozen)


@pytest.mark.parametrize("multiplier", [0, -1.0, math.inf, math.nan, True, "10", None])
def test_multipliers_that_cannot_work(multiplier: Any) -> None:
    with pytest.raises(ConfigurationError, match="multiplier"):
        ValueLearningRate(build(), multiplier)


def test_attach_takes_optimizers_only() -> None:
    with pytest.raises(ConfigurationError, match="got list"):
        ValueLearningRate(build()).attach([])  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- groups


def test_groups_cover_every_trainable_parameter_once() -> None:
    model = build()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    model.head.bias.requires_grad_(False)
    rest, fast = ValueLearningRate(model, 4.0).groups(0.01, weight_decay=0.2)
    assert (rest["lr"], fast["lr"]) == (0.01, 0.04)
    assert rest["weight_decay"] == fast["weight_decay"] == 0.2
    ids = [id(p) for p in rest["params"] + fast["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    optim.AdamW([rest, fast]).state_dict()


# ----------------------------------------------------------------------------------------------------------- names


def test_names_of_common_models() -> None:
    assert ValueLearningRate(Model()).names == (
        *("layers.0.v_proj.weight", "layers.0.v_proj.bias", "layers.1.v_proj.weight", "layers.1.v_proj.bias"),
    )
    assert ValueLearningRate(Model(1, parts=BERT)).names == ("layers.0.value.weight", "layers.0.value.bias")
    assert ValueLearningRate(BareAttention()).names == ("W_V", "b_V")
    assert ValueLearningRate(nn.Sequential(BareAttention(("W_Q", "_W_K", "_W_V")))).names == ("0._W_V",)


@pytest.mark.parametrize(
    "parts",
    [
        *[("to_q", "to_k", "to_v", "to_out"), ("q_lin", "k_lin", "v_lin", "out_lin"), ("q", "k", "v", "o")],
        *[("w_q", "w_k", "w_v", "w_o"), ("wq", "wk", "wv", "wo"), ("w_qs", "w_ks", "w_vs", "fc")],
        *[("query_proj", "key_proj", "value_proj", "dense"), ("linear_q", "linear_k", "linear_v", "linear_out")],
        *[("lin_query", "lin_key", "lin_value", "lin_skip"), ("toqueries", "tokeys", "tovalues", "unify")],
    ],
)
def test_more_conventions(parts: tuple[str, str, str, str]) -> None:
    assert ValueLearningRate(Model(1, parts=parts)).names == tuple(
        f"layers.0.{parts[2]}.{leaf}" for leaf in ("weight", "bias")
    )


def test_multihead_attention_is_certain() -> None:
    schedule = ValueLearningRate(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    assert [str(part) for part in schedule.parts] == ["v_proj_weight", "in_proj_bias[16:24]"]
    schedule = ValueLearningRate(nn.TransformerEncoderLayer(8, 2, 16))
    assert [str(part) for part in schedule.parts] == [
        "self_attn.in_proj_weight[16:24]",
        "self_attn.in_proj_bias[16:24]",
    ]

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(ScheduleError, match=r"names do not tell which part: 'in_proj_weight', 'in_proj_bias'"):
        ValueLearningRate(Own(8, 2))


@pytest.mark.parametrize("part", ["c_attn", "qkv", "query_key_value", "qkv_proj", "Wqkv", "to_kv", "kv_b_proj"])
def test_fused_weights_are_refused_by_name(part: str) -> None:
    model = nn.ModuleDict({"h": nn.ModuleDict({part: nn.Linear(4, 12)})})
    with pytest.raises(ScheduleError, match=rf"'h\.{part}\.weight'.*Pass confirm=.*lambda: model"):
        ValueLearningRate(model)
    with pytest.raises(ScheduleError, match=rf"'h\.{part}\.weight'.*Pass confirm="):
        ValueLearningRate(model, parameters="h.*")
    mixed = nn.ModuleDict({"fused": model, "separate": Attention()})
    with pytest.raises(ScheduleError, match=r"to act on these alone: 'separate\.v_proj\.weight'"):
        ValueLearningRate(mixed)
    assert len(ValueLearningRate(mixed, parameters="separate.v_proj.*").names) == 2


NORMS = {
    "WeightNorm": (parametrizations.weight_norm, "parametrizations.weight.original0"),
    "SpectralNorm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "WeightNorm (old)": (nn.utils.weight_norm, "weight_g"),
    "SpectralNorm (old)": (nn.utils.spectral_norm, "weight_orig"),
    "RandomUnstructured": (lambda module: prune.random_unstructured(module, "weight", 0.5), "weight_orig"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_a_parametrization_computes(kind: str, bias: bool) -> None:
    norm, piece = NORMS[kind]
    model = build()
    for part in ("q_proj", "k_proj", "v_proj"):
        norm(model.layers[1].get_submodule(part))
    if not bias:
        model.layers[1].v_proj.register_parameter("bias", None)
    told = rf"{kind.split()[0]}\): 'layers\.1\.v_proj\.weight'.*'layers\.1\.v_proj\.{piece}'"
    for options in ({}, {"confirm": lambda: model(batch(0)[0])}):
        with pytest.raises(ScheduleError, match=told):
            ValueLearningRate(model, **options)
    if bias:
        with pytest.raises(ScheduleError, match=told):
            ValueLearningRate(model, parameters=["*.v_proj.weight", "*.v_proj.bias"])
    named = ValueLearningRate(model, parameters="*.v_proj.*").names
    assert {*named} == {name for name, _ in model.named_parameters() if "v_proj" in name}


def test_a_value_is_found_beside_a_parametrized_query() -> None:
    model = build(layers=1)
    parametrizations.weight_norm(model.layers[0].q_proj)
    assert ValueLearningRate(model).names == ("layers.0.v_proj.weight", "layers.0.v_proj.bias")


def test_torchs_own_attention_with_a_parametrized_weight() -> None:
    model = parametrizations.spectral_norm(nn.MultiheadAttention(8, 2), "in_proj_weight")
    with pytest.raises(ScheduleError, match=r"SpectralNorm\): 'in_proj_weight'"):
        ValueLearningRate(model)
    with pytest.raises(ScheduleError, match=r"SpectralNorm\): 'in_proj_weight'"):
        ValueLearningRate(model, parameters="in_proj_bias")
    with pytest.raises(ScheduleError, match=r"fused weights hold more.*'parametrizations\.in_proj_weight\.original'"):
        ValueLearningRate(model, parameters="*in_proj*")


@pytest.mark.parametrize("name", ["c_attn.base_layer.weight", "c_attn.lora_B.default.weight", "in_proj.weight"])
def test_a_fused_weight_is_known_by_any_part_of_its_name(name: str) -> None:
    model: nn.Module = nn.Linear(4, 12, bias=False)
    for part in reversed(name.split(".")[:-1]):
        model = nn.ModuleDict({part: model})
    for options in ({}, {"parameters": "*"}):
        with pytest.raises(ScheduleError, match=rf"'{name}'.*Pass confirm="):
            ValueLearningRate(model, **options)


def test_what_is_called_like_a_fused_weight_but_is_none() -> None:
    apart = nn.ModuleDict({"qkv": Attention()})  # q_proj, k_proj and v_proj inside
    assert ValueLearningRate(apart).names == ("qkv.v_proj.weight", "qkv.v_proj.bias")
    assert ValueLearningRate(apart, parameters="qkv.v_proj.*").names == ("qkv.v_proj.weight", "qkv.v_proj.bias")
    model = nn.ModuleDict({"self_attn": Attention(), "mlp": nn.ModuleDict({"in_proj": nn.Linear(8, 8)})})
    assert ValueLearningRate(model).names == ("self_attn.v_proj.weight", "self_attn.v_proj.bias")
    model.attention = nn.ModuleDict({"in_proj": nn.Linear(8, 24)})
    with pytest.raises(ScheduleError, match=r"which part: 'attention\.in_proj\.weight', 'attention\.in_proj\.bias'\."):
        ValueLearningRate(model)


def test_a_value_without_query_and_key_is_not_certain() -> None:
    model = nn.ModuleDict({"body": Attention(), "value": nn.Linear(8, 1)})  # an actor-critic
    with pytest.raises(ScheduleError, match=r"cannot tell.*'value\.weight'.*Certain: 'body\.v_proj\.weight'"):
        ValueLearningRate(model)
    feed_forward = nn.ModuleDict({"key": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
    with pytest.raises(ScheduleError, match="cannot tell"):
        ValueLearningRate(feed_forward)
    assert ValueLearningRate(feed_forward, parameters="value.weight").names == ("value.weight",)


def test_nothing_found_lists_what_was_looked_for_and_candidates() -> None:
    with pytest.raises(ScheduleError, match=r"v_proj, value, v, W_V.*Parameters: '0\.weight', '0\.bias'"):
        ValueLearningRate(nn.Sequential(nn.Linear(2, 2)))
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "attention": nn.ModuleDict({"third": nn.Linear(2, 2, bias=False)})})
    with pytest.raises(ScheduleError, match=r"Candidates: 'attention\.third\.weight'\.$"):
        ValueLearningRate(model)


def test_patterns() -> None:
    model = Model(12)
    assert ValueLearningRate(model, parameters=["*.v_proj.weight", "layers.0.v_proj.bias"]).names[:3] == (
        *("layers.0.v_proj.weight", "layers.0.v_proj.bias", "layers.1.v_proj.weight"),
    )
    with pytest.raises(ScheduleError, match=r"no parameter matches '\*\.value'.* and 16 more"):
        ValueLearningRate(model, parameters=["*.v_proj.*", "*.value"])
    with pytest.raises(ConfigurationError, match="empty"):
        ValueLearningRate(model, parameters=[])


def test_shared_parameters() -> None:
    model = build()
    model.layers[1].v_proj = model.layers[0].v_proj
    schedule = ValueLearningRate(model)
    assert schedule.names == ("layers.0.v_proj.weight", "layers.0.v_proj.bias")
    with pytest.raises(ScheduleError, match=r"same parameter as 'layers\.1\.v_proj\.weight'"):
        ValueLearningRate(model, parameters="layers.0.v_proj.*")
    grouped = copy.deepcopy(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.005)
    schedule.attach(optimizer)
    train(model, optimizer)
    train(grouped, optim.AdamW(ValueLearningRate(grouped).groups(0.005)))
    assert distance(model, grouped) < 1e-12


def test_a_value_tied_to_its_key_is_refused() -> None:
    model = build()
    model.layers[0].k_proj.weight = model.layers[0].v_proj.weight
    with pytest.raises(ScheduleError, match=r"'layers\.0\.v_proj\.weight' is the same.*'layers\.0\.k_proj\.weight'"):
        ValueLearningRate(model)


# ------------------------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.parametrize("manual", [False, True])
def test_lightning_fit(manual: bool) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, hook: bool) -> None:
            super().__init__()
            self.model, self.hook = build(), hook
            self.automatic_optimization = not manual

        def on_train_start(self) -> None:
            if manual and self.hook:
                self.schedule.attach(self.optimizers())  # Lightning's wrapper

        def training_step(self, data: list[Tensor]) -> Tensor:
            loss = nn.functional.cross_entropy(self.model(data[0]), data[1])
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            self.schedule = ValueLearningRate(self)
            groups = self.parameters() if self.hook else self.schedule.groups(0.01)
            optimizer = optim.AdamW(groups, lr=0.01)
            if self.hook and not manual:
                self.schedule.attach(optimizer)
            return [optimizer], [optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    x, y = batch(0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    results = []
    for hook in (True, False):
        module = Module(hook)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        clipping = {} if manual else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=5, enable_model_summary=False, log_every_n_steps=1, **quiet, **clipping
        )
        trainer.fit(module, data)
        results.append(module.model)
    assert distance(results[0], build()) > 1e-3
    assert distance(*results) < 1e-12

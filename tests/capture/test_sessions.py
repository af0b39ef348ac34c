"""What a session leaves alone, and how sessions and unusual ways to use a model go together."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnprobe import AttentionProbe
from attnprobe.capture.modules import module_names
from attnprobe.capture.session import CHANGED, FROZEN, REPEATED, SILENT, UNRECORDED
from attnprobe.errors import AttnProbeWarning
from attnprobe.statistics.dense import dense_parts
from tests.capture.models import (
    HEADS,
    WIDTH,
    Attention,
    Encoder,
    Model,
    Multihead,
    bmm,
    explicit,
    explicit_in_place,
    loss_of,
    sdpa,
    tokens,
)
from tests.capture.reference import names, session
from tests.capture.training import assert_same_training
from tests.global_state import global_state

ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Attention(sdpa(is_causal=True)),
    "bmm": lambda: Attention(bmm),
    "multihead weights": lambda: Multihead(batch_first=True),
    "multihead": lambda: Multihead(call={"need_weights": False}, batch_first=True),
}
each_kind = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION.keys())


def run(model: nn.Module) -> None:
    loss_of(model(*tokens())).backward()


# Modules and their names


def test_shared_module() -> None:
    class Shared(Model):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.layers[0](x)
            return x

    model = Shared(ATTENTION["sdpa"], layers=1)
    with session(model) as watching:
        run(model)
    assert names(watching.seen) == ["layers.0#0", "layers.0#1", "layers.0#2"]


def test_two_attentions_in_one_module_and_submodules_called_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(sdpa()), Attention(bmm)

        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            o = nn.functional.scaled_dot_product_attention(q, q, q)
            return self.second(o.transpose(1, 2).flatten(2)) + (q @ q.mT).softmax(-1).matmul(q).mean()

    model = Two()
    (x,) = tokens()
    with session(model) as watching:
        x = model.first(x)  # not through the model's own forward
        loss_of(model(x)).backward()
    assert names(watching.seen) == ["first", "Two#0", "Two#1", "second"]


def test_wrappers_do_not_show_in_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = Wrapper(Model(lambda: Wrapper(Attention(sdpa()))))
    with session(model) as watching:
        run(model)
    assert names(watching.seen) == ["layers.0", "layers.1"]
    assert module_names(model)[id(model)] == "Wrapper"


def test_layers_can_be_chosen() -> None:
    model = Model(ATTENTION["sdpa"])
    with session(model, layers=["layers.1*"]) as watching:
        run(model)
    assert names(watching.seen) == ["layers.1"]


def test_a_part_of_the_model() -> None:
    model = Model(ATTENTION["multihead"])
    with session(model.layers[1]) as watching:
        run(model)
    assert names(watching.seen) == ["attn"]


# Calls without gradients


@each_kind
def test_frozen_layers(attention: Callable[[], nn.Module]) -> None:
    model = Model(attention)
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    with session(model) as watching:
        run(model)
    assert [call.reason for call in watching.seen] == [FROZEN, ""]
    assert "frozen" in FROZEN
    probe = AttentionProbe(model)
    run(model)
    with pytest.warns(AttnProbeWarning, match="frozen"):
        probe.step()
    probe.close()


def test_frozen_weights_below_trained_ones() -> None:
    model = Model(ATTENTION["sdpa"])
    model.layers.requires_grad_(False)
    with session(model) as watching:
        run(model)
    assert names(watching.seen) == ["layers.0", "layers.1"]


@each_kind
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_are_ignored(
    attention: Callable[[], nn.Module], context: Callable[[], object]
) -> None:
    model = Model(attention)
    with session(model) as watching:
        with context():
            model(*tokens())
        assert watching.seen == []
        run(model)
        with context():
            model(*tokens())
    assert names(watching.seen) == [name for name in names(watching.seen) if "#" not in name]
    assert len(watching.seen) == 2


def test_attention_without_gradients_beside_one_with() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(sdpa())

        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            with torch.no_grad():
                nn.functional.scaled_dot_product_attention(q, q, q)
                self.inner(x)
            o = nn.functional.scaled_dot_product_attention(q, q, q) if self.training else q
            return o.transpose(1, 2).flatten(2)

    model = Model(Teacher)
    with session(model) as watching:
        run(model)
    reasons = {(call.module, call.index, call.reason) for call in watching.seen}
    assert reasons == {(f"layers.{i}", 0, reason) for i in range(2) for reason in ("", UNRECORDED)}
    with session(model.eval()) as watching:
        run(model)
    assert {call.reason for call in watching.seen} == {UNRECORDED}


def test_attention_whose_output_is_not_used() -> None:
    class Unused(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[0](x)
            return self.layers[1](x)

    model = Unused(ATTENTION["sdpa"])
    with session(model) as watching:
        run(model)
    assert [call.reason for call in watching.seen] == [SILENT, ""]


def test_two_backward_passes_through_one_forward_pass() -> None:
    model = Model(ATTENTION["bmm"])
    with session(model) as watching:
        loss = loss_of(model(*tokens()))
        loss.backward(retain_graph=True)
        loss.backward()
    assert {call.reason for call in watching.seen} == {REPEATED}


@each_kind
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_forward_only(
    attention: Callable[[], nn.Module], context: Callable[[], contextlib.AbstractContextManager[object]]
) -> None:
    model = Model(attention).eval()
    with session(model, forward_only=True) as watching, context():
        model(*tokens())
    assert [call.module.removesuffix(".attn") for call in watching.seen] == ["layers.0", "layers.1"]
    for call in watching.seen:
        parts = dense_parts(call.result)
        assert call.result.error is None
        torch.testing.assert_close(parts.alpha @ parts.value, parts.output, rtol=1e-5, atol=1e-6)


# In-place operations after the attention


def scores_changed(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Legal, because the softmax keeps its result only."""
    scores = q @ k.mT
    o = scores.softmax(-1) @ v
    with torch.no_grad():
        scores.zero_()
    return o


def scores_changed_early(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = scores.softmax(-1)
    with torch.no_grad():
        scores.zero_()
    return weights @ v


def output_changed(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) @ v).add_(q).mul_(2.0)


def under_checkpoint(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *qkv: checkpoint(lambda *qkv: attend(self, *qkv), *qkv, use_reentrant=False)


class Inside(nn.Module):
    """The module itself is what runs again."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attn = Attention(attend)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attn, x, use_reentrant=False)


PLACES: dict[str, Callable[[Callable[..., Tensor]], nn.Module]] = {
    "plain": Attention,
    "bare function checkpointed": lambda attend: Attention(under_checkpoint(attend)),
    "module checkpointed": Inside,
}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


@each_place
@pytest.mark.parametrize("attend", [scores_changed, scores_changed_early])
def test_scores_changed_in_place(
    attend: Callable[..., Tensor], place: Callable[[Callable[..., Tensor]], nn.Module]
) -> None:
    model = Model(lambda: place(attend))
    with session(model) as watching:
        run(model)
    assert {call.module.removesuffix(".attn"): call.reason for call in watching.seen} == {
        "layers.0": CHANGED,
        "layers.1": CHANGED,
    }
    assert not watching.problems
    assert_same_training(lambda: Model(lambda: place(attend)), tokens(), watches={"session": session})


@each_place
def test_output_changed_in_place(place: Callable[[Callable[..., Tensor]], nn.Module]) -> None:
    model = Model(lambda: place(output_changed))
    with session(model) as watching:
        run(model)
    assert len(names(watching.seen)) == 2
    assert all(call.result.output is None for call in watching.seen)
    assert_same_training(lambda: Model(lambda: place(output_changed)), tokens())


@each_place
def test_scores_made_in_place(place: Callable[[Callable[..., Tensor]], nn.Module]) -> None:
    """Changes before the softmax are no changes, wherever the tensors were kept meanwhile."""
    model = Model(lambda: place(explicit_in_place))
    for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        with session(model) as watching, context:
            run(model)
        assert len(names(watching.seen)) == 2
        assert all(call.result.output is not None for call in watching.seen)


# The fused inference kernels


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fused_inference_stays_fused(
    context: Callable[[], contextlib.AbstractContextManager[object]], padded: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = padded
    with context():
        (x,) = tokens()
        plain = model(x, src_key_padding_mask=padding)
        for part in (model, model.layers[0], model.layers[0].self_attn):
            with session(part) as watching:
                assert torch.equal(model(x, src_key_padding_mask=padding), plain)
            assert watching.seen == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("context", [torch.no_grad, contextlib.nullcontext])
def test_fused_inference_on_nested_tensors(context: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    (x,) = tokens()
    with context():
        plain = model(x, src_key_padding_mask=padding)
        with session(model) as watching:
            assert torch.equal(model(x, src_key_padding_mask=padding), plain)
    assert watching.seen == []


def test_evaluation_measures_what_would_be_fused() -> None:
    """Asked for numbers without gradients, the session has to see inside."""
    model = Encoder().eval()
    with session(model, forward_only=True) as watching, torch.no_grad():
        model(*tokens())
    assert names(watching.seen) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


def test_gradients_at_the_inputs_of_a_frozen_model_by_keyword() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().requires_grad_(False)
    (x,) = tokens()
    x.requires_grad_()
    with session(attention) as watching:
        attention(query=x, key=x, value=x)[0].sum().backward()
    assert names(watching.seen) == ["MultiheadAttention"]


# Copies of the model


def test_model_can_be_copied_pickled_and_saved_while_watched() -> None:
    class Copying(Model):
        def forward(self, x: Tensor) -> Tensor:
            copies.append(copy.deepcopy(self))
            return super().forward(x)

    copies: list[Model] = []
    model, encoder = Copying(ATTENTION["multihead"]), Encoder(dropout=0.0)
    keys = set(model.__dict__), [*model.state_dict()]
    for watched in (model, encoder):
        with session(watched) as watching:
            run(watched)
            buffer = io.BytesIO()
            torch.save(watched.state_dict(), buffer)
            copies.append(copy.deepcopy(watched))
            if watched is encoder:
                copies.append(pickle.loads(pickle.dumps(watched)))
        assert len(names(watching.seen)) == 2
        with session(watched) as watching:
            run(copies[-1])
        assert watching.seen == []
    assert (set(model.__dict__), [*model.state_dict()]) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for c in copies for module in c.modules())


# Several sessions at once


@each_kind
def test_two_models_at_once(attention: Callable[[], nn.Module]) -> None:
    one, two = Model(attention), Model(attention, layers=3)
    with session(one) as first, session(two) as second:
        loss_of(one(*tokens()) + two(*tokens())).backward()
    assert [len(names(watching.seen)) for watching in (first, second)] == [2, 3]


@each_kind
@pytest.mark.parametrize("part", ["", "layers", "layers.1"])
def test_two_sessions_on_one_model(attention: Callable[[], nn.Module], part: str) -> None:
    model = Model(attention)
    inner = model.get_submodule(part)
    with session(model) as alone:
        run(model)
    for order in (model, inner), (inner, model):
        with session(order[0]) as first, session(order[1]) as second:
            before = global_state()
            run(model)
            assert global_state() == before  # also while both are there
            with torch.no_grad():
                model(*tokens())
            assert global_state() == before
        outer, other = (first, second) if order[0] is model else (second, first)
        assert names(outer.seen) == names(alone.seen)
        assert len(other.seen) == (1 if part == "layers.1" else 2)
        for call in (*outer.seen, *other.seen):
            assert call.result.shape == alone.seen[0].result.shape
            assert call.result.self_attention is True


def test_sessions_that_end_in_the_order_in_which_they_began() -> None:
    model = Model(ATTENTION["bmm"])
    first, second = AttentionProbe(model, every_n_steps=1), AttentionProbe(model, every_n_steps=1)
    run(model)
    first.close()
    report = second.step()
    assert report is not None
    assert report.layers == ("layers.0", "layers.1")
    run(model)
    second.close()


def test_training_is_the_same_under_two_probes() -> None:
    class Watched(Model):
        def __init__(self) -> None:
            super().__init__(lambda: Attention(explicit, dropout=0.2))

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with session(model):
            return model(x)

    assert_same_training(Watched, tokens(), forward=forward)


def test_user_modes_and_hooks_stay_where_they_are() -> None:
    class Counting(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            Counting.count += 1
            return func(*args, **(kwargs or {}))

    class Inner(Model):
        def forward(self, x: Tensor) -> Tensor:
            with Counting():
                return super().forward(x)

    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        before = global_state()
        model = Inner(ATTENTION["multihead"])
        with Counting(), session(model) as watching:
            run(model)
        assert names(watching.seen) == ["layers.0.attn", "layers.1.attn"]
        assert global_state() == before
        assert Counting.count
    finally:
        handle.remove()

"""The log-sum-exp that a fused kernel keeps: read where that is harmless, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import attnprobe as ap
from attnprobe import collect
from attnprobe.capture.session import REPEATED
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense_parts
from attnprobe.statistics.streaming import weighed
from tests.capture.models import loss_of
from tests.capture.reference import session
from tests.capture.training import assert_same_training

B, H, G, T, D = 2, 4, 2, 21, 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Heads are strided views, as in most models."""

    def __init__(self, attend: Attend, groups: int = H) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(H * D, heads * D) for heads in (H, groups, groups))
        self.out = nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each(x).unflatten(-1, (-1, D)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers with residuals; ``run`` says how each is called."""

    def __init__(
        self, attend: Attend = F.scaled_dot_product_attention, run: Callable[..., Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(H * D, H * D)
        self.layers = nn.ModuleList(Attention(attend, **options) for _ in range(2))
        self.run = run or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + self.run(layer, x)
        return x


def tokens(length: int = T) -> Tensor:
    return torch.randn(B, length, H * D, generator=torch.Generator().manual_seed(1))


def records(
    attend: Attend = F.scaled_dot_product_attention,
    run: Callable[..., Tensor] | None = None,
    *,
    forward: Callable[..., Tensor] = lambda model, x: model(x),
    x: Tensor | None = None,
    **options: Any,
) -> list[AttentionRecord]:
    torch.manual_seed(0)
    model = Model(attend, run, **options)
    with session(model) as watching:
        loss_of(forward(model, tokens() if x is None else x)).backward()
    assert len(watching.seen) == 2
    assert all(seen.result is not None for seen in watching.seen), [seen.reason for seen in watching.seen]
    return [seen.result for seen in watching.seen]


def assert_right(record: AttentionRecord) -> None:
    assert record.logsumexp is not None
    assert record.logsumexp.shape == record.shape[:2] + record.shape[3:4]
    assert not record.logsumexp.requires_grad
    parts = dense_parts(record)
    expected = parts.scores.logsumexp(-1)
    seen = parts.visible.any(-1)
    torch.testing.assert_close(record.logsumexp.double()[seen], expected[seen], rtol=1e-5, atol=1e-5)
    assert weighed(record, set()).kernel_lse  # and it is used


SHOWN = (torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(2)) < 0.7) | torch.eye(T).bool()
sdpa = partial(partial, F.scaled_dot_product_attention)


def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Contiguous heads."""
    return F.scaled_dot_product_attention(*(each.contiguous() for each in (query, key, value)))


def changed_in_place(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Which torch allows only where no fused kernel needs its output again."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value).mul_(2)


def gated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Other hooks on the output, and a gradient that comes from two sides."""
    output = F.scaled_dot_product_attention(query, key, value)
    output.register_hook(lambda error: 0.5 * error)
    output.retain_grad()
    return output * output.sigmoid()


WITH: dict[str, tuple[Attend, dict[str, Any]]] = {
    "plain": (F.scaled_dot_product_attention, {}),
    "packed": (packed, {}),
    "causal": (sdpa(is_causal=True), {}),
    "bool mask": (sdpa(attn_mask=SHOWN), {}),
    "padding": (sdpa(attn_mask=(torch.arange(T) < torch.tensor([[T], [9]]))[:, None, None]), {}),
    "added": (sdpa(attn_mask=torch.zeros(T, T).masked_fill(~SHOWN[0, 0], -torch.inf)), {}),
    "scale": (sdpa(scale=0.7), {}),
    "GQA": (sdpa(enable_gqa=True), {"groups": G}),
    "causal GQA": (sdpa(is_causal=True, enable_gqa=True), {"groups": G}),
    "gated": (gated, {}),
    "reentrant": (F.scaled_dot_product_attention, {"run": partial(checkpoint, use_reentrant=True)}),
}


@pytest.mark.parametrize("name", WITH)
def test_it_is_that_of_the_scores(name: str) -> None:
    attend, options = WITH[name]
    for record in records(attend, **options):
        assert_right(record)


def test_one_token() -> None:
    for record in records(x=tokens(1)):
        assert_right(record)


def test_double_and_half_precision() -> None:
    torch.manual_seed(0)
    model = Model()
    with session(model.double()) as watching:
        loss_of(model(tokens().double())).backward()
    assert all(seen.result.logsumexp is not None for seen in watching.seen)
    with session(model.bfloat16()) as watching:
        loss_of(model(tokens().bfloat16())).backward()
    for seen in watching.seen:
        if seen.result.logsumexp is not None:
            expected = dense_parts(seen.result).scores.logsumexp(-1)
            torch.testing.assert_close(seen.result.logsumexp.double(), expected, rtol=1e-2, atol=1e-2)


def hooked(model: nn.Module, x: Tensor) -> Tensor:
    """Each tensor may be unpacked once, as under non-reentrant checkpointing."""

    def unpack(saved: list[Tensor]) -> Tensor:
        return saved.pop()

    with torch.autograd.graph.saved_tensors_hooks(lambda x: [x], unpack):
        return model(x)


def on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / D**0.5).softmax(-1) @ value


WITHOUT: dict[str, dict[str, Any]] = {
    "checkpointed": {"run": partial(checkpoint, use_reentrant=False)},
    "checkpointed twice": {
        "run": lambda layer, x: checkpoint(
            lambda x: checkpoint(layer, x, use_reentrant=False).sin(), x, use_reentrant=False
        )
    },
    "save_on_cpu": {"forward": on_cpu},
    "hooks": {"forward": hooked},
    "explicit": {"attend": explicit},
    "dropout": {"attend": sdpa(dropout_p=0.3)},
    "changed in place": {"attend": changed_in_place},
}


@pytest.mark.parametrize("name", WITHOUT)
def test_it_is_left_alone(name: str) -> None:
    assert all(record.logsumexp is None for record in records(**WITHOUT[name]))


@pytest.mark.parametrize("name", [*WITH, *WITHOUT])
def test_training_does_not_notice(name: str) -> None:
    attend, options = WITH.get(name, (F.scaled_dot_product_attention, {}))
    options = {"attend": attend, **options, **WITHOUT.get(name, {})}
    forward = options.pop("forward", lambda model, x: model(x))
    assert_same_training(partial(Model, **options), (tokens(),), forward=forward)


def test_backward_twice_reads_it_twice() -> None:
    torch.manual_seed(0)
    model = Model()
    loss_of(model(tokens())).backward()
    plain = [2 * p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with session(model) as watching:
        loss = loss_of(model(tokens()))
        loss.backward(retain_graph=True)
        first = [seen.result for seen in watching.seen]
        loss.backward()
    for record in first:
        assert_right(record)
    assert {seen.reason for seen in watching.seen} == {REPEATED}
    for expected, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_the_probe_measures_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, measure = [], collect.measure

    def noted(record: AttentionRecord, *args: Any, **options: Any) -> Any:
        seen.append(record)
        return measure(record, *args, **options)

    monkeypatch.setattr(collect, "measure", noted)
    torch.manual_seed(0)
    model = Model(sdpa(is_causal=True))
    report = ap.analyze(model, lambda: loss_of(model(tokens())), statistics="all")
    assert len(seen) == 2
    for record in seen:
        assert_right(record)
    monkeypatch.setattr("attnprobe.capture.session.kept_lse", lambda error: None)
    without = ap.analyze(model, lambda: loss_of(model(tokens())), statistics="all")
    assert all(record.logsumexp is None for record in seen[2:])
    for name in report.statistics:
        torch.testing.assert_close(report[name], without[name], rtol=1e-5, atol=1e-8, equal_nan=True, msg=name)


def test_a_torch_without_the_private_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_current_autograd_node")
    assert all(record.logsumexp is None for record in records())
    monkeypatch.undo()
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert all(record.logsumexp is None for record in records())

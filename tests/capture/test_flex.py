"""FlexAttention: any ``score_mod`` and block mask, and a gradient that comes back through the log-sum-exp."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense, dense_parts
from tests.capture.reference import session

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BATCH, HEADS, TOKENS, DEPTH = 2, 4, 9, 3
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def trainable_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's own backward pass works on CPUs; only the front refuses them."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


class Flex(nn.Module):
    """One call; a ``sink`` rescales the output by the share that the keys keep, as gpt-oss does."""

    def __init__(self, sink: bool = False, **options: Any) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS, dtype=torch.float64)) if sink else None
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.sink is None:
            return flex.flex_attention(q, k, v, **self.options)
        if "return_aux" in inspect.signature(flex.flex_attention).parameters:
            o, aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True), **self.options)
            lse = aux.lse
        else:
            o, lse = flex.flex_attention(q, k, v, return_lse=True, **self.options)
        return o * torch.sigmoid(lse - self.sink[:, None])[..., None]


def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score - (i - j).abs() * 2.0 ** -(h + 1.0)


def softcap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, 2 * torch.tanh(score / 2), -torch.inf)


TABLE = torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def table(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + TABLE[h, i, j]


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 4)


def block_mask(function: Callable[..., Tensor]) -> Any:
    return flex.create_block_mask(function, BATCH, None, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=8)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "score_mod": lambda: {"score_mod": alibi},
    "masking score_mod": lambda: {"score_mod": softcap, "scale": 0.7},
    "captured tensor": lambda: {"score_mod": table},
    "block mask": lambda: {"block_mask": block_mask(window)},
    "both": lambda: {"score_mod": alibi, "block_mask": block_mask(window)},
    "grouped": lambda: {"score_mod": alibi, "enable_gqa": True},
    "log-sum-exp": lambda: {"score_mod": alibi, "sink": True},
}


def inputs(groups: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, heads, TOKENS, DEPTH) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def train(model: nn.Module, tensors: list[Tensor]) -> Tensor:
    loss = model(*tensors).sin().square().sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(2)
    options = OPTIONS[name]()
    model = Flex(**options)
    tensors = inputs(2 if name == "grouped" else HEADS)
    with torch.compiler.set_stance("force_eager"):
        plain = inputs(2 if name == "grouped" else HEADS)
        loss = train(model, plain)
    with session(model) as watching:
        assert torch.equal(train(model, tensors), loss)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(tensors, plain, strict=True))
    (call,) = watching.seen
    record: AttentionRecord = call.result
    parts = dense_parts(record)
    torch.testing.assert_close(parts.alpha @ parts.value, parts.output, **CLOSE)
    torch.testing.assert_close(parts.E, (parts.error * parts.output).sum(-1), **CLOSE)
    torch.testing.assert_close(over_groups(parts.dV, record), tensors[2].grad, **CLOSE)
    assert (record.lse_error is not None) == (name == "log-sum-exp")
    assert record.self_attention is (True if record.mask_mod else None)
    if "masking" not in name:  # the derivative of a softcap is the score_mod's own affair
        torch.testing.assert_close(record.scale * parts.dS @ parts.key, tensors[0].grad, **CLOSE)
        by_head = record.scale * parts.dS.mT @ parts.query
        torch.testing.assert_close(over_groups(by_head, record), tensors[1].grad, **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
def test_streaming_statistics_are_the_dense_ones(name: str) -> None:
    torch.manual_seed(2)
    model = Flex(**OPTIONS[name]())
    tensors = inputs(2 if name == "grouped" else HEADS)
    records: list[AttentionRecord] = []

    def count(record: AttentionRecord) -> tuple[Tensor, Tensor]:
        records.append(record)
        return torch.zeros(HEADS), torch.ones(HEADS)

    own = ap.Statistic("own", "collects the record", measure=count)
    report = ap.analyze(model, lambda: model(*tensors).sin().square().sum(), statistics=["all", own])
    reference = dense(records[0])
    assert not report.warnings
    for statistic in ("entropy", "max_logit", "score_grad_norm", "advantage_std", "value_grad_norm"):
        torch.testing.assert_close(report[statistic][0], reference[statistic], rtol=1e-9, atol=1e-12)


def over_groups(by_head: Tensor, record: AttentionRecord) -> Tensor:
    return by_head.unflatten(1, (record.shape[2], -1)).sum(2)

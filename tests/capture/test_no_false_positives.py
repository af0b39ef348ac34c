"""Models that multiply and normalise, but do not attend: nothing is captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnprobe import AttentionProbe, analyze
from attnprobe.capture.unseen import UNMET
from attnprobe.errors import NoAttentionError
from attnprobe.statistics.dense import dense_parts
from tests.capture.models import BATCH, TOKENS, WIDTH, Attention, Model, loss_of, sdpa, tokens
from tests.capture.reference import names, session

EXPERTS = 4


class Parts(nn.Module):
    """What the functions below need."""

    def __init__(self, run: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.gate, self.head = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.keys, self.values = nn.Parameter(torch.randn(EXPERTS, WIDTH)), nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.slots = nn.Parameter(torch.randn(WIDTH, EXPERTS))
        self.register_buffer("bins", torch.linspace(-1, 1, EXPERTS)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.embed(x))

    def stacked(self, x: Tensor, dim: int = -2) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts], dim)


def gate_of_a_sequence(self: Parts, x: Tensor) -> Tensor:
    pooled = x.mean(1)
    gates = self.gate(pooled).softmax(-1)
    return (gates.unsqueeze(1) @ self.stacked(pooled)).squeeze(1)


def gate_of_tokens(self: Parts, x: Tensor) -> Tensor:
    return (self.gate(x).softmax(-1).unsqueeze(-2) @ self.stacked(x)).squeeze(-2)


def gate_bmm(self: Parts, x: Tensor) -> Tensor:
    gates, outputs = F.softmax(self.gate(x), -1).flatten(0, 1), self.stacked(x).flatten(0, 1)
    return torch.bmm(gates[:, None], outputs)[:, 0].view_as(x)


def gate_einsum(self: Parts, x: Tensor) -> Tensor:
    return torch.einsum("bte,bted->btd", self.gate(x).softmax(-1), self.stacked(x))


def gate_shared_by_the_tokens(self: Parts, x: Tensor) -> Tensor:
    """Batched: every token mixes the same expert outputs."""
    return self.gate(x).softmax(-1) @ self.stacked(x.mean(1))


def gate_with_noise(self: Parts, x: Tensor) -> Tensor:
    logits = self.gate(x) + torch.randn(BATCH, TOKENS, EXPERTS) * F.softplus(self.gate(x))
    low = logits.topk(2, -1).values[..., -1:]
    gates = (logits / 0.7).masked_fill(logits < low, -torch.inf).to(x.dtype).softmax(-1)
    return gates @ self.stacked(x.mean(1))


def soft_mixture_of_experts(self: Parts, x: Tensor) -> Tensor:
    """Dispatch and combine weights from one product with a parameter."""
    logits = torch.einsum("btd,de->bte", x, self.slots)
    slots = torch.einsum("bte,btd->bed", logits.softmax(1), x)
    outputs = torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], 1)
    return torch.einsum("bte,bed->btd", logits.softmax(-1), outputs)


def soft_mixture_by_matmul(self: Parts, x: Tensor) -> Tensor:
    logits = x @ self.slots
    return logits.softmax(-1) @ self.stacked(x.mean(1))


def mixture_by_addmm(self: Parts, x: Tensor) -> Tensor:
    logits = torch.addmm(self.gate.bias, x.flatten(0, 1), self.slots).view(BATCH, TOKENS, EXPERTS)
    return logits.softmax(-1) @ self.stacked(x.mean(1))


def dictionary(self: Parts, x: Tensor) -> Tensor:
    return self.gate(x).softmax(-1) @ self.values


def dictionary_of_keys(self: Parts, x: Tensor) -> Tensor:
    return (x @ self.keys.T).softmax(-1) @ self.values


def dictionary_in_a_batch(self: Parts, x: Tensor) -> Tensor:
    keys, values = (p.unsqueeze(0).expand(BATCH, -1, -1) for p in (self.keys, self.values))
    return torch.bmm(torch.bmm(x, keys.transpose(1, 2)).softmax(-1), values)


def codebook_of_features(self: Parts, x: Tensor) -> Tensor:
    """Keys that are a parameter are no keys, whatever the values are."""
    return (x @ self.keys.mT).softmax(-1) @ self.stacked(x.mean(1))


def expected_bin(self: Parts, x: Tensor) -> Tensor:
    return self.gate(x).softmax(-1) @ self.bins


def classifier(self: Parts, x: Tensor) -> Tensor:
    return self.head(x).softmax(-1)


def classifier_by_matmul(self: Parts, x: Tensor) -> Tensor:
    return torch.log_softmax(x @ self.slots, -1).exp() @ self.head.weight[:, :EXPERTS].mT


def products_only(self: Parts, x: Tensor) -> Tensor:
    return self.stacked((x @ x.mT) @ x, 1).mean(1) + torch.einsum("btd,bsd,bse->bte", x, x, x)


def linear_attention(self: Parts, x: Tensor) -> Tensor:
    """Keys and values are multiplied first; the softmax is over features."""
    q = self.head(x).unflatten(-1, (1, 3)).transpose(1, 2).softmax(-1)
    k, v = self.head(x).unsqueeze(1).softmax(-2), x.unsqueeze(1)
    return (q @ (k.mT @ v)).squeeze(1)


def attention_that_is_thrown_away(self: Parts, x: Tensor) -> Tensor:
    weights = (x @ x.mT).softmax(-1)
    return x * weights.mean(-1, keepdim=True)


RUNS = [
    gate_of_a_sequence,
    gate_of_tokens,
    gate_bmm,
    gate_einsum,
    gate_shared_by_the_tokens,
    gate_with_noise,
    soft_mixture_of_experts,
    soft_mixture_by_matmul,
    mixture_by_addmm,
    dictionary,
    dictionary_of_keys,
    dictionary_in_a_batch,
    codebook_of_features,
    expected_bin,
    classifier,
    classifier_by_matmul,
    products_only,
    linear_attention,
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_nothing_is_captured(run: Callable[[Parts, Tensor], Tensor]) -> None:
    model = Parts(run)
    with session(model) as watching:
        loss_of(model(*tokens())).backward()
    assert watching.seen == []
    with pytest.raises(NoAttentionError, match="no softmax attention was seen"):
        analyze(model, lambda: loss_of(model(*tokens())))


def test_attention_that_is_thrown_away_is_named() -> None:
    model = Parts(attention_that_is_thrown_away)
    with session(model) as watching:
        loss_of(model(*tokens())).backward()
    assert [(call.module, call.reason) for call in watching.seen] == [("Parts", UNMET)]


def test_mixture_of_experts_beside_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.moe = Attention(sdpa()), Parts(gate_shared_by_the_tokens)

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(self.attn(x))

    model = Model(Block)
    with AttentionProbe(model, every_n_steps=1) as probe:
        loss_of(model(*tokens())).backward()
        report = probe.step()
    assert report is not None
    assert report.layers == ("layers.0.attn", "layers.1.attn")


# The other side of the border


def learned_queries(self: Parts, x: Tensor) -> Tensor:
    return (self.keys @ x.mT).softmax(-1) @ x


def projected_learned_queries(self: Parts, x: Tensor) -> Tensor:
    return (self.experts[0](self.keys) @ self.experts[1](x).mT).softmax(-1) @ x


def additive_scores(self: Parts, x: Tensor) -> Tensor:
    pairs = torch.tanh(self.experts[0](x).unsqueeze(2) + self.experts[1](x).unsqueeze(1))
    return F.linear(pairs, self.keys[:1]).squeeze(-1).softmax(-1) @ x


def biased_by_a_projection(self: Parts, x: Tensor) -> Tensor:
    bias = F.linear(x, torch.ones(TOKENS, WIDTH))
    return (bias + x @ x.mT).softmax(-1) @ x


def one_query(self: Parts, x: Tensor) -> Tensor:
    return (x.mean(1, keepdim=True) @ x.mT).softmax(-1) @ x


BORDER = [learned_queries, projected_learned_queries, additive_scores, biased_by_a_projection, one_query]


@pytest.mark.parametrize("run", BORDER, ids=lambda run: run.__name__)
def test_attention_of_other_kinds_is_captured(run: Callable[[Parts, Tensor], Tensor]) -> None:
    model = Parts(run)
    with session(model) as watching:
        loss_of(model(*tokens())).backward()
    assert names(watching.seen) == ["Parts"]
    (call,) = watching.seen
    assert call.result.shape[1] == 1
    parts = dense_parts(call.result)
    torch.testing.assert_close(parts.alpha @ parts.value, parts.output, rtol=1e-5, atol=1e-5)

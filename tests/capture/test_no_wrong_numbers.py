"""What could pass for a softmax over keys, for heads or tokens, and is none: a reason, never a plausible number."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.capture.unseen import UNMET
from attnprobe.errors import AttnProbeWarning

WIDTH, HEADS, TOKENS = 32, 4, 16
Weigh = Callable[[Tensor], Tensor]


class Written(nn.Module):
    """Attention written out; ``weigh`` makes the weights of the scores, ``mix`` brings them to the values."""

    def __init__(self, weigh: Weigh, mix: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> None:
        super().__init__()
        self.weigh, self.mix = weigh, mix
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = self.weigh(q @ k.mT * q.shape[-1] ** -0.5)
        return self.out(self.mix(weights, v).transpose(1, 2).flatten(2))


def past(weights: Tensor) -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=weights.dtype).tril()


def masked_afterwards(scores: Tensor) -> Tensor:
    weights = scores.softmax(-1) * past(scores)
    return weights / weights.sum(-1, keepdim=True)


def smoothed(scores: Tensor) -> Tensor:
    return 0.9 * scores.softmax(-1) + 0.1 / TOKENS


def halved(scores: Tensor) -> Tensor:
    return scores.softmax(-1) * 0.5


def masked_then_dropped(scores: Tensor) -> Tensor:
    return F.dropout(scores.softmax(-1) * past(scores), 0.1)


def dropped_then_masked(scores: Tensor) -> Tensor:
    return F.dropout(scores.softmax(-1), 0.1) * past(scores)


def small_ones_removed(scores: Tensor) -> Tensor:
    weights = scores.softmax(-1)
    return F.dropout(weights.masked_fill(weights < 1 / TOKENS, 0), 0.1)


def analyzed(model: nn.Module, x: Tensor) -> ap.StepReport:
    with ap.AttentionProbe(model, every_n_steps=1, statistics="all", alarms=()) as probe:
        model(x).float().sin().square().sum().backward()
        report = probe.step()
    assert report is not None
    return report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weigh", [masked_afterwards, halved, masked_then_dropped, dropped_then_masked, small_ones_removed]
)
def test_weights_that_were_changed(weigh: Weigh, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Written(weigh).to(dtype), torch.randn(4, TOKENS, WIDTH).to(dtype)
    with pytest.warns(AttnProbeWarning, match="Written: not measured, because sum alpha b misses u.o"):
        report = analyzed(model, x)
    assert report["entropy"].isnan().all()
    assert (report.residual > 0.02).all()


def test_weights_that_were_smoothed() -> None:
    torch.manual_seed(0)
    with pytest.warns(AttnProbeWarning, match="Written: not measured"):
        report = analyzed(Written(smoothed), torch.randn(4, TOKENS, WIDTH))
    assert report["entropy"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [2, 16, 300])
def test_rounding_is_trusted(dtype: torch.dtype, scale: float, tokens: int) -> None:
    """Diffuse and sharp, short and long."""
    torch.manual_seed(0)
    model = Written(lambda scores: (scores * scale).softmax(-1)).to(dtype)
    report = analyzed(model, torch.randn(2, tokens, WIDTH).to(dtype))
    assert report["entropy"].isfinite().all()
    assert not report.warnings


LOST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "unbind": lambda weights, v: torch.stack([w @ u for w, u in zip(weights.unbind(1), v.unbind(1), strict=True)], 1),
    "sum of products": lambda weights, v: (weights[..., None] * v[:, :, None]).sum(-2),
    "over the queries": lambda weights, v: weights.mT @ v,
}


@pytest.mark.parametrize("name", LOST)
def test_weights_that_are_lost_on_their_way(name: str) -> None:
    torch.manual_seed(0)
    model = Written(lambda scores: scores.softmax(-1), LOST[name])
    with pytest.warns(AttnProbeWarning, match=f"Written: {UNMET}"):
        report = analyzed(model, torch.randn(2, TOKENS, WIDTH))
    assert not report.valid


class Folded(nn.Module):
    """Heads beside the batch, in front of it or behind; the first head is sharp."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.num_heads, self.order = HEADS, order
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        with torch.no_grad():
            self.qkv.weight[: WIDTH // HEADS] *= 8

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.order == "batch first":
            return F.scaled_dot_product_attention(*(z.flatten(0, 1) for z in (q, k, v)))
        q, k, v = (z.transpose(0, 1) for z in (q, k, v))
        if self.order == "heads first":
            q, k, v = (z.flatten(0, 1) for z in (q, k, v))
        elif self.order == "concatenated":
            q, k, v = (torch.cat(z.unbind(0)) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("order", ["batch first", "heads first", "concatenated", "apart, heads first"])
def test_heads_are_told_apart_or_averaged(order: str) -> None:
    torch.manual_seed(0)
    model, x = Folded(order), torch.randn(3, TOKENS, WIDTH)
    report = analyzed(model, x)
    q, k, _ = model.qkv(x).detach().double().unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
    entropy = torch.special.entr(weights).sum(-1).mean((0, 2))
    known = order in ("batch first", "apart, heads first")
    torch.testing.assert_close(report["entropy"][0], entropy if known else entropy.mean()[None], rtol=1e-5, atol=1e-5)
    assert known == (not any("heads are folded" in note for note in report.notes))


class Latents(nn.Module):
    """As many learned queries as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Parameter(torch.randn(1, 1, TOKENS, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys(x)[:, None]
        return F.scaled_dot_product_attention(self.queries.expand(len(x), -1, -1, -1), keys, keys)


class Halves(nn.Module):
    """The first half of the tokens attends to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.project(x)[:, None].chunk(2, 2)
        return F.scaled_dot_product_attention(first, second, second)


@pytest.mark.parametrize("model", [Latents, Halves])
def test_other_tokens_are_not_taken_for_the_same(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = analyzed(model(), torch.randn(2, TOKENS, WIDTH))
    assert report["self_mass"].isnan().all()
    assert report["entropy"].isfinite().all()


def test_a_second_call_that_cannot_be_measured_is_named() -> None:
    class Two(Written):
        def forward(self, x: Tensor) -> Tensor:
            q = self.qkv(x)[..., None, :WIDTH].transpose(1, 2)
            return super().forward(x) + (torch.sigmoid(q @ q.mT) @ q)[:, 0]

    torch.manual_seed(0)
    with pytest.warns(AttnProbeWarning, match=r"Two: of its calls one is not measured: .* by sigmoid"):
        report = analyzed(Two(lambda scores: scores.softmax(-1)), torch.randn(2, TOKENS, WIDTH))
    assert report["entropy"].isfinite().all()


def test_a_mask_by_assignment() -> None:
    def assigned(scores: Tensor) -> Tensor:
        scores[..., torch.ones(TOKENS, TOKENS).triu(1).bool()] = -1e3
        return scores.softmax(-1)

    def filled(scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -1e3).softmax(-1)

    reports = []
    for weigh in (assigned, filled):
        torch.manual_seed(0)
        reports.append(analyzed(Written(weigh), torch.randn(2, TOKENS, WIDTH)))
    assert torch.equal(reports[0]["normalized_entropy"], reports[1]["normalized_entropy"])


def test_a_trace_while_a_step_is_probed_harms_nothing() -> None:
    model, x = Folded("batch first"), torch.randn(3, TOKENS, WIDTH)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        torch.fx.symbolic_trace(Wrapper())
        model(x).square().sum().backward()
        report = probe.step()
    assert report is not None
    assert report.valid

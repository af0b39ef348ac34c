"""Small models with attention of every kind, and what a training loop needs around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprobe as ap

WIDTH = 16


class Heads(nn.Module):
    """Self-attention; subclasses say how ``[B, H, T, D]`` queries, keys and values become outputs."""

    def __init__(self, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))

    def rate(self) -> float:
        return self.dropout if self.training else 0.0


class SDPA(Heads):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=self.rate())


class Softmax(Heads):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return F.dropout(weights, self.rate()) @ value


class NotUnderstood(Softmax):
    """Changes the weights in a way that the recorded softmax does not show."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT).softmax(-1)
        return (weights * torch.rand_like(weights)) @ value


class MultiHead(nn.MultiheadAttention):
    def __init__(self, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__(WIDTH, heads, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


KINDS = {"sdpa": SDPA, "softmax": Softmax, "multihead": MultiHead}


class Net(nn.Module):
    """Residual attention layers between a dropout and a batch norm: random numbers and buffers to get wrong."""

    def __init__(self, kind: str = "sdpa", heads: tuple[int, ...] = (2, 2), dropout: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(KINDS[kind](count, dropout) for count in heads)
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x.mean(1)))


def net(kind: str = "sdpa", seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(kind, **options)


def batches(count: int, size: int = 4, length: int = 6) -> Iterator[Tensor]:
    """Always the same batches, without touching torch's global random state."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, length, WIDTH, generator=generator)


def batch(size: int = 4, length: int = 6) -> Tensor:
    return next(batches(1, size, length))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def run(probe: ap.AttentionProbe, model: nn.Module, steps: int = 1, x: Tensor | None = None) -> list[Any]:
    """What ``probe.step`` returned for ``steps`` steps of forward and backward."""
    reports = []
    for given in batches(steps):
        loss = loss_of(model, given if x is None else x)
        loss.backward()
        reports.append(probe.step(loss))
    return reports

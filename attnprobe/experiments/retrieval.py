"""Deterministic retrieval: tokens that hold a key and a class, and queries that ask for the class of a key.

What the sticky Markov task leaves open it makes plain: which key a query should attend to is known, attention has to
become sharp to answer, and how many kinds of queries there are can be set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnprobe.experiments.ensemble.model import IGNORED, Architecture, Ensemble
from attnprobe.experiments.ensemble.training import Task

KEYS, CLASSES = 8, 8
WIDTH = KEYS + CLASSES + KEYS
FORM = Architecture(WIDTH, CLASSES, causal=False, initial_scale=0.3)


def retrieval(seeds: Sequence[int], *, kinds: int = KEYS, sequences: int = 1024, batch: int = 32) -> Task:
    """So many training sequences, of which a step takes ``batch``, and ``batch`` held-out ones, for each seed.

    A sequence has 16 tokens: one for each key, in random order, with a random class, then 8 queries.

    Args:
        seeds: each has sequences of its own.
        kinds: how many of the keys are asked for at all: 1 means that all queries are alike, 8 that any key comes.
        sequences, batch: how many.
    """
    made = [_sequences(torch.Generator().manual_seed(seed), sequences + batch, kinds) for seed in seeds]
    x, y = (torch.stack(parts, 1) for parts in zip(*made, strict=True))
    return Task(x[:sequences], y[:sequences], x[sequences:], y[sequences:], batch)


def _sequences(random: torch.Generator, count: int, kinds: int) -> tuple[Tensor, Tensor]:
    """``[count, 16, WIDTH]`` and ``[count, 16]``."""
    keys = torch.rand(count, KEYS, generator=random).argsort(1)
    classes = torch.randint(CLASSES, (count, KEYS), generator=random)
    asked = torch.randint(kinds, (count, KEYS), generator=random)
    answers = classes.gather(1, keys.argsort(1).gather(1, asked))
    x = torch.zeros(count, 2 * KEYS, WIDTH)
    x[:, :KEYS, :KEYS] = F.one_hot(keys, KEYS)
    x[:, :KEYS, KEYS : KEYS + CLASSES] = F.one_hot(classes, CLASSES)
    x[:, KEYS:, KEYS + CLASSES :] = F.one_hot(asked, KEYS)
    y = torch.full((count, 2 * KEYS), IGNORED)
    y[:, KEYS:] = answers
    return x, y


def asked_keys(x: Tensor) -> Tensor:
    """``[..., 8]``, the key that each of the queries asks for, of observations ``[..., 16, WIDTH]``."""
    asked: Tensor = x[..., KEYS:, KEYS + CLASSES :].argmax(-1)
    return asked


def correct_weight(attention: Tensor, x: Tensor) -> Tensor:
    """``[B, S, H, 8]``: the weight that each query puts on the token that holds its key.

    Args:
        attention: ``[B, S * H, 16, 16]``.
        x: ``[B, S, 16, WIDTH]``.
    """
    wanted = x[..., :KEYS, :KEYS].argmax(-1).argsort(-1).gather(-1, asked_keys(x))  # [B, S, 8]
    queries = attention.unflatten(1, (x.shape[1], -1))[..., KEYS:, :]
    index = wanted[:, :, None, :, None].expand(*queries.shape[:-1], 1)
    weights: Tensor = queries.gather(-1, index).squeeze(-1)
    return weights


@torch.no_grad()
def look(model: Ensemble, x: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
    """What a layer's heads do with the queries of ``x``.

    Returns:
        ``[S, H, 8]``, the mean weight on the right token where key ``k`` is asked for (NaN where it never is), and
        ``[S, H]``, the mean entropy of these rows over that of uniform attention.
    """
    attention = model.layer(layer).scores(model.before(layer, x)).softmax(-1)
    weights = correct_weight(attention, x)
    asked = F.one_hot(asked_keys(x), KEYS).to(weights.dtype)  # [B, S, 8, K]
    of_kind = torch.einsum("bshq,bsqk->shk", weights, asked) / asked.sum((0, 2))[:, None]
    rows = torch.special.entr(attention[..., KEYS:, :]).sum(-1).mean((0, 2))
    return of_kind, rows.view(len(model.seeds), -1) / math.log(2 * KEYS)

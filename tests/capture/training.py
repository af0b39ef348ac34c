"""Train a model with and without a probe, and compare everything bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe import AttentionProbe
from tests.capture.models import loss_of
from tests.capture.reference import session

STEPS = 2
Watch = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


def unwatched(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def by_probe(model: nn.Module) -> AttentionProbe:
    return AttentionProbe(model, every_n_steps=1, statistics="all", alarms=(), strict=True)


WATCHES: dict[str, Watch] = {"session": session, "probe": by_probe}


def trained(
    build: Callable[[], nn.Module],
    batch: tuple[Tensor, ...],
    watch: Watch = unwatched,
    *,
    forward: Callable[..., Tensor] = lambda model, *inputs: model(*inputs),
    micro_batches: int = 1,
) -> list[Tensor]:
    """Losses, outputs, gradients, parameters and the random state of some steps of training."""
    torch.manual_seed(13)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    history: list[Tensor] = []
    with watch(model) as probe:
        for _ in range(STEPS):
            for _ in range(micro_batches):
                output = forward(model, *batch)
                loss = loss_of(output)
                loss.backward()
                history += [output.detach().clone(), loss.detach()]
            history += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(probe, AttentionProbe):
                report = probe.step(loss)
                assert report is not None
                assert not report.invalid
    return [*history, *(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]


def assert_same_training(
    build: Callable[[], nn.Module], batch: tuple[Tensor, ...], watches: dict[str, Watch] = WATCHES, **options: Any
) -> None:
    """Nothing that the training computes tells whether somebody watches."""
    plain = trained(build, batch, **options)
    for name, watch in watches.items():
        watched = trained(build, batch, watch, **options)
        assert len(watched) == len(plain)
        assert all(same_bits(a, b) for a, b in zip(watched, plain, strict=True)), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())

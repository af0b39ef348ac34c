"""The paper's single-head model as a LightningModule, under plain SGD or the EM-like schedule."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnprobe.experiments.markov.task import SYMBOLS, WIDTH, Sequence
from attnprobe.schedules import ValueLearningRate

KEY_WIDTH, VALUE_WIDTH = 10, 15
RATE, INITIAL_SCALE, VALUE_MULTIPLIER = 0.01, 0.1, 10.0

Schedule = Literal["sgd", "em"]


class Attention(nn.Module):
    """One causal head; no bias, no output projection: the readout follows directly."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (
            nn.Parameter(INITIAL_SCALE * torch.randn(WIDTH, width, generator=generator))
            for width in (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, 20]`` -> ``[B, T, 15]``."""
        query, key, value = (x @ weight for weight in (self.W_Q, self.W_K, self.W_V))
        # The fused kernel wants one width: zero columns change no score.
        query, key = (F.pad(tensor, (0, VALUE_WIDTH - KEY_WIDTH)) for tensor in (query, key))
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=KEY_WIDTH**-0.5).squeeze(1)


class MarkovModel(pl.LightningModule):  # type: ignore[misc]
    """Predicts the present symbol from all observations up to now.

    Attributes:
        losses: training loss of each step. held_out: step -> loss on the held-out sequence.
    """

    def __init__(self, schedule: Schedule, held_out: Sequence, seed: int, check_every: int = 10) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.attention = Attention(generator)
        self.readout = nn.Parameter(INITIAL_SCALE * torch.randn(VALUE_WIDTH, SYMBOLS, generator=generator))
        self.schedule, self.check_every = schedule, check_every
        self._held_out = held_out
        self.losses: list[float] = []
        self.held_out: dict[int, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        context: Tensor = self.attention(x)
        return context @ self.readout

    def loss(self, sequence: Sequence) -> Tensor:
        return F.cross_entropy(self(sequence.x[None])[0], sequence.y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step % self.check_every == 0:
            self.check()
        loss = self.loss(Sequence(*batch))
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def check(self) -> None:
        """Measure the loss on the held-out sequence."""
        with torch.no_grad():
            self.held_out[self.global_step] = self.loss(self._held_out).item()

    def on_train_end(self) -> None:
        self.check()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
        if self.schedule == "em":
            ValueLearningRate(self, VALUE_MULTIPLIER, parameters="attention.W_V").attach(optimizer)
        return optimizer

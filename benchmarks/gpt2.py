"""A GPT-2 with random weights and its training step: the model that whole steps are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, logging

logging.set_verbosity_error()


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; heads are 64 wide."""

    heads: int = 12
    layers: int = 4
    vocabulary: int = 50257

    def model(self, tokens: int, attention: str = "sdpa") -> Any:
        """In training mode, without dropout; the same weights every time."""
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=self.layers,
            n_head=self.heads,
            n_embd=64 * self.heads,
            vocab_size=self.vocabulary,
            n_positions=tokens,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
        return GPT2LMHeadModel(config).train()

    def batch(self, tokens: int) -> Tensor:
        """``[1, T]``, the same every time."""
        return torch.randint(self.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))

    def __str__(self) -> str:
        return f"{self.layers} layers, width {64 * self.heads}, {self.heads} heads, vocabulary {self.vocabulary}"


class Trainer:
    """Forward pass, loss, backward pass and AdamW step, as in any training loop."""

    def __init__(self, sizes: Sizes, tokens: int, attention: str = "sdpa") -> None:
        self.model, self.batch = sizes.model(tokens, attention), sizes.batch(tokens)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def forward(self, **options: Any) -> Any:
        """The model's output; ``loss`` is part of it."""
        return self.model(self.batch, labels=self.batch, **options)

    def update(self) -> None:
        """What follows the backward pass."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> Tensor:
        """One step; its loss."""
        loss: Tensor = self.forward().loss
        loss.backward()
        self.update()
        return loss

"""One attention call with its upstream gradient, and the record that a probe would make of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnprobe.record import AttentionRecord

WIDTH = 64


class Attention:
    """Queries, keys, values and the gradient at the output, float32, heads 64 wide.

    Args:
        batch: sequences.
        heads: heads of each.
        tokens: length of each.
        causal: whether a query sees only the keys up to its own.
    """

    def __init__(self, batch: int, heads: int, tokens: int, causal: bool = True) -> None:
        self.inputs = [torch.randn(batch, heads, tokens, WIDTH, requires_grad=True) for _ in range(3)]
        self.upstream, self.causal = torch.randn(batch, heads, tokens, WIDTH), causal

    def forward(self) -> Tensor:
        query, key, value = self.inputs
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)

    def train(self) -> None:
        """Forward and backward pass."""
        for tensor in self.inputs:
            tensor.grad = None
        self.forward().backward(self.upstream)

    def record(self, *, logsumexp: bool = False) -> AttentionRecord:
        """What a probe captures; on request with each row's log-sum-exp as the kernel saved it."""
        output = self.forward()
        query, key, value = (tensor.detach() for tensor in self.inputs)
        given = {}
        if logsumexp:
            given["logsumexp"] = output.grad_fn._saved_logsumexp.detach()  # type: ignore[union-attr]
        return AttentionRecord(
            value,
            query,
            key,
            output.detach(),
            self.upstream,
            scale=WIDTH**-0.5,
            causal=self.causal,
            self_attention=True,
            **given,
        )

"""Softmax attention in the form of the other mixing layers: the reference that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnprobe.experiments.closed_form.attention import Routing, RoutingGradients, attend, attention_gradients
from attnprobe.experiments.mixing.layers import Generators, initial_weights


@dataclass(frozen=True, eq=False)
class SoftmaxMixing:
    """A forward pass ``o = alpha v``; what the advantage moves are the scores."""

    routing: Routing

    @property
    def mixing(self) -> Tensor:
        """``[..., T, T]``, attention."""
        return self.routing.attention

    @property
    def weights(self) -> Tensor:
        """``[..., T, T]``, the scores; 0 where not visible."""
        return self.routing.scores.tril()

    @property
    def value(self) -> Tensor:
        """``[..., T, E]``."""
        return self.routing.value

    @property
    def output(self) -> Tensor:
        """``[..., T, E]``."""
        return self.routing.output

    def gradients(self, error: Tensor) -> RoutingGradients:
        """The gradients for an upstream gradient ``error``, ``dL/do`` ``[..., T, E]``."""
        return attention_gradients(self.routing, error)


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, once for each seed, with the weights that ``ensemble.Ensemble`` starts from."""

    def __init__(self, generators: Generators, width: int, key_width: int, value_width: int) -> None:
        super().__init__()
        shapes = [(width, key_width), (width, key_width), (width, value_width)]
        self.W_Q, self.W_K, self.W_V = initial_weights(generators, shapes)

    def mix(self, x: Tensor) -> SoftmaxMixing:
        """The forward pass with all that it computed, ready for ``observe``."""
        visible = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
        return SoftmaxMixing(attend(x @ self.W_Q, x @ self.W_K, x @ self.W_V, visible=visible))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., S, T, N]`` -> ``[..., S, T, E]``, by torch's fused kernel, which a probe sees."""
        query, key, value = x @ self.W_Q, x @ self.W_K, x @ self.W_V
        # That kernel is fast for one width of all three; zeros at the end of queries and keys have no effect.
        scale, missing = query.shape[-1] ** -0.5, value.shape[-1] - query.shape[-1]
        query, key = (F.pad(tensor, (0, missing)) for tensor in (query, key))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
